"""Tables for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def print_rows(rows: Sequence[Mapping[str, Any]], title: str = "") -> None:
    """Print rows as a table in plain columns, under a title."""
    if not rows:
        return
    head = list(rows[0])
    widths = [max(len(str(key)), *(len(str(row[key])) for row in rows)) for key in head]
    if title:
        print(title)
    for row in (dict(zip(head, head, strict=True)), *rows):
        print("  ".join(str(row[key]).ljust(width) for key, width in zip(head, widths, strict=True)).rstrip())
    print()
