"""Checks of soft labels: a list of class probabilities or logits for each sample."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from kdgraft.errors import DistillError

from .columns import short

Values = Literal["probabilities", "logits"]
ROUNDING = 0.01
"""The largest difference of a sum of probabilities from 1, which rounding explains."""


def check_soft_labels(column: str, rows: Sequence[Any], count: int, values: Values, independent: bool) -> None:
    """Raise a :class:`DistillError` for the first row that is malformed.

    Args:
        column: the name of the column, for the message.
        rows: a list of numbers for each sample.
        count: the number of classes.
        values: ``"probabilities"`` or ``"logits"``.
        independent: each class has a probability of its own (multi-label).
    """
    told = row_error(rows, count, values, independent)
    if told is not None:
        raise DistillError(f"sample {told[0]} of column {column!r} {told[1]}")


def row_error(rows: Sequence[Any], count: int, values: Values, independent: bool) -> tuple[int, str] | None:
    """Return the number of the first row that is malformed, and what is wrong with it; ``None`` where all are right."""
    if _all_right(rows, count, values, independent):
        return None
    for i, row in enumerate(rows):
        wrong = _wrong(row, count, values, independent)
        if wrong is not None:
            return i, wrong
    return None


def _all_right(rows: Sequence[Any], count: int, values: Values, independent: bool) -> bool:
    """Return whether all rows are right, at once."""
    try:
        found = np.asarray(rows, dtype=float)
    except (TypeError, ValueError):
        return False
    if found.ndim != 2 or found.shape[1] != count or not np.isfinite(found).all():
        return False
    if values == "logits":
        return True
    if independent:
        return bool((found >= 0).all() and (found <= 1).all())
    return bool((found >= 0).all() and (abs(found.sum(1) - 1) <= ROUNDING).all())


def _wrong(row: Any, count: int, values: Values, independent: bool) -> str | None:
    if not isinstance(row, (list, tuple)) or not all(
        isinstance(one, (int, float)) and not isinstance(one, bool) for one in row
    ):
        return f"must be a list of {count} {values}, one for each class, got {short(row)}"
    if len(row) != count:
        return f"has {len(row)} numbers, and there are {count} classes"
    bad = next((one for one in row if not math.isfinite(one)), None)
    if bad is not None:
        return f"has the number {bad}"
    if values == "logits":
        return None
    bad = next((one for one in row if one < 0 or (independent and one > 1)), None)
    if bad is not None:
        return f"has {bad:g}, which is no probability; say values: logits if these are logits"
    if not independent and abs(sum(row) - 1) > ROUNDING:
        return f"has probabilities with a sum of {sum(row):g}, which must be 1; say values: logits if these are logits"
    return None
