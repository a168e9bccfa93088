"""The runs of ``kdgraft bench`` and of ``kdgraft demo`` as a report needs them: both write their figures to ``results.csv``."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from kdgraft.sources.teacher import read_checkpoint

from ..finished import RECORD
from ..records import FILE, read_rows
from ..results import read_results
from .reading import COSTS, TEACHER, Points, Run, finite, newest_text, read_json

DECISIONS, STATE = "decisions.npz", "fit.pt"

Read = Callable[[Path], Run | None]
"""Reads the folder of a run; ``None`` if it has no log."""


def demo_runs(folder: Path) -> list[Run]:
    """Return the runs of a folder of ``kdgraft demo``, with its curves."""
    found, models = _figures(folder)
    first = next((name for name in next(iter(found.values())) if name not in COSTS), "validation")
    runs = []
    for (_, method, seed), metrics in found.items():
        own = folder / f"seed{seed}" / method
        curves: dict[str, Points] = {}
        if (own / RECORD).is_file():
            curves = {name: finite(points) for name, points in read_json(own / RECORD)["curves"].items()}
        validation = {first: curves.pop("validation")} if "validation" in curves else {}
        config = newest_text(own, "*.py", "config.json")
        runs.append(Run(method, seed, own, models[method], metrics, curves, validation, config))
    return runs


def bench_runs(folder: Path, read: Read) -> list[Run]:
    """Return the runs of a folder of ``kdgraft bench``, with the logs of their hosts.

    Args:
        folder: the folder of the results.
        read: reads the folder of a run of MMEngine or of a Trainer.
    """
    found, _ = _figures(folder)
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
                logged.validation if logged else {},
                logged.config if logged else "",
                student if several and method != TEACHER else "",
                decisions if decisions.is_file() else None,
            )
        )
    return runs


def is_bench(folder: Path) -> bool:
    """Return true for a folder of ``kdgraft bench``."""
    return (folder / FILE).is_file()


def _figures(folder: Path) -> tuple[dict[tuple[str, str, int], dict[str, float]], dict[str, str]]:
    """Return the finite figures of each model (the student, in a benchmark), method and seed, and the model of each method."""
    found: dict[tuple[str, str, int], dict[str, float]] = {}
    models: dict[str, str] = {}
    for one in read_results(folder / "results.csv"):
        if math.isfinite(one.value):
            found.setdefault((one.model, one.method, one.seed), {})[one.metric] = one.value
            models[one.method] = one.model
    return found, models


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
    return Run("", -1, folder, "", {}, losses, validation) if history else None
