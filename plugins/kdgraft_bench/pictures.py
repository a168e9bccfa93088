"""Pictures of a comparison: curves of its trainings, and a grid of its models' outputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

Cell = TypeVar("Cell")
Curves = dict[str, list[tuple[int, float]]]
"""Name -> (iteration, value)."""


def draw_curves(runs: Mapping[str, Curves], metric: str, path: Path) -> None:
    """Draw the host's loss, the validation score, the distillation terms, and the figures of a critic if there is one.

    Args:
        runs: the curves of each method.
        metric: the name of the validation score.
        path: the picture to write.
    """
    apart = (".loss", ".raw", ".weight")  # all other keys are a critic's figures
    watched = [
        key for curves in runs.values() for key in curves if key.startswith("distill.") and not key.endswith(apart)
    ]
    figure = Figure(figsize=(17 if watched else 13, 3.8))
    axes = figure.subplots(1, 4 if watched else 3)
    left, middle, right, *rest = axes
    many: Any = matplotlib.colormaps["tab20"]
    for axis in (left, middle, right) if len(runs) > 10 else (right,):
        axis.set_prop_cycle(color=many.colors)
    for method, curves in runs.items():
        host = [key for key in curves if "loss" in key and key != "loss" and not key.startswith("distill.")]
        steps = [step for step, _ in curves[host[0]]]
        left.plot(steps, np.sum([[value for _, value in curves[key]] for key in host], axis=0), label=method)
        if "validation" in curves:
            middle.plot(*zip(*curves["validation"], strict=True), marker=".", label=method)
        for key, points in curves.items():
            if key.startswith("distill.") and not key.endswith(apart[1:]):
                label = f"{method}: {key.removeprefix('distill.').removesuffix('.loss')}"
                axis = right if key.endswith(".loss") else rest[0]
                axis.plot(*zip(*points, strict=True), label=label)
    left.set(title="host's training loss", xlabel="iteration", yscale="log")
    middle.set(title=f"{metric} on the validation split", xlabel="iteration")
    # A critic's term may be negative.
    right.set(title="distillation terms (weighted)", xlabel="iteration")
    right.set_yscale("symlog", linthresh=1e-2)
    if rest:
        rest[0].set(title="the critic", xlabel="iteration")
    for axis in axes:
        axis.grid(alpha=0.3)
        labels = len(axis.get_legend_handles_labels()[0])
        if labels > 6:  # too many for a place beside the lines
            axis.legend(fontsize=6, loc="upper center", bbox_to_anchor=(0.5, -0.32), ncol=2)
        elif labels:
            axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=130, bbox_inches="tight")


def draw_grid(
    columns: Sequence[str],
    rows: Sequence[Sequence[Cell]],
    draw: Callable[[Axes, Cell], None],
    aspect: float,
    path: Path,
) -> None:
    """Draw a grid with a row for each picture of the dataset and a column for each model.

    Args:
        columns: the titles of the columns.
        rows: the content of each cell.
        draw: draws the content of a cell.
        aspect: the height of the pictures divided by their width.
        path: the picture to write.
    """
    figure = Figure(figsize=(2.2 * len(columns), (2.2 * aspect + 0.15) * len(rows)))
    axes = figure.subplots(len(rows), len(columns), squeeze=False)
    for places, cells in zip(axes, rows, strict=True):
        for axis, cell in zip(places, cells, strict=True):
            draw(axis, cell)
            axis.set_axis_off()
    for axis, title in zip(axes[0], columns, strict=True):
        axis.set_title(title, fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
