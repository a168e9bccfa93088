"""Charts of classes: which ones a method gains and loses on, and what teacher, plain and distilled student take them for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import altair as alt
import numpy as np
import pandas as pd

from ..decisions import Decisions, confusion, recalls
from .gains import Gain, taken
from .reading import PLAIN, TEACHER, Run

SHOWN = 3
"""The classes that gained most and the classes that lost most that are shown."""
MOST = 200
"""The number of classes above which they are no classes that one looks at, but a vocabulary."""
OTHER, BETWEEN = "other", " · "
NAME = 14
"""The characters of a class's name that a row of a map has room for."""


def confusion_charts(runs: Sequence[Run], found: Sequence[Gain], height: int) -> dict[str, Any]:
    """Return the charts by title; none where the runs have no decisions.

    Args:
        runs: the runs.
        found: the gains, the best first: the charts are about that one.
        height: the height of a chart.
    """
    best = taken(found).label
    (plain,) = {run.plain for run in runs if run.label == best}
    decided = {label: _decisions(runs, label) for label in (TEACHER, plain, best)}
    if not decided[plain] or not decided[best] or len(decided[plain][0].names) > MOST:
        return {}
    names = decided[plain][0].names
    change = _mean_recall(decided[best]) - _mean_recall(decided[plain])
    order = [int(one) for one in np.argsort(-change) if np.isfinite(change[one])]
    chosen = order if len(order) <= 2 * SHOWN else [*order[:SHOWN], *order[-SHOWN:]]
    rows = [{"class": names[one], "change": float(change[one])} for one in chosen]
    words = {TEACHER: TEACHER, plain: PLAIN, best: "distilled"}
    maps = [
        {
            "model": words[label],
            "class": names[row],
            "taken for": [*(names[one] for one in chosen), OTHER][column],
            "share": share,
        }
        for label, all_of in decided.items()
        if all_of
        for row, shares in zip(chosen, _mean_confusion(all_of, chosen), strict=True)
        for column, share in enumerate(shares.tolist())
    ]
    return {
        _title(best, [float(change[one]) for one in chosen]): _change_chart(rows, best, height),
        "What these classes are taken for": _maps(maps, [names[one] for one in chosen], height),
    }


def _title(label: str, changes: Sequence[float]) -> str:
    """Return the title of the chart of changes, which says no more than it shows."""
    gains, losses = any(value > 0 for value in changes), any(value < 0 for value in changes)
    said = (
        "gains and loses most"
        if gains and losses
        else "gains most"
        if gains
        else "loses most"
        if losses
        else "changes nothing"
    )
    return f"Classes on which {label} {said}"


def _decisions(runs: Sequence[Run], label: str) -> list[Decisions]:
    return [Decisions.read(run.decisions) for run in runs if run.label == label and run.decisions is not None]


def _mean_recall(decided: Sequence[Decisions]) -> Any:
    return np.mean([recalls(one) for one in decided], axis=0)


def _mean_confusion(decided: Sequence[Decisions], chosen: Sequence[int]) -> Any:
    return np.mean([confusion(one, chosen) for one in decided], axis=0)


def _change_chart(rows: list[dict[str, Any]], label: str, height: int) -> Any:
    title = f"change of the share found, {label} against plain"
    return (
        alt.Chart(pd.DataFrame(rows))
        .mark_bar()
        .encode(
            x=alt.X("change:Q", title=title, axis=alt.Axis(format="+.0%")),
            y=alt.Y("class:N", sort=[row["class"] for row in rows], title=None),
            color=alt.condition(alt.datum.change > 0, alt.value("#3a9d5d"), alt.value("#d1495b")),
            tooltip=["class:N", alt.Tooltip("change:Q", format="+.1%")],
        )
        .properties(height=height)
    )


def _maps(rows: list[dict[str, Any]], order: list[str], height: int) -> Any:
    """Return a map of shares for each model, one below the other so that it fits a phone."""
    frame = pd.DataFrame(rows)
    models = list(dict.fromkeys(frame["model"]))
    frame["row"] = frame["class"] + BETWEEN + frame["model"]
    parts = f"split(datum.label, '{BETWEEN}')"  # a long name must not hide the model
    shown = f"truncate({parts}[0], {NAME}, 'center') + '{BETWEEN}' + {parts}[1]"
    return (
        alt.Chart(frame)
        .mark_rect()
        .encode(
            x=alt.X("taken for:N", sort=[*order, OTHER], title="taken for", axis=alt.Axis(labelAngle=-40)),
            y=alt.Y(
                "row:N",
                sort=[f"{one}{BETWEEN}{model}" for one in order for model in models],
                title=None,
                axis=alt.Axis(labelExpr=shown, labelLimit=150),
            ),
            color=alt.Color("share:Q", scale=alt.Scale(scheme="blues", domain=[0, 1]), legend=None),
            tooltip=["model:N", "class:N", "taken for:N", alt.Tooltip("share:Q", format=".1%")],
        )
        .properties(height=max(height, 18 * len(order) * len(models)))
    )
