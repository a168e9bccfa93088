"""Tables that a command writes into a page, between two marks."""

from __future__ import annotations

from pathlib import Path

Marks = tuple[str, str]


def between_marks(text: str, marks: Marks) -> tuple[str, str, str]:
    """The text before the table, the table, and the text after it; the marks are in neither."""
    before, _, rest = text.partition(marks[0])
    inside, _, after = rest.partition(marks[1])
    return before, inside.strip(), after


def write_between(page: Path, marks: Marks, table: str) -> None:
    """Put a table between its marks on a page."""
    before, _, after = between_marks(page.read_text(encoding="utf-8"), marks)
    page.write_text(f"{before}{marks[0]}\n\n{table}\n\n{marks[1]}{after}", encoding="utf-8")
