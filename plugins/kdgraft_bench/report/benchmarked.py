"""The runs of ``kdgraft bench`` as a report needs them, with the logs of their hosts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from kdgraft.sources.teacher import read_checkpoint

from ..records import FILE, read_rows
from ..results import read_results
from .reading import TEACHER, Run

DECISIONS, STATE = "decisions.npz", "fit.pt"
LOGGED = {"coco/bbox_mAP": "AP", "coco/bbox_mAP_50": "AP50", "coco/bbox_mAP_75": "AP75"}
"""The names that hosts log a metric by -> that of the table, where they differ."""

Read = Callable[[Path], Run | None]
"""Reads the folder of a run; ``None`` if it has no log."""


def bench_runs(folder: Path, read: Read) -> list[Run]:
    """Return the runs of a folder of ``kdgraft bench``, with the logs of their hosts.

    Args:
        folder: the folder of the results.
        read: reads the folder of a run of MMEngine or of a Trainer.
    """
    found = _figures(folder)
    rows = read_rows(folder)
    several = len({student for student, _, _ in rows if student != TEACHER}) > 1
    runs = []
    for (student, method, seed), metrics in found.items():
        row = rows[student, method, seed]
        own = folder / row.folder
        logged = read(own) or _fitted(own)
        label = method if method == TEACHER or not several else f"{student}: {method}"
        decisions = own / DECISIONS
        runs.append(
            Run(
                label,
                seed,
                own,
                row.model,
                metrics,
                logged.losses if logged else {},
                {LOGGED.get(name, name): points for name, points in logged.validation.items()} if logged else {},
                logged.config if logged else "",
                student if several and method != TEACHER else "",
                decisions if decisions.is_file() else None,
                logged.counted if logged else "iteration",
                row.validated,
            )
        )
    return runs


def is_bench(folder: Path) -> bool:
    """Return true for a folder of ``kdgraft bench``."""
    return (folder / FILE).is_file()


def _figures(folder: Path) -> dict[tuple[str, str, int], dict[str, float]]:
    """Return the finite figures of each student, method and seed."""
    found: dict[tuple[str, str, int], dict[str, float]] = {}
    for one in read_results(folder / "results.csv"):
        if math.isfinite(one.value):
            found.setdefault((one.model, one.method, one.seed), {})[one.metric] = one.value
    return found


def _fitted(folder: Path) -> Run | None:
    """Return the history of a training of plain PyTorch."""
    state: Mapping[str, Any] = read_checkpoint(folder / STATE) if (folder / STATE).is_file() else {}
    history = state.get("history") or []
    losses = {"loss": [(place, float(one["loss"])) for place, one in enumerate(history, 1) if "loss" in one]}
    validation: dict[str, list[tuple[int, float]]] = {}
    for place, one in enumerate(history, 1):
        for name, value in one.items():
            if name != "loss" and math.isfinite(value):
                validation.setdefault(name, []).append((place, float(value)))
    return Run("", -1, folder, "", {}, losses, validation, counted="epoch") if history else None
