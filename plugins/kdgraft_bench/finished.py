"""Records of finished trainings on disk: an interrupted demo continues where it stopped, and processes can share its folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path

from filelock import FileLock, Timeout

from kdgraft.files import written_whole

RECORD = "finished.json"


@dataclass
class Finished:
    """The record of a finished training, in ``finished.json`` beside its checkpoint.

    Attributes:
        settings: :func:`digest` of everything that the training depends on.
        metrics: name -> value on the tested split.
        curves: name -> (iteration, value).
    """

    settings: str
    metrics: dict[str, float]
    curves: dict[str, list[tuple[int, float]]]

    @classmethod
    def read(cls, folder: Path, settings: str) -> Finished | None:
        """Return the record of the training in ``folder`` if it had these settings, else ``None``."""
        try:
            found = json.loads((folder / RECORD).read_text())
        except (OSError, ValueError):
            return None
        if found.get("settings") != settings:
            return None
        curves = {
            name: [(int(step), float(value)) for step, value in points] for name, points in found["curves"].items()
        }
        return cls(settings, found["metrics"], curves)

    def write(self, folder: Path) -> None:
        """Write ``finished.json`` atomically."""
        with written_whole(folder / RECORD) as part:
            part.write_text(json.dumps(asdict(self), indent=1))


def describe(folder: Path) -> dict[str, str]:
    """Describe the files of a dataset: their sizes, and a hash of the contents of those in JSON."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        if path.suffix in (".json", ".jsonl")
        else str(path.stat().st_size)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def code(*packages: str) -> str:
    """Return a hash of the source code of these packages, so that a training is repeated after a change of a loss."""
    found = hashlib.sha256()
    for package in packages:
        (root,) = import_module(package).__path__
        for path in sorted(Path(root).rglob("*.py")):
            found.update(path.read_bytes())
    return found.hexdigest()


@contextmanager
def alone(path: Path, what: str) -> Iterator[None]:
    """Hold the lock ``path`` while the body runs; print a message before waiting for another process."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(f"{what}: another process is at it; waiting for its result", flush=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
