"""Checkpoints of the Trainer: the distiller's state in them, their checks, and resuming from them."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import PreTrainedModel

from kdgraft.engine import Engine
from kdgraft.errors import DistillError
from kdgraft.files import check_intact, written_whole
from kdgraft.sources.teacher import load_strictly, read_checkpoint
from kdgraft.telling import announced

from .adapters import base_of
from .checks import one_line
from .replaying import Replaying
from .sharding import gathered, spread
from .zero import whole_while, without_distiller

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


class Resuming(Replaying):
    """The mixin before a Trainer class that saves the distiller's state beside the plain student and restores it."""

    model: Any
    _recipe: Any
    _settings: dict[str, Any]
    _anew: frozenset[str] = frozenset()
    """The files of the checkpoint to resume whose states start afresh."""

    @property
    def distiller(self) -> Engine | None:
        """The distiller; ``None`` without terms, or after :func:`~kdgraft_nlp.undistill`."""
        return getattr(base_of(self.model), "distiller", None)

    def train(  # type: ignore[override]
        self, resume_from_checkpoint: str | bool | None = None, *args: Any, partial: bool = False, **settings: Any
    ) -> Any:
        """Train as the host does.

        Args:
            resume_from_checkpoint: the folder of a checkpoint; ``True``: the newest complete one in ``output_dir``.
            *args, **settings: passed to the host's ``train``.
            partial: resume even where states (of optimizer, scheduler, random numbers, terms) are missing or damaged, and start
                these afresh.

        Raises:
            DistillError: the checkpoint is incomplete or damaged.
        """
        self._anew = frozenset()
        in_parts = self.is_fsdp_enabled or self.is_deepspeed_enabled  # their checkpoints are the host's own
        if resume_from_checkpoint and not in_parts:
            folder, found = to_resume(
                resume_from_checkpoint, str(self.args.output_dir), self._states(), partial, self.is_world_process_zero()
            )
            self._anew, resume_from_checkpoint = frozenset(found), folder
        if self.distiller is not None and self.is_world_process_zero():
            logger.info(announced(self.distiller, self.model, self._recipe))
        try:
            return super().train(resume_from_checkpoint, *args, **settings)
        finally:
            self._save_cache()

    def _states(self) -> list[str]:
        """Return the files that a resumed run needs in a checkpoint, beside the weights and the Trainer's own state."""
        processes = self.args.world_size
        found = ["optimizer.pt", "scheduler.pt"]
        found += ["rng_state.pth"] if processes == 1 else [f"rng_state_{rank}.pth" for rank in range(processes)]
        if getattr(self.accelerator, "scaler", None) is not None:
            found.append("scaler.pt")
        if self.distiller is not None:
            state = self.distiller.live_state()
            found += [STATE_FILE] if state["terms"] or state["hidden"] or state["sources"] else []
        return found

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.distiller is None:
            return
        with whole_while(self.distiller.parameters()):  # by all processes together
            state = gathered(self.distiller.live_state())
        if self.args.should_save:
            torch.save(state, os.path.join(output_dir, STATE_FILE))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the plain student, and the peers beside it."""
        super().save_model(output_dir, _internal_call)
        if self.distiller is not None and self.args.should_save and not _internal_call:
            folder = Path(output_dir or str(self.args.output_dir))
            for name, peer in self.distiller.peers.items():
                peer.save_pretrained(folder / "peers" / name)  # type: ignore[operator]

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, without_distiller(self.model, state_dict))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
        with one_line(f"cannot write {folder}"):  # a full disk is an error of torch, of safetensors or of the system
            super()._save_checkpoint(model, trial)
            if self.args.should_save:
                write_checksums(folder)
        self._save_cache()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, *model: Any) -> None:
        with one_line(f"cannot resume from {resume_from_checkpoint}"):
            super()._load_from_checkpoint(
                resume_from_checkpoint, *model
            )  # that of sentence-transformers takes no model
        load_renamed(self.model, resume_from_checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None and self.distiller is not None and STATE_FILE not in self._anew:
            file = Path(checkpoint) / STATE_FILE
            if file.is_file():
                state = read_checkpoint(file)
                with whole_while(self.distiller.parameters(), change=True):
                    self.distiller.load_live_state({**state, "terms": spread(state["terms"], self.distiller.terms)})
        if checkpoint is not None and not {"optimizer.pt", "scheduler.pt"} & self._anew:
            with one_line(f"cannot resume from {checkpoint}"):
                super()._load_optimizer_and_scheduler(checkpoint)
        if not any(name.startswith("rng_state") for name in self._anew):
            self._to_replay = checkpoint

    def _load_scaler(self, checkpoint: str | None) -> None:
        if "scaler.pt" not in self._anew:
            super()._load_scaler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if not any(name.startswith("rng_state") for name in self._anew):
            super()._load_rng_state(checkpoint)

    def _save_cache(self) -> None:
        cache = self._settings["cache"]
        if cache is not None and cache.folder is not None:
            cache.save()


def load_renamed(model: Any, folder: str | Path) -> None:
    """Load the weights that ``save_pretrained`` wrote under other names than the model's own, as it does for vision transformers.

    The Trainer, which resumes by the model's own names, leaves them out with no more than a warning.
    """
    saved = {name for file in Path(folder).glob("model*.safetensors") for name in _names(file)}
    if not saved - model.state_dict().keys() or not isinstance(model, PreTrainedModel):
        return
    load_strictly(model, type(model).from_pretrained(folder).state_dict(), str(folder), "student")


def _names(file: Path) -> list[str]:
    with safe_open(file, "pt") as opened:
        return list(opened.keys())


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
        return f"; it was made without distillation or with save_only_model (no {STATE_FILE}); load its student with from_pretrained"
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
