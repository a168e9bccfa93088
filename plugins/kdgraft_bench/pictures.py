"""A grid of models' outputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from matplotlib.axes import Axes
from matplotlib.figure import Figure

Cell = TypeVar("Cell")


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
