"""Embedded data: digit scenes and docstrings, and readers of real sets."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

from kdgraft.errors import DistillError


def check_layout(root: Path, parts: Sequence[str], layout: str) -> None:
    """Raise a :class:`DistillError` unless all these files and folders of a real set exist; it describes the layout."""
    for part in parts:
        if not (root / part).exists():
            raise DistillError(f"--data {root}: no {part}; a set has {layout}")


def describe(folder: Path) -> dict[str, str]:
    """Describe the files of a dataset: their sizes, and a hash of the contents of those in JSON."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        if path.suffix in (".json", ".jsonl")
        else str(path.stat().st_size)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
