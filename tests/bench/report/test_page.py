"""The page is whole, needs no network, and is drawn by a browser without an error, on a phone as on a desk."""

from __future__ import annotations

import html
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kdgraft.cli import main
from kdgraft_bench.decisions import Decisions
from kdgraft_bench.report import Run, write_report
from support.commands import refused

CLASSES = ["small white blood cells", "red blood cells", "platelets"]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def some_runs(folder: Path | None = None) -> list[Run]:
    """Three seeds of a teacher, a plain student and two methods, with decisions where there is a folder for them."""
    found = []
    generator = np.random.default_rng(0)
    for place, (label, size, step) in enumerate(
        [("teacher", 900.0, 100.0), ("plain", 270.0, 80.0), ("cwd", 270.0, 110.0), ("a <b>bold</b> one", 270.0, 95.0)]
    ):
        for seed in range(3):
            best = 40 - 4 * place + 0.3 * seed
            curve = [(step, best * step / 100) for step in (50, 100)]
            losses = {"loss_ce": [(step, 1.0 / step) for step in (50, 100)]}
            if place > 1:
                losses["distill.feature_imitation.loss"] = [(50, 2.0), (100, 1.0)]
            metrics = {"mIoU": best, "mAcc": best + 1, "parameters (k)": size, "step (ms)": step}
            found.append(
                Run(
                    label,
                    seed,
                    Path(f"runs/{label}"),
                    "FPN",
                    metrics,
                    losses,
                    {"mIoU": curve},
                    f"lr = 1\nname = {place}\n",
                )
            )
            if folder is not None:
                labels, guesses = generator.integers(0, 3, (2, 60))
                found[-1] = replace(found[-1], decisions=folder / f"{place}_{seed}.npz")
                decided = Decisions.of(CLASSES, labels, guesses, np.full(60, 0.5), np.arange(60))
                decided.write(folder / f"{place}_{seed}.npz")
    return found


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    noise = np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "masks.png")
    write_report(
        some_runs(folder), folder / "report.html", pictures=[folder / "masks.png"], command="kdgraft report plain=a b"
    )
    return folder / "report.html"


def without_scripts(page: Path) -> str:
    return re.sub(r"<script.*?</script>", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)


def test_the_verdict_comes_first_and_every_figure_is_there(page):
    text = without_scripts(page)
    (said,) = re.findall(r"<h1>(.*?)</h1>", text)
    assert said.startswith("Nothing here helps: cwd, the best of 2 methods, makes mIoU worse by 4.00")
    for cell in ("40.30 ± 0.30", "36.30 ± 0.30", "× 1.38", "runs/teacher", "kdgraft report plain=a b", "mAcc"):
        assert cell in text, cell
    assert text.count("<h2>") == 1 + 7 + 1 + 2  # gains, charts, a picture, figures and runs
    assert re.search(r"<del>-name = 1</del>\s<ins>\+name = 2</ins>", text)


def test_where_validation_decides_its_gains_are_a_column_and_no_figure_is_said_to_have_picked_itself(page, tmp_path):
    picked = "The best of 2 methods was picked by these very figures"
    assert picked in without_scripts(page) and "on validation" not in without_scripts(page)
    path = tmp_path / "report.html"
    said = write_report([replace(run, validated={"mIoU": run.metrics["mIoU"] - 1.5}) for run in some_runs()], path)
    text = without_scripts(path)
    assert "by validation" in said and picked not in text
    table = text[text.index("on validation") : text.index("</table>")]
    decimals = {len(number.partition(".")[2]) for number in re.findall(r"<td[^>]*>−?(\d+\.\d+)</td>", table)}
    assert decimals == {2}  # of all gains, whatever the size of each


def test_names_are_text_and_not_html(page):
    assert "a &lt;b&gt;bold&lt;/b&gt; one" in without_scripts(page) and "<b>bold" not in without_scripts(page)
    for script in re.findall(r'<script type="application/json"[^>]*>(.*?)</script>', page.read_text(), flags=re.DOTALL):
        assert "</" not in script


def test_it_needs_no_network(page):
    assert re.findall(r'(?:src|href)="(?!data:)', without_scripts(page)) == []
    assert "url(" not in without_scripts(page)


def test_charts_without_data_are_left_out(tmp_path):
    bare = [
        replace(run, losses={}, validation={}, metrics={"mIoU": run.metrics["mIoU"]}, config="") for run in some_runs()
    ]
    write_report(bare, tmp_path / "report.html")
    assert without_scripts(tmp_path / "report.html").count('class="chart"') == 1


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_draws_it(page, tmp_path, width, theme):
    source = html.escape(page.read_text(encoding="utf-8").replace("<html ", f'<html data-theme="{theme}" '))
    probe = """setTimeout(() => {
        const page = document.getElementById("page").contentDocument, root = page.documentElement;
        const marks = [...page.querySelectorAll(".chart")].map((chart) => chart.querySelectorAll("svg path").length);
        const pictures = [...page.images].every((image) => image.naturalWidth > 0);
        const far = [...page.querySelectorAll("h1, h2, section, svg")].some((one) => one.getBoundingClientRect().right > root.clientWidth + 1);
        const cut = [...page.querySelectorAll(".chart svg")].some((svg) => [...svg.querySelectorAll("text")].some((one) => {
            const [box, all] = [one.getBoundingClientRect(), svg.getBoundingClientRect()];
            return box.left < all.left - 1 || box.right > all.right + 1 || box.top < all.top - 1 || box.bottom > all.bottom + 1; }));
        const alike = [...page.querySelectorAll(".chart .role-axis-label")].some((axis) => {
            const said = [...axis.querySelectorAll("text")].map((one) => one.textContent).filter((one) => one !== "");
            return new Set(said).size < said.length; });
        document.getElementById("found").textContent = [root.dataset.drawn, Math.min(...marks) > 3, pictures, root.scrollWidth <= root.clientWidth, far, cut, alike,
            page.defaultView.getComputedStyle(page.body).backgroundColor].join("|");
    }, 4000)"""
    frame = f'<iframe id="page" width="{width}" height="2000" style="border:0" srcdoc="{source}"></iframe><p id="found"></p><script>{probe}</script>'
    (tmp_path / "frame.html").write_text(frame, encoding="utf-8")
    command = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-sync",
    ]
    command += [
        "--disable-background-networking",
        "--disable-component-update",
        f"--user-data-dir={tmp_path / 'profile'}",
    ]
    command += [
        "--virtual-time-budget=20000",
        "--window-size=1400,2000",
        "--enable-logging=stderr",
        "--dump-dom",
        f"file://{tmp_path / 'frame.html'}",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    (found,) = re.findall(r'<p id="found">(.*?)</p>', done.stdout)
    drawn, marked, pictures, fits, far, cut, alike, background = found.split("|")
    assert (drawn, marked, pictures, fits, far, cut, alike) == ("7", "true", "true", "true", "false", "false", "false")
    assert background == {"light": "rgb(246, 247, 249)", "dark": "rgb(18, 21, 26)"}[theme]
    assert [line for line in done.stderr.splitlines() if "CONSOLE" in line] == []


def test_the_command(tmp_path, capsys):
    import json

    for name, value in (("plain", 30.0), ("cwd", 33.0)):
        log = tmp_path / name / "20260101" / "vis_data" / "scalars.json"
        log.parent.mkdir(parents=True)
        log.write_text(
            "\n".join(map(json.dumps, [dict(lr=0.1, loss=1.0, step=10, time=0.1), dict(mIoU=value, mAcc=50.0, step=0)]))
        )
    out = tmp_path / "report.html"
    runs = [f"plain={tmp_path / 'plain'}", str(tmp_path / "cwd")]
    assert main(["report", *runs, "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "With one seed, cwd improves mIoU by 3.00 compared with the plain student." in said and str(out) in said
    assert "No teacher&#39;s run was named" in without_scripts(out)
    refused(capsys, ["report", *runs, "--metric", "mAp"], "not every run has the metric 'mAp'; all have mIoU, mAcc")
    refused(capsys, ["report", str(tmp_path / "cwd")], "which run is the plain student")
