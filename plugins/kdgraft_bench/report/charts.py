"""The charts of a report, as Vega-Lite specifications that are drawn in the page."""

from __future__ import annotations

import math
import statistics
import textwrap
from collections.abc import Sequence
from typing import Any

import altair as alt
import pandas as pd

from ..results import lower_is_better
from .confusions import confusion_charts
from .gains import Gain, labels, methods, step_cost
from .reading import PARAMETERS, TEACHER, Points, Run

TEACHERS, PLAINS = "#8a8f98", "#b98a1e"
COLOURS = ("#2f7ed8", "#d1495b", "#3a9d5d", "#8e5bd0", "#e07b39", "#1fa3a3", "#c2529b", "#6b8e23", "#5c6bc0", "#a1673a")
"""Readable on white and on black."""
HEIGHT = 280
TITLE = 31
"""The characters of a line of an axis title: 200 pixels, which a chart on a phone of 390 leaves beside its labels."""
LEGEND = 18
"""The characters of a name that a legend of two columns has room for."""
_TEXT = "currentColor"  # of the page, in both of its themes

Spec = dict[str, Any]
Drawing = alt.Chart | alt.LayerChart | alt.FacetChart | alt.HConcatChart


def charts(runs: Sequence[Run], found: Sequence[Gain], metric: str) -> dict[str, Spec]:
    """Return the charts for which the runs have data, by title.

    Args:
        runs: the runs.
        found: the gains of the methods.
        metric: the metric of the report.
    """
    made = {
        f"Gain in {metric} over the plain student": _gain_chart(runs, found, metric),
        **_use_charts(runs, metric),
        f"{metric} against the cost of training": _cost_chart(runs, metric),
        f"{metric} on the validation data, during training": _validation_chart(runs, metric),
        "The distillation terms, as they enter the loss": _terms_chart(runs),
        **confusion_charts(runs, found, HEIGHT),
    }
    return {title: _finished(chart) for title, chart in made.items() if chart is not None}


def _colour(runs: Sequence[Run], *, legend: bool = True) -> alt.Color:
    there = labels(runs)
    neutral = {run.plain: PLAINS for run in runs} | {TEACHER: TEACHERS}
    own = iter(COLOURS[n % len(COLOURS)] for n in range(len(there)))
    scale = alt.Scale(domain=there, range=[neutral[label] if label in neutral else next(own) for label in there])
    return alt.Color("method:N", scale=scale, legend=_legend(there) if legend else None)


def _legend(names: Sequence[str]) -> alt.Legend:
    """Return a legend of two columns, or of one where two of these names do not fit side by side on a phone."""
    return alt.Legend(title=None, columns=2 if max(map(len, names)) <= LEGEND else 1)


def _gain_chart(runs: Sequence[Run], found: Sequence[Gain], metric: str) -> Drawing:
    rows = [
        dict(method=gain.label, gain=gain.mean, low=low, high=high)
        for gain in found
        for low, high in [gain.interval if math.isfinite(gain.interval[0]) else (gain.mean, gain.mean)]
    ]
    each = [dict(method=gain.label, gain=value) for gain in found for value in gain.differences]
    order = [gain.label for gain in found]
    axis = alt.Y("method:N", sort=order, title=None)
    colour = _colour(runs, legend=False)
    base = alt.Chart(pd.DataFrame(rows))
    bars = base.mark_rule(strokeWidth=3).encode(
        x=alt.X("low:Q", title=f"gain in {metric}", scale=alt.Scale(padding=16), axis=alt.Axis(tickCount=5)),
        x2="high:Q",
        y=axis,
        color=colour,
    )
    seeds = alt.Chart(pd.DataFrame(each)).mark_point(size=36, opacity=0.6).encode(x="gain:Q", y=axis, color=colour)
    means = base.mark_point(filled=True, size=110, opacity=1).encode(
        x="gain:Q", y=axis, color=colour, tooltip=["method:N", "gain:Q", "low:Q", "high:Q"]
    )
    zero = alt.Chart(pd.DataFrame([dict(gain=0.0)])).mark_rule(color=_TEXT, opacity=0.6).encode(x="gain:Q")
    return alt.layer(zero, bars, seeds, means).properties(height=max(34 * len(order) + 20, 90))


def _means(runs: Sequence[Run], metric: str) -> list[dict[str, Any]]:
    found = []
    for label in labels(runs):
        values = [run.metrics[metric] for run in runs if run.label == label and metric in run.metrics]
        if values:
            sd = statistics.stdev(values) if len(values) > 1 else 0.0
            mean = statistics.fmean(values)
            found.append(dict(method=label, value=mean, low=mean - sd, high=mean + sd))
    return found


def _scatter(runs: Sequence[Run], rows: list[dict[str, Any]], metric: str, x: alt.X) -> Drawing:
    y = alt.Y("value:Q", title=metric, scale=alt.Scale(zero=False))
    base = alt.Chart(pd.DataFrame(rows))
    error = base.mark_rule(opacity=0.7, strokeWidth=2).encode(
        x=x, y=alt.Y("low:Q", title=metric, scale=alt.Scale(zero=False)), y2="high:Q", color=_colour(runs)
    )
    points = base.mark_point(filled=True, size=110, opacity=1).encode(
        x=x, y=y, color=_colour(runs), tooltip=list(rows[0])
    )
    return alt.layer(error, points).properties(height=HEIGHT)


def _use_charts(runs: Sequence[Run], metric: str) -> dict[str, Drawing | None]:
    """Return the charts of a metric against what a model costs in use, by title."""
    latencies = dict.fromkeys(name for run in runs for name in run.metrics if name.startswith("latency at batch "))
    first = next(iter(latencies), None)
    found = {} if first is None else {f"{metric} against latency": _use_chart(runs, metric, first)}
    return found | {f"{metric} against size": _use_chart(runs, metric, PARAMETERS)}


def _use_chart(runs: Sequence[Run], metric: str, cost: str) -> Drawing | None:
    """Return a chart of a metric against a cost, with the Pareto front: the models that none beats in both."""
    costs = {run.label: run.metrics[cost] for run in runs if cost in run.metrics}
    rows = [row | {cost: costs[row["method"]]} for row in _means(runs, metric) if row["method"] in costs]
    if len(set(costs.values())) < 2 or len(rows) < 2:
        return None
    x = alt.X(f"{cost}:Q", scale=alt.Scale(zero=False, padding=24))
    best = pareto([(row[cost], row["value"]) for row in rows], lower=lower_is_better(metric))
    front = (
        alt.Chart(pd.DataFrame([{cost: at, "value": value} for at, value in best]))
        .mark_line(interpolate="step-after", strokeDash=[4, 4], color=_TEXT, opacity=0.5)
        .encode(x=x, y=alt.Y("value:Q", title=metric, scale=alt.Scale(zero=False)))
    )
    return alt.layer(front, _scatter(runs, rows, metric, x)).properties(height=HEIGHT)


def pareto(points: Sequence[tuple[float, float]], *, lower: bool = False) -> list[tuple[float, float]]:
    """Return the points (cost, value) that no other beats: none is at most as costly and better, in the order of their costs.

    Args:
        points: the points.
        lower: true if a lower value is better.
    """
    found: list[tuple[float, float]] = []
    for cost, value in sorted(points, key=lambda point: (point[0], point[1] if lower else -point[1])):
        if not found or (value < found[-1][1] if lower else value > found[-1][1]):
            found.append((cost, value))
    return found


def _cost_chart(runs: Sequence[Run], metric: str) -> Drawing | None:
    title = "training step (× plain student)"
    rows = [row | {"step": step_cost(runs, row["method"])} for row in _means(runs, metric) if row["method"] != TEACHER]
    rows = [row for row in rows if math.isfinite(row["step"])]
    return (
        _scatter(runs, rows, metric, alt.X("step:Q", title=title, scale=alt.Scale(zero=False, padding=24)))
        if len(rows) > 1
        else None
    )


def _validation_chart(runs: Sequence[Run], metric: str) -> Drawing | None:
    found = [(run.label, run.validation[metric]) for run in runs if len(run.validation.get(metric, ())) > 1]
    rows = _averaged(found, "method")
    if not rows:
        return None
    return (
        alt.Chart(pd.DataFrame(rows))
        .mark_line(point=alt.OverlayMarkDef(size=24))
        .encode(
            x=alt.X("iteration:Q", title=runs[0].counted),
            y=alt.Y("value:Q", title=metric, scale=alt.Scale(zero=False)),
            color=_colour(runs),
            tooltip=["method:N", "iteration:Q", "value:Q"],
        )
        .properties(height=HEIGHT)
    )


def _averaged(found: Sequence[tuple[str, Points]], column: str) -> list[dict[str, Any]]:
    """Return the rows of the mean over seeds at each iteration."""
    at: dict[tuple[str, int], list[float]] = {}
    for label, points in found:
        for step, value in points:
            at.setdefault((label, step), []).append(value)
    return [
        {column: label, "iteration": step, "value": statistics.fmean(values)} for (label, step), values in at.items()
    ]


def _terms_chart(runs: Sequence[Run]) -> Drawing | None:
    found = [
        (f"{run.label}: {name.removeprefix('distill.').removesuffix('.loss')}", points)
        for run in runs
        if run.label in methods(runs)
        for name, points in run.losses.items()
        if name.startswith("distill.") and name.endswith(".loss")
    ]
    rows = _averaged(found, "term")
    if not rows:
        return None
    # A critic's term may be negative.
    positive = all(row["value"] > 0 for row in rows)
    scale = alt.Scale(type="log") if positive else alt.Scale(type="symlog", constant=0.01)
    names = list(dict.fromkeys(row["term"] for row in rows))
    colours = alt.Scale(range=[*COLOURS], domain=names)
    return (
        alt.Chart(pd.DataFrame(rows))
        .mark_line()
        .encode(
            x=alt.X("iteration:Q", title=runs[0].counted),
            y=alt.Y("value:Q", title="loss × weight", scale=scale),
            color=alt.Color("term:N", scale=colours, legend=_legend(names)),
            tooltip=["term:N", "iteration:Q", "value:Q"],
        )
        .properties(height=HEIGHT)
    )


def _finished(chart: Drawing) -> Spec:
    """Return the specification of a chart that is as wide as its place and takes the page's colours."""
    ink = dict(
        labelColor=_TEXT, titleColor=_TEXT, domainColor=_TEXT, tickColor=_TEXT, gridColor=_TEXT, gridOpacity=0.15
    )
    axis = dict(**ink, labelLimit=110, labelSeparation=6)
    legend = dict(labelColor=_TEXT, titleColor=_TEXT, orient="bottom", labelLimit=230, symbolOpacity=1)
    shown = chart.properties(width="container", background="transparent").configure(font="system-ui, sans-serif")
    shown = shown.configure_axis(**axis).configure_legend(**legend).configure_view(strokeOpacity=0)
    told: Spec = _in_lines(shown.to_dict())
    return told


def _in_lines(part: Any) -> Any:
    """Return a part of a specification with the titles of its axes in lines that fit a phone, beside the labels of the other axis."""
    if isinstance(part, list):
        return [_in_lines(one) for one in part]
    if not isinstance(part, dict):
        return part
    made = {key: _in_lines(value) for key, value in part.items() if key != "datasets"}
    if "field" in made and isinstance(made.get("title"), str) and len(made["title"]) > TITLE:
        made["title"] = textwrap.wrap(made["title"], TITLE, break_on_hyphens=False)
    return made | {key: part[key] for key in ("datasets",) if key in part}
