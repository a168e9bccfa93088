"""Files and folders that outlive a run: written whole or not at all, checked for damage, held by one run at a time."""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from .errors import DistillError

LOCK = ".kdgraft.lock"


def digest(settings: Any) -> str:
    """A hash of settings of any plain types, whatever the order of their keys."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()


@contextmanager
def written_whole(path: str | Path) -> Iterator[Path]:
    """Gives a file beside ``path`` to write to, and renames it to ``path`` when the body ends without an error.

    Raises:
        DistillError: the disk is full or the place cannot be written to; ``path`` is as it was.
    """
    path = Path(path)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield part
        os.replace(part, path)
    except (OSError, RuntimeError) as error:  # torch.save raises a RuntimeError where its file cannot be written
        if isinstance(error, RuntimeError) and not isinstance(error.__context__, OSError):
            raise
        said = getattr(error, "strerror", None) or getattr(error.__context__, "strerror", None) or error
        raise DistillError(f"cannot write {path}: {said}; nothing was changed") from error
    finally:
        part.unlink(missing_ok=True)


def check_intact(path: str | Path) -> None:
    """Compares what ``torch.save`` wrote with the checksums that it wrote along: reading alone notices few flipped bits.

    Files of other formats, and of a ``torch.save`` that was told to leave the checksums out, pass.

    Raises:
        DistillError: the file is damaged.
    """
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            for entry in archive.infolist():
                if entry.CRC:  # torch.serialization.set_crc32_options(False) writes 0
                    with archive.open(entry) as record:
                        while record.read(1 << 20):
                            pass
    except Exception as error:  # a damaged archive raises nearly anything
        raise DistillError(f"{path} is damaged ({error}); take another copy or an older checkpoint") from None


@contextmanager
def held(folder: str | Path) -> Iterator[None]:
    """Holds a folder for this run; of several processes the first one does it for all.

    The lock belongs to the process: one that died, however, holds nothing.

    Raises:
        DistillError: another run is at work in the folder.
    """
    if int(os.environ.get("RANK", "0")):
        yield
        return
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise DistillError(
            f"another run is at work in {folder}; wait for its end, or give this one a folder of its own (--work-dir)"
        ) from None
    try:
        yield
    finally:
        lock.release()
