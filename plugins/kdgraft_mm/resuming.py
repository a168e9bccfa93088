"""Safe loading of the checkpoints that the host reads, and the choice of the newest complete one to resume."""

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
    """Keep mmengine from executing code in any checkpoint (to resume, to start from, of a backbone) that the body loads.

    The fork loads with ``weights_only=True`` and, if a file contains more, loads it again without. (Upstream fails there.)

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
    """Return the parts that a checkpoint lacks for a run of ``config`` to continue as if it had never stopped."""
    wanted = config.get("param_scheduler") or []
    schedulers = checkpoint.get("param_schedulers")
    short = isinstance(schedulers, list) and isinstance(wanted, list) and len(schedulers) < len(wanted)
    lost = [] if is_resumable(checkpoint) else ["the state of the training loop"]
    lost += [] if "optimizer" in checkpoint else ["the optimizer's state"]
    return lost + (["the schedulers' state"] if wanted and (schedulers is None or short) else [])


def is_resumable(checkpoint: Mapping[str, Any]) -> bool:
    """Return true for a checkpoint with all entries that the host needs to resume."""
    meta, hub = checkpoint.get("meta"), checkpoint.get("message_hub")
    return (
        isinstance(meta, dict)
        and {"iter", "epoch"} <= meta.keys()
        and isinstance(hub, dict)
        and {"log_scalars", "runtime_info", "resumed_keys"} <= hub.keys()
        and "state_dict" in checkpoint
    )


def newest_checkpoint(config: Config, *, trusted: bool = False, partial: bool = False) -> str | None:
    """Return the checkpoint to resume in ``config.work_dir``: the one that ``last_checkpoint`` names, else the newest on disk.

    Files that are damaged or incomplete are skipped, with a line in the log.

    Args:
        config: the config of the run.
        trusted: read files with arbitrary pickled objects.
        partial: accept an incomplete file if no file is complete.

    Returns:
        The file or address; ``None`` if there is no file at all.

    Raises:
        DistillError: there are files, but none of them can be resumed.
    """
    work_dir = Path(config.work_dir)
    pointer = work_dir / "last_checkpoint"
    named = pointer.read_text(errors="replace").strip() if pointer.is_file() else ""
    if "://" in named:
        return named
    passed, incomplete = [], None
    for path in _checkpoint_files(config, named):
        try:
            checkpoint = read_checkpoint(path, trusted=trusted, safe_types=SAFE_TYPES)
        except UnsafeCheckpoint:
            raise
        except DistillError as error:
            passed.append(str(error))
            continue
        lost = lacking(checkpoint, config)
        if not lost:
            return _chosen(path, passed, str(path) == named)
        passed.append(f"{path} lacks {' and '.join(lost)}")
        if incomplete is None and is_resumable(checkpoint):
            incomplete = path
    if partial and incomplete is not None:
        return _chosen(incomplete, passed, str(incomplete) == named)
    if passed:
        raise DistillError(
            f"nothing to resume: no checkpoint in {work_dir} is complete ({'; '.join(passed[:3])}); start anew in another folder"
            + ("" if incomplete is None else f", or say --partial to go on from {incomplete}")
        )
    return None


def keep_seed(config: Config, *, trusted: bool = False) -> None:
    """Give a run that is to be resumed and names no seed the seed that it began with.

    The host restores that seed only after its samplers have drawn the order of the images from another one.
    """
    chosen, randomness = str(config.get("load_from") or ""), config.get("randomness") or {}
    if not config.get("resume") or randomness.get("seed") is not None or not Path(chosen).is_file():
        return
    meta = read_checkpoint(chosen, trusted=trusted, safe_types=SAFE_TYPES).get("meta")
    if isinstance(meta, dict) and isinstance(meta.get("seed"), int):
        config.randomness = {**randomness, "seed": meta["seed"]}


def _checkpoint_files(config: Config, named: str) -> list[Path]:
    """Return a run's checkpoints, the one of this name first, then from the newest to the oldest."""
    work_dir = Path(config.work_dir)
    out_dir = (config.get("default_hooks") or {}).get("checkpoint", {}).get("out_dir")
    folders = [work_dir, *([Path(out_dir) / work_dir.name] if out_dir else [])]  # as CheckpointHook does
    found = {path for folder in folders for path in folder.glob("*.pth")}
    files = sorted(found, key=lambda path: path.stat().st_mtime_ns, reverse=True)
    if not named or not Path(named).is_file():
        return files
    return [Path(named), *(path for path in files if path.resolve() != Path(named).resolve())]


def _chosen(path: Path, passed: list[str], named: bool) -> str:
    """Return the path, and log the reasons for choosing it unless it was the first choice."""
    if passed or not named:
        why = "; ".join(passed) or "last_checkpoint does not name it"
        logger.warning("going on from %s (%s)", path, why)
    return str(path)
