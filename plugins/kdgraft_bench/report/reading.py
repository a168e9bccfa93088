"""Runs as a report needs them, and the reading of the files that they are made of."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kdgraft.errors import DistillError

Points = Sequence[tuple[int, float]]
"""(iteration, value), in the order of the iterations."""

TEACHER, PLAIN = "teacher", "plain"
"""The labels of the runs that the others are compared with."""
PARAMETERS, ITERATION, MEMORY = "parameters (k)", "iteration (ms)", "memory (MiB)"
COSTS = (PARAMETERS, "MFLOPs", "size (MiB)", "step (ms)", "step memory (MiB)", ITERATION, MEMORY)
"""What a model costs; every other metric says how good it is."""


def is_cost(metric: str) -> bool:
    """Return true for a figure that says what a model costs; the others say how good it is."""
    return metric in COSTS or metric.startswith(("latency at batch ", "samples/s at batch "))


@dataclass(frozen=True)
class Run:
    """A finished training.

    Attributes:
        label: the name of its method; ``"teacher"`` and ``"plain"`` have these very names.
        seed: its seed, or its place among the runs of its label.
        folder: where it was read from.
        model: the name of the model.
        metrics: name -> value at the end of the training, costs (:data:`COSTS`) among them.
        losses: name -> points of the training.
        validation: metric -> points, of the evaluations during the training.
        config: the text of its config; empty if there is none.
        student: the name of the student, where there are several, each with a plain one of its own; its labels start with it.
        decisions: the file with its decisions on the tested items, if there is one.
        counted: what the places of its points count, ``"iteration"`` or ``"epoch"``.
        validated: metrics on a validation split that is not the tested one; empty where there is none.
    """

    label: str
    seed: int
    folder: Path
    model: str
    metrics: Mapping[str, float]
    losses: Mapping[str, Points] = field(default_factory=dict)
    validation: Mapping[str, Points] = field(default_factory=dict)
    config: str = ""
    student: str = ""
    decisions: Path | None = None
    counted: str = "iteration"
    validated: Mapping[str, float] = field(default_factory=dict)

    @property
    def plain(self) -> str:
        """The label of the plain student that it is compared with."""
        return f"{self.student}: {PLAIN}" if self.student else PLAIN


def read_json(path: Path) -> Any:
    """Return the content of a file; a :class:`DistillError` says that it is damaged."""
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise DistillError(f"{path} is damaged: {error}") from None


def records(log: Path) -> Iterator[dict[str, Any]]:
    """Yield the records of a log, a line each; the last line of a run that was killed may be cut off."""
    lines = log.read_text(errors="replace").splitlines()
    for number, line in enumerate(lines, 1):
        try:
            yield json.loads(line)
        except ValueError as error:
            if number < len(lines):
                raise DistillError(f"{log} is damaged in line {number}: {error}") from None


def finite(points: Iterable[Sequence[float]]) -> Points:
    """Return the points that are numbers."""
    return [(int(step), float(value)) for step, value in points if math.isfinite(value)]


def newest_text(folder: Path, *patterns: str) -> str:
    """Return the text of the newest file of the first pattern that has any."""
    for pattern in patterns:
        if files := sorted(folder.glob(pattern), key=lambda path: path.stat().st_mtime):
            return files[-1].read_text(errors="replace")
    return ""
