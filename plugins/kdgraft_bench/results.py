"""Result files, and tables and figures computed from them, for every task."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from kdgraft.errors import DistillError


class Result(NamedTuple):
    """One figure of one trained model; a row of ``results.csv``."""

    task: str
    dataset: str
    model: str
    method: str
    seed: int
    metric: str
    value: float


def write_results(results: Iterable[Result], path: str | Path) -> Path:
    """Write ``results.csv`` with the columns ``task,dataset,model,method,seed,metric,value``."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(list(results), columns=list(Result._fields)).to_csv(path, index=False)
    return path


def read_results(path: str | Path) -> list[Result]:
    """Read a file of :func:`write_results`."""
    try:
        frame = pd.read_csv(path)
    except ValueError as error:  # of pandas: empty, or no table
        raise DistillError(f"cannot read {path}: {error}") from None
    if list(frame.columns) != list(Result._fields):
        raise DistillError(f"{path} has columns {list(frame.columns)}, not {list(Result._fields)}")
    return [Result(*row) for row in frame.itertuples(index=False)]


def mean_sd(values: Sequence[float], digits: int = 3) -> str:
    """Format mean and sample standard deviation as ``"0.512 ± 0.004"``, and a single value without ±."""
    if len(values) < 2:
        return f"{values[0]:.{digits}f}" if values else "–"
    return f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"


def gap_closed(results: Sequence[Result], metric: str, method: str) -> float:
    """Return the share of the gap from plain student to teacher that a method closes, from the means over seeds.

    The share is NaN if there is no gap, that is, if the teacher is not better than the plain student, or has no such figure.
    """

    def mean(of: str) -> float:
        found = [r.value for r in results if r.method == of and r.metric == metric]
        return statistics.mean(found) if found else math.nan

    return share_closed(mean(method), mean("plain"), mean("teacher"), metric)


def share_closed(value: float, plain: float, teacher: float, metric: str) -> float:
    """Return the share of the gap from plain student to teacher; NaN if the teacher is not better, or is NaN."""
    gap = plain - teacher if lower_is_better(metric) else teacher - plain
    return (value - plain) / (teacher - plain) if gap > 0 else math.nan


def lower_is_better(metric: str) -> bool:
    """Return true for metrics that decrease as a model gets better."""
    return metric.endswith(("perplexity", "loss", "error"))


def summary(results: Sequence[Result], metrics: Mapping[str, int]) -> list[dict[str, str]]:
    """Return a row for each method, with mean ± sd over seeds of each metric (name -> digits)."""
    rows = []
    for method in dict.fromkeys(r.method for r in results):
        mine = [r for r in results if r.method == method]
        row = {"method": method, "model": mine[0].model}
        for metric, digits in metrics.items():
            row[metric] = mean_sd([r.value for r in mine if r.metric == metric], digits)
        rows.append(row)
    return rows


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """Format the rows as a Markdown table."""
    head = list(rows[0])
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(str(row[key]) for key in head) + " |" for row in rows])
