"""Files and folders of runs: atomic writes, a check for damage, and a lock for one run at a time."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from glob import escape
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock, Timeout

from .errors import DistillError

LOCK = ".kdgraft.lock"


def digest(settings: Any) -> str:
    """Return a hash of settings of plain types, independent of the order of their keys."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()


def digest_of_file(path: str | Path) -> str:
    """Return a hash of a file's content."""
    found = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(1 << 20):
            found.update(part)
    return found.hexdigest()


def digest_of_weights(path: str | Path) -> str:
    """Return a hash of a file of weights, or of those in a folder."""
    path = Path(path)
    files = [path] if path.is_file() else sorted([*path.glob("*.safetensors"), *path.glob("*.bin")])
    return digest([digest_of_file(file) for file in files])


def read_record(path: Path) -> dict[str, Any]:
    """Return the content of a file in JSON; nothing if it is missing or damaged, so that what it records is made anew."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


@contextmanager
def written_whole(path: str | Path) -> Iterator[Path]:
    """Yield a temporary file beside ``path``, and rename it to ``path`` when the body ends without an error.

    Temporary files that killed processes left of the same path are removed.

    Raises:
        DistillError: the disk is full or the folder cannot be written to; ``path`` is unchanged.
    """
    path = Path(path)
    part = path.with_name(f".{path.name}.{os.getpid()}@{platform.node()}.part")
    try:
        for left in path.parent.glob(f".{escape(path.name)}.*.part"):
            if _abandoned(left, left.name.removeprefix(f".{path.name}.").removesuffix(".part")):
                left.unlink(missing_ok=True)
        yield part
        os.replace(part, path)
    except (OSError, RuntimeError) as error:  # torch.save raises a RuntimeError if it cannot write its file
        if isinstance(error, RuntimeError) and not isinstance(error.__context__, OSError):
            raise
        said = getattr(error, "strerror", None) or getattr(error.__context__, "strerror", None) or error
        raise DistillError(f"cannot write {path}: {said}; nothing was changed") from error
    finally:
        part.unlink(missing_ok=True)


def _abandoned(part: Path, writer: str) -> bool:
    """Return true for a temporary file whose process is gone, or, on another machine, has not written for an hour."""
    process, at, machine = writer.partition("@")
    if not at or not process.isdecimal():  # of a path whose name begins with this one
        return False
    if machine == platform.node():
        return not psutil.pid_exists(int(process))
    try:
        return time.time() - part.stat().st_mtime > 3600
    except OSError:  # renamed meanwhile
        return False


def check_intact(path: str | Path) -> None:
    """Verify a file of ``torch.save`` against its own checksums; loading alone detects few flipped bits.

    Files of other formats, and those that were saved without checksums, pass.

    Raises:
        DistillError: the file is damaged.
    """
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            for entry in archive.infolist():
                if entry.CRC:  # torch.serialization.set_crc32_options(False) writes 0
                    with archive.open(entry) as record:  # reading to the end verifies the checksum
                        while record.read(1 << 20):
                            pass
    except Exception as error:  # a damaged archive raises nearly anything
        raise DistillError(f"{path} is damaged ({error}); take another copy or an older checkpoint") from None


@contextmanager
def held(folder: str | Path) -> Iterator[None]:
    """Lock a folder for this run; the first of several processes holds the lock for all.

    The operating system releases the lock when the process ends, however it ends.

    Raises:
        DistillError: another run is using the folder.
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
            f"another run is at work in {folder}; wait until it ends, or give this one its own folder (--work-dir)"
        ) from None
    try:
        yield
    finally:
        lock.release()
