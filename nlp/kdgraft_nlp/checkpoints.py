"""Checks that a checkpoint of the Trainer is complete and undamaged before a run resumes from it."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from safetensors import safe_open

from kdgraft.errors import DistillError
from kdgraft.files import check_intact, written_whole

logger = logging.getLogger("kdgraft")

STATE_FILE = "distiller.pt"
"""The file of a checkpoint that holds the parameters and counters of the terms, beside the plain student."""
CHECKSUMS = "checksums.json"
"""The file of a checkpoint with the SHA-256 of every file without a checksum of its own (``torch.save`` writes one)."""
TRAINER_STATE = "trainer_state.json"
_WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "adapter_model.safetensors",
    "adapter_model.bin",
    "*/adapter_model.safetensors",
    "*/adapter_model.bin",
)
_READ = ("*.safetensors", "*/*.safetensors", "*.index.json", "config.json", "adapter_config.json", TRAINER_STATE)


def write_checksums(folder: str | Path) -> None:
    """Write :data:`CHECKSUMS` of a checkpoint, after all its other files."""
    folder = Path(folder)
    found = {name: _sha256(folder / name) for name in _matching(folder, _READ)}
    with written_whole(folder / CHECKSUMS) as part:
        part.write_text(json.dumps(found, indent=1), encoding="utf-8")


def faults(folder: str | Path, states: Sequence[str]) -> dict[str, str]:
    """Return the files of a checkpoint that are missing or damaged, each with ``"is missing"`` or ``"is damaged"``.

    Args:
        folder: the checkpoint.
        states: files that the run needs beside the weights and the Trainer's state, such as those of optimizer and scheduler.
    """
    folder = Path(folder)
    told = _told(folder)
    found = {name: "is missing" for name in [TRAINER_STATE, *states, *told] if not (folder / name).is_file()}
    weights = _matching(folder, _WEIGHTS)
    if not weights:
        found[_WEIGHTS[0]] = "is missing"
    for index in (name for name in weights if name.endswith(".index.json")):
        for shard in _shards(folder / index):
            if not (folder / shard).is_file():
                found[shard] = "is missing"
    for name in dict.fromkeys([*_matching(folder, (*_READ, CHECKSUMS)), *weights, *states]):
        if name not in found and not _intact(folder / name, told.get(name)):
            found[name] = "is damaged"
    return found


class NothingComplete(DistillError):
    """No checkpoint has all files that a resumed run needs."""


def to_resume(
    told: str | Path | bool, output: str, states: Sequence[str], partial: bool, speaks: bool = True
) -> tuple[str, dict[str, str]]:
    """Return the checkpoint to resume from, and its :func:`faults`.

    Args:
        told: the folder of a checkpoint; ``True``: the newest complete one in ``output``.
        output: the folder of the run's checkpoints.
        states: as for :func:`faults`.
        partial: accept a checkpoint whose states are missing or damaged; these states start afresh.
        speaks: log the checkpoints and states that are left out.

    Raises:
        DistillError: there is no checkpoint.
        NothingComplete: every checkpoint lacks a file that the run needs.
    """
    candidates = newest_first(output) if told is True else [Path(str(told))]
    if not candidates:
        raise DistillError(f"nothing to resume: there is no checkpoint in {output}")
    left_out: list[str] = []
    for folder in candidates:
        if not folder.is_dir():
            raise DistillError(f"nothing to resume: {folder} is not the folder of a checkpoint")
        found = faults(folder, states)
        wrong = " and ".join(f"{name} {what}" for name, what in found.items())
        if not found or (partial and all(name in states for name in found)):
            if speaks and (left_out or found):
                before = f", as {'; '.join(left_out)}" if left_out else ""
                begins = f"; {wrong}, so that it starts afresh" if found else ""
                logger.warning("resuming from %s%s%s", folder, before, begins)
            return str(folder), found
        left_out.append(f"{wrong} in {folder}")
    raise NothingComplete(f"cannot resume: {'; '.join(left_out)}{_advice(candidates[0], states, told, partial)}")


def newest_first(output: str | Path) -> list[Path]:
    """Return the checkpoint folders of a run, the newest first."""
    found = (
        re.fullmatch(r"checkpoint-(\d+)", path.name) for path in Path(output).glob("checkpoint-*") if path.is_dir()
    )
    steps = sorted((int(match[1]) for match in found if match), reverse=True)
    return [Path(output) / f"checkpoint-{step}" for step in steps]


def _advice(folder: Path, states: Sequence[str], told: str | Path | bool, partial: bool) -> str:
    if told is not True:
        for other in newest_first(folder.parent):
            if other != folder and not faults(other, states):
                return f"; {other} is complete"
    wrong = faults(folder, states)
    if STATE_FILE in wrong and wrong[STATE_FILE] == "is missing":
        return (
            f"; it was made without distillation, or with save_only_model ({STATE_FILE} is missing); start from its student with "
            "from_pretrained instead"
        )
    if not partial and all(name in states for name in wrong):
        return "; pass partial=True (--partial on the command line) to start these states afresh"
    return ""


def _matching(folder: Path, patterns: Sequence[str]) -> list[str]:
    found = (path for pattern in patterns for path in sorted(folder.glob(pattern)))
    return list(dict.fromkeys(path.relative_to(folder).as_posix() for path in found))


def _told(folder: Path) -> Mapping[str, str]:
    """Return the recorded checksums; a checkpoint of a plain Trainer has none."""
    found = _json(folder / CHECKSUMS) if (folder / CHECKSUMS).is_file() else {}
    return found if isinstance(found, dict) else {}


def _shards(index: Path) -> list[str]:
    found = _json(index)
    weights = found.get("weight_map") if isinstance(found, dict) else None
    return sorted({str(name) for name in weights.values()}) if isinstance(weights, dict) else []


def _intact(file: Path, told: str | None) -> bool:
    if told is not None:
        return _sha256(file) == told
    if file.suffix == ".json":
        return isinstance(_json(file), dict)
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, "pt"):
                return True
        check_intact(file)
        return zipfile.is_zipfile(file)  # the Trainer writes no other format: this file is truncated
    except Exception:  # a damaged file can raise any error
        return False


def _json(file: Path) -> object:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        return None


def _sha256(file: Path) -> str:
    found = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            found.update(block)
    return found.hexdigest()
