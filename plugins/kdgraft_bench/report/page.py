"""The page of a report: one file that needs no network."""

from __future__ import annotations

import base64
import difflib
import io
import json
import math
from collections.abc import Callable, Sequence
from functools import cache
from html import escape
from pathlib import Path
from typing import Any

import vl_convert
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from kdgraft import __version__
from kdgraft.files import written_whole

from ..results import lower_is_better, mean_sd
from .charts import charts
from .gains import Gain, by_validation, digits, gains, labels, methods, number, percent, verdict
from .reading import TEACHER, Run, is_cost
from .runs import main_metric, same_schedule

VEGA_LITE = "6.4"
"""The version for which altair writes specifications, without its last number, as vl-convert names it."""


def write_report(
    runs: Sequence[Run],
    path: str | Path,
    *,
    metric: str | None = None,
    pictures: Sequence[Path] = (),
    command: str = "",
    notes: Sequence[str] = (),
) -> str:
    """Write the page, and return its verdict.

    Args:
        runs: a plain student, distilled ones, and perhaps their teacher; see :func:`~kdgraft_bench.report.read_runs`.
        path: the HTML file.
        metric: the metric that the report is about; by default the best known one that all students have.
        pictures: files of pictures to embed.
        command: the command that made it, for the page.
        notes: further sentences about the runs.

    Raises:
        DistillError: the runs have no metric in common, or no seed.
    """
    metric = main_metric(runs, metric)
    found = gains(runs, metric)
    said = verdict(found, metric)
    environment = Environment(
        loader=PackageLoader(__package__, "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("page.html.jinja").render(
        verdict=said,
        metric=metric,
        direction="lower is better" if lower_is_better(metric) else "higher is better",
        gains=found,
        by_validation=by_validation(found),
        number=_of_column(found),
        percent=percent,
        finite=math.isfinite,
        notes=[*_notes(runs, metric), *notes],
        charts=charts(runs, found, metric),
        pictures=[(picture.stem, _embedded(picture)) for picture in pictures],
        table=_table(runs),
        runs=runs,
        configs=_configs(runs),
        command=command,
        version=__version__,
        bundle=Markup(_bundle()),
        encoded=lambda spec: Markup(json.dumps(spec).replace("</", "<\\/")),
    )
    with written_whole(Path(path)) as part:
        part.write_text(page, encoding="utf-8")
    return said


@cache
def _bundle() -> str:
    """Return Vega, Vega-Lite and Vega-Embed as one script."""
    return str(vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", vl_version=VEGA_LITE)).replace(
        "</script", "<\\/script"
    )


def _embedded(picture: Path) -> str:
    """Return a picture as a JPEG in the page, at most 1600 pixels wide."""
    with Image.open(picture) as opened:
        image = opened.convert("RGB")
    image.thumbnail((1600, 16000))
    written = io.BytesIO()
    image.save(written, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(written.getvalue()).decode()}"


def _notes(runs: Sequence[Run], metric: str) -> list[str]:
    """Return what a reader has to know before believing the figures."""
    students = [run for run in runs if run.label != TEACHER]
    notes = [f"{metric} is that of the end of each training; nothing was chosen by it."]
    if len({run.seed for run in students}) < 3:
        notes.append("Fewer than three seeds: the spread between seeds is not known well.")
    if not same_schedule(runs):
        notes.append(
            "The students did not train for equally many iterations, so that the comparison is not a fair one."
        )
    if TEACHER not in labels(runs):
        notes.append("No teacher's run was named, so that no gap is told.")
    elif all(math.isnan(gain.closed) for gain in gains(runs, metric)):
        notes.append("The teacher is not better than the plain student: there is no gap to close.")
    if len(methods(runs)) > 1 and not by_validation(gains(runs, metric)):
        notes.append(
            f"The best of {len(methods(runs))} methods was picked by these very figures; expect a little less of it elsewhere."
        )
    return notes


def _of_column(found: Sequence[Gain]) -> Callable[[float], str]:
    """Return a function that formats gains, all with as many decimals as the largest gain or limit of an interval."""
    column = [one for gain in found for one in (gain.mean, *gain.interval, *gain.validated)]
    return lambda value: number(value, column)


def _table(runs: Sequence[Run]) -> tuple[list[str], list[list[str]]]:
    """Return the head and the rows of the table: mean ± sd over seeds of each metric, costs at the end."""
    there = list(dict.fromkeys(name for run in runs for name in run.metrics))
    names = sorted(there, key=is_cost)  # a stable sort

    def cell(mine: Sequence[Run], name: str) -> str:
        values = [run.metrics[name] for run in mine if name in run.metrics]
        once = is_cost(name) and len(set(values)) == 1  # measured once for all seeds
        return _cell(values[:1] if once else values)

    rows = []
    for label in labels(runs):
        mine = [run for run in runs if run.label == label]
        rows.append([label, mine[0].model, *(cell(mine, name) for name in names)])
    return ["method", "model", *names], rows


def _cell(values: Sequence[float]) -> str:
    return mean_sd(values, digits(values)).replace("-", "−")


def _configs(runs: Sequence[Run]) -> list[tuple[str, Markup]]:
    """Return the config of each plain student, and how that of each of its methods differs from it, as HTML."""
    first = {run.label: run.config for run in reversed(runs)}
    baselines = {run.label: run.plain for run in runs}
    plains = [label for label in labels(runs) if label == baselines[label] and first[label]]
    found = [(f"Config of {label}", Markup(escape(first[label]))) for label in plains]
    for label in methods(runs):
        plain = baselines[label]
        if first[plain] and first[label] and first[label] != first[plain]:
            lines = difflib.unified_diff(
                first[plain].splitlines(), first[label].splitlines(), plain, label, lineterm="", n=2
            )
            found.append((f"{label} against {plain}", Markup("\n".join(map(_marked, lines)))))
    return found


def _marked(line: str) -> str:
    kind: Any = {"+": "ins", "-": "del"}.get(line[:1])
    text = escape(line)
    return f"<{kind}>{text}</{kind}>" if kind else text
