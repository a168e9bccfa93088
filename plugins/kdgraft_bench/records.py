"""The results of a benchmark on disk: one line for each finished run, appended and never rewritten."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

FILE = "runs.jsonl"
Key = tuple[str, str, int]
"""Student, method and seed."""


@dataclass(frozen=True)
class Row:
    """A finished run.

    Attributes:
        task: the host's name.
        dataset: the name of the data set.
        student: the student's name in the benchmark; the teacher's is ``"teacher"``.
        model: the model in words.
        method: ``"teacher"``, ``"plain"`` or a method's name.
        seed: the seed.
        metrics: name -> value on the tested split.
        seconds: the time of the training.
        folder: the folder of the run.
        validated: name -> value on the validation split, where the tested split is another.
        split: the tested split; empty in results of older versions.
    """

    task: str
    dataset: str
    student: str
    model: str
    method: str
    seed: int
    metrics: Mapping[str, float]
    seconds: float
    folder: str
    validated: Mapping[str, float] = field(default_factory=dict)
    split: str = ""

    @property
    def key(self) -> Key:
        """Student, method and seed."""
        return self.student, self.method, self.seed


def append(folder: Path, row: Row) -> None:
    """Append a row to ``runs.jsonl``, after the half of a line that a killed process may have left."""
    path = folder / FILE
    cut = path.is_file() and path.stat().st_size > 0 and not path.read_bytes().endswith(b"\n")
    with path.open("ab") as file:
        file.write((("\n" if cut else "") + json.dumps(asdict(row)) + "\n").encode())
        file.flush()
        os.fsync(file.fileno())


def read_rows(folder: Path) -> dict[Key, Row]:
    """Return the newest row of each run; a line that was cut off counts for nothing."""
    path = folder / FILE
    found: dict[Key, Row] = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else ():
        try:
            row = Row(**json.loads(line))
        except (ValueError, TypeError):
            continue
        found[row.key] = row
    return found
