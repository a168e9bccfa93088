"""``kdgraft bench`` as a whole, in plain PyTorch: real trainings in real processes, their files, and what is left after a kill."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest

from kdgraft.cli import main
from kdgraft_bench.records import FILE, read_rows
from support.commands import refused
from support.killing import ended, started

TASKS = """
import time

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from kdgraft.plain import Task

X = torch.sin(torch.arange(1024.0)).reshape(256, 4)
Y = (X.sum(1) > 0).long()
WAIT = {wait}


def accuracy(model):
    time.sleep(WAIT)
    right = (model(X[:128]).argmax(1) == Y[:128]).float().mean()
    return {{"val": right, "accuracy": (model(X[128:]).argmax(1) == Y[128:]).float().mean()}}


def net(width, epochs=4):
    model = nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 2))
    loader = DataLoader(TensorDataset(X[:128], Y[:128]), batch_size=16, shuffle=True)
    tested = [(X[128:], Y[128:])]
    return Task(model, loader, F.cross_entropy, epochs, evaluate=accuracy, tested=tested)


def by_hand(width, teacher):
    assert torch.load(teacher, weights_only=True)["0.weight"].shape == (32, 4)
    return net(width)


def broken(width):
    raise ValueError("no such net")
"""
PLAN = """
host = "torch"
seeds = [0, 1]
processes = 2
out = "out"

[teacher]
config = "tasks.py:net"
options = { width = 32 }

[students.small]
config = "tasks.py:net"
options = { width = 3 }

[students.tiny]
config = "tasks.py:net"
options = { width = 2 }

[methods.kd]
terms = [{ type = "SoftTargets", temperature = 2 }]

[methods.hint]
terms = [{ type = "Hint", tap = "0" }]
"""
TINY = """[students.tiny]
config = "tasks.py:net"
options = { width = 2 }

"""
ONE_STUDENT = PLAN.replace(TINY, "")


def written(folder, wait=0.0, plan=PLAN):
    (folder / "tasks.py").write_text(TASKS.format(wait=wait))
    (folder / "mine.toml").write_text(plan)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    written(folder)
    return folder / "out", ended(started(folder, "bench", "mine.toml"))


def test_every_run_has_a_row(finished):
    out, _ = finished
    rows = read_rows(out)
    students = [("small", method) for method in ("plain", "kd", "hint")] + [
        ("tiny", m) for m in ("plain", "kd", "hint")
    ]
    assert {key[:2] for key in rows} == {("teacher", "teacher"), *students}
    assert {key[2] for key in rows} == {0, 1} and len(rows) == 14
    assert len((out / FILE).read_text().splitlines()) == 14


def test_the_figures_are_those_of_accuracy_calibration_agreement_and_costs(finished):
    out, _ = finished
    with (out / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    found = {(row["model"], row["method"], row["seed"], row["metric"]): float(row["value"]) for row in rows}
    for method in ("plain", "kd", "hint"):
        for metric in ("accuracy", "calibration error", "agreement with the teacher"):
            assert 0 <= found["small", method, "0", metric] <= 1
    assert found["small", "kd", "0", "parameters (k)"] == (3 * 5 + 2 * 4) / 1e3
    assert found["teacher", "teacher", "0", "MFLOPs"] == pytest.approx(2 * (4 * 32 + 32 * 2) / 1e6)
    assert found["small", "plain", "0", "size (MiB)"] == pytest.approx((3 * 5 + 2 * 4) * 4 / 2**20)
    assert found["small", "kd", "1", "step (ms)"] > 0 and found["small", "kd", "1", "latency at batch 16 (ms)"] > 0


def test_the_rows_hold_what_the_runs_measured(finished):
    out, _ = finished
    for (student, method, seed), row in read_rows(out).items():
        record = json.loads((out / row.folder / "finished.json").read_text())
        assert row.metrics["accuracy"] == record["model"]["metrics"]["accuracy"], (student, method, seed)
        assert row.validated == {"accuracy": record["model"]["metrics"]["val"]}


@pytest.mark.slow
def test_the_rows_of_embedded_data_have_figures_of_the_validation_split_too(tmp_path, monkeypatch):
    folder = tmp_path / "core"
    said = ["core", "--iterations", "10", "--seeds", "0", "--methods", "at", "--out", str(folder)]
    assert main(["bench", *said]) == 0
    rows = read_rows(folder)
    assert len({row.validated["accuracy"] for row in rows.values()}) > 1
    assert all(row.validated.keys() == {"accuracy"} for row in rows.values())
    assert any(row.validated["accuracy"] != row.metrics["accuracy"] for row in rows.values())
    assert "by validation" in (folder / "report.html").read_text()


def test_another_split_is_tested_again_and_nothing_is_trained(finished, tmp_path, monkeypatch):
    shutil.copytree(finished[0].parent, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    out = Path("out")
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.pt")}
    assert main(["bench", "mine.toml", "--split", "val", "--seeds", "0", "--processes", "1"]) == 0
    assert before and {path: path.stat().st_mtime_ns for path in out.rglob("*.pt")} == before
    again = [row for (_, _, seed), row in read_rows(out).items() if seed == 0]
    assert len(again) == 7
    assert all(row.split == "val" and row.validated == {} for row in again)  # the tested split is that of validation
    assert "val split" in (out / "table.md").read_text()


def test_tables_and_report_are_written(finished):
    out, said = finished
    table = (out / "table.md").read_text()
    assert "small: net" in table and "tiny: net" in table and "of the gap" in table
    page = (out / "report.html").read_text()
    for text in ("small: kd", "tiny: plain", "accuracy against latency", "What these classes are taken for"):
        assert text in page, text
    assert "report in out/report.html" in said


def test_a_second_call_trains_nothing_and_keeps_the_costs(finished, capfd, monkeypatch):
    out, _ = finished
    before = (out / FILE).read_bytes()
    costs = (out / "costs.json").read_bytes()
    monkeypatch.chdir(out.parent)
    assert main(["bench", "mine.toml", "--dry-run"]) == 0
    assert "0 of 14 runs to do" in capfd.readouterr().out
    assert main(["bench", "mine.toml"]) == 0
    assert (out / FILE).read_bytes() == before
    assert (out / "costs.json").read_bytes() == costs


def test_a_dry_run_says_what_is_missing_and_how_long_it_takes(finished, capfd, monkeypatch):
    out, _ = finished
    monkeypatch.chdir(out.parent)
    assert main(["bench", "mine.toml", "--seeds", "0", "1", "2", "--dry-run"]) == 0
    said = capfd.readouterr().out
    assert "7 of 21 runs to do" in said and "in 2 processes side by side" in said


@pytest.mark.slow
def test_a_dry_run_of_a_new_benchmark_times_some_steps(tmp_path, capfd, monkeypatch):
    written(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert main(["bench", "mine.toml", "--dry-run", "--processes", "1"]) == 0
    said = capfd.readouterr().out
    assert "14 of 14 runs to do" in said and said.count("s and its evaluations") == 7
    assert not list((tmp_path / "out").rglob("*.pth")) and not read_rows(tmp_path / "out")


def test_a_dry_run_says_which_run_cannot_be_trained(tmp_path, capfd, monkeypatch):
    lost = '\n[peers.lost]\nconfig = "tasks.py:broken"\noptions = { width = 3 }\n'
    written(tmp_path, plan=PLAN.replace('tap = "0"', 'tap = "no"') + lost)
    monkeypatch.chdir(tmp_path)
    assert main(["bench", "mine.toml", "--dry-run", "--processes", "1"]) == 2
    said = capfd.readouterr()
    assert "The peer small-lost does not run: ValueError: no such net" in said.out
    assert "small-hint does not run: WiringError: hint: the student has no module 'no'" in said.out
    assert "small-hint cannot be trained; see " in said.err and "forecast.log" in said.err


@pytest.mark.slow
def test_a_teacher_that_is_trained_already_is_tested_and_teaches(finished, tmp_path, capfd, monkeypatch):
    out = finished[0]
    shutil.copy(out / "runs/teacher/seed0/student.pth", tmp_path / "large.pth")
    plan = ONE_STUDENT.replace("options = { width = 32 }", 'options = { width = 32 }\ncheckpoint = "large.pth"')
    written(tmp_path, plan=plan.replace("seeds = [0, 1]", "seeds = [0]"))
    monkeypatch.chdir(tmp_path)
    assert main(["bench", "mine.toml", "--methods", "kd"]) == 0
    ours, theirs = read_rows(Path("out")), read_rows(out)
    for key in (("teacher", "teacher", 0), ("small", "kd", 0)):
        assert ours[key].metrics == theirs[key].metrics  # the same training, as the weights are the same
    assert not (tmp_path / "out/runs/teacher/seed0/student.pth").exists()
    (tmp_path / "large.pth").unlink()
    refused(capfd, ["bench", "mine.toml"], "teacher: there is no checkpoint large.pth")


def test_comparing_a_result_with_itself_shows_nothing(finished, capfd):
    out, _ = finished
    assert main(["bench", "--compare", str(out), str(out)]) == 0
    assert "nothing got worse" in capfd.readouterr().out


def test_one_failure_stops_only_those_that_need_it(tmp_path, monkeypatch, capfd):
    written(tmp_path, plan=ONE_STUDENT.replace("[0, 1]", "[0]").replace('tap = "0"', 'tap = "no"'))
    monkeypatch.chdir(tmp_path)
    assert main(["bench", "mine.toml", "--processes", "1"]) == 2
    said = capfd.readouterr()
    assert "small-hint (seed 0) failed" in said.err
    assert said.err.strip().splitlines()[-1].startswith("kdgraft: error: ") and "log.txt" in said.err
    assert {key[:2] for key in read_rows(tmp_path / "out")} == {
        ("teacher", "teacher"),
        ("small", "plain"),
        ("small", "kd"),
    }


@pytest.mark.slow
def test_weights_are_tuned_first_and_peers_that_do_not_run_are_listed(tmp_path, monkeypatch, capfd):
    head, _, _ = PLAN.partition("[students.tiny]")
    peers = """
[methods.kd]
terms = ["SoftTargets"]

[peers.by_hand]
config = "tasks.py:by_hand"
options = { width = 3, teacher = "{teacher.weights}" }

[peers.lost]
config = "tasks.py:broken"
options = { width = 3 }
"""
    written(tmp_path, plan=head.replace("seeds = [0, 1]", "seeds = [0]") + peers)
    monkeypatch.chdir(tmp_path)
    assert main(["bench", "mine.toml", "--tune", "2"]) == 0
    found = json.loads((tmp_path / "out/tuned.json").read_text())
    values = {float(factor): value for factor, value in found["values"]["kd"].items()}
    assert set(values) == {1.0, 2.0} and found["factors"]["kd"] == max(values, key=values.get)
    page, said = (tmp_path / "out/report.html").read_text(), capfd.readouterr().out
    assert f"kd × {found['factors']['kd']:g}" in page
    lost = "The peer small-lost (seed 0) does not run: ValueError: no such net"
    assert lost in said and lost in page and "by_hand" in (tmp_path / "out/table.md").read_text()
    # Of tuning teacher and two candidates; of the table teacher, plain and distilled student, and a peer.
    assert len(list((tmp_path / "out").rglob("finished.json"))) == 3 + 4
