"""Embedded data: digit scenes and docstrings, and readers of real sets."""

from collections.abc import Sequence
from pathlib import Path

from kdgraft.errors import DistillError


def check_layout(root: Path, parts: Sequence[str], layout: str) -> None:
    """Raise a :class:`DistillError` unless all these files and folders of a real set exist; it describes the layout."""
    for part in parts:
        if not (root / part).exists():
            raise DistillError(f"--data {root}: no {part}; a set has {layout}")
