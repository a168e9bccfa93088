"""Reading what the host reads: safely, and to resume the newest checkpoint that is whole."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from mmengine.config import Config
from mmengine.runner import checkpoint as host

from kdgraft.errors import DistillError, UnsafeCheckpoint
from kdgraft.sources.teacher import read_checkpoint, unsafe

from .checkpoints import SAFE_TYPES

logger = logging.getLogger("kdgraft")


@contextmanager
def safe_loading(trusted: bool = False) -> Iterator[None]:
    """Has mmengine execute nothing in any checkpoint that it reads in the body: to resume, to start from, of a backbone.

    The fork reads with ``weights_only=True`` and, where a file holds more, reads it again without. (Upstream fails there.)

    Args:
        trusted: leave the host as it is.
    """
    if trusted:
        yield
        return

    def load(file: Any, map_location: Any = None, weights_only: Any = None) -> Any:
        if isinstance(file, (str, Path)):
            return read_checkpoint(file, safe_types=SAFE_TYPES, map_location=map_location)
        return from_elsewhere(torch.load, file, map_location=map_location)

    def from_elsewhere(read: Any, *args: Any, **settings: Any) -> Any:
        try:
            with torch.serialization.safe_globals(list(SAFE_TYPES)):
                return read(*args, **{**settings, "weights_only": True})
        except UnpicklingError as error:
            raise unsafe("a checkpoint", str(error)) from None

    download = host.load_url
    replaced = {"load_url": lambda *args, **settings: from_elsewhere(download, *args, **settings)}
    if hasattr(host, "_safe_torch_load"):
        replaced["_safe_torch_load"] = load
    before = {name: getattr(host, name) for name in replaced}
    vars(host).update(replaced)
    try:
        yield
    finally:
        vars(host).update(before)


def lacking(checkpoint: Mapping[str, Any], config: Config) -> list[str]:
    """What a checkpoint lacks for a run of ``config`` to go on as if it had never stopped."""
    wanted = config.get("param_scheduler") or []
    schedulers = checkpoint.get("param_schedulers")
    short = isinstance(schedulers, list) and isinstance(wanted, list) and len(schedulers) < len(wanted)
    lost = [] if is_resumable(checkpoint) else ["the state of the training loop"]
    lost += [] if "optimizer" in checkpoint else ["the optimizer's state"]
    return lost + (["the schedulers' state"] if wanted and (schedulers is None or short) else [])


def is_resumable(checkpoint: Mapping[str, Any]) -> bool:
    """Whether a checkpoint has what the host cannot resume without."""
    meta, hub = checkpoint.get("meta"), checkpoint.get("message_hub")
    return (
        isinstance(meta, dict)
        and {"iter", "epoch"} <= meta.keys()
        and isinstance(hub, dict)
        and {"log_scalars", "runtime_info", "resumed_keys"} <= hub.keys()
        and "state_dict" in checkpoint
    )


def newest_checkpoint(config: Config, *, trusted: bool = False, partial: bool = False) -> str | None:
    """The checkpoint to go on from in ``config.work_dir``: the one that ``last_checkpoint`` names, else the newest on disk.

    Files that are damaged or lack something are passed over, with a line in the log.

    Args:
        trusted: read files that hold arbitrary pickled objects.
        partial: take one that lacks a part where none is whole.

    Returns:
        ``None`` where there is no file at all.

    Raises:
        DistillError: there are files, and none of them will do.
    """
    work_dir = Path(config.work_dir)
    pointer = work_dir / "last_checkpoint"
    named = pointer.read_text().strip() if pointer.is_file() else ""
    if "://" in named:
        return named
    folders = [work_dir]
    out_dir = (config.get("default_hooks") or {}).get("checkpoint", {}).get("out_dir")
    if out_dir:
        folders.append(Path(out_dir) / work_dir.name)  # as CheckpointHook does
    found = {path for folder in folders for path in folder.glob("*.pth")}
    files = sorted(found, key=lambda path: path.stat().st_mtime_ns, reverse=True)
    if named and Path(named).is_file():
        files = [Path(named), *(path for path in files if path.resolve() != Path(named).resolve())]
    passed, lame = [], None
    for path in files:
        try:
            checkpoint = read_checkpoint(path, trusted=trusted, safe_types=SAFE_TYPES)
        except UnsafeCheckpoint:
            raise
        except DistillError as error:
            passed.append(str(error))
            continue
        lost = lacking(checkpoint, config)
        if not lost:
            return _told(path, passed, str(path) == named)
        passed.append(f"{path} lacks {' and '.join(lost)}")
        if lame is None and is_resumable(checkpoint):
            lame = path
    if partial and lame is not None:
        return _told(lame, passed, str(lame) == named)
    if passed:
        raise DistillError(
            f"nothing to resume: no checkpoint in {work_dir} is whole ({'; '.join(passed[:3])}); start anew in another folder"
            + ("" if lame is None else f", or say --partial to go on from {lame}")
        )
    return None


def _told(path: Path, passed: list[str], named: bool) -> str:
    if passed or not named:
        why = "; ".join(passed) or "last_checkpoint does not name it"
        logger.warning("going on from %s (%s)", path, why)
    return str(path)
