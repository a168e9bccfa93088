"""The distiller's state in the Trainer's checkpoints, and resuming from them."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import Trainer

from kdgraft.engine import Engine
from kdgraft.sources.teacher import read_checkpoint
from kdgraft.telling import announced

from .checkpoints import STATE_FILE, to_resume, write_checksums
from .checks import one_line

logger = logging.getLogger("kdgraft")

if TYPE_CHECKING:
    _Host = Trainer
else:
    _Host = object


class Resuming(_Host):
    """The mixin before a Trainer class that saves the distiller's state beside the plain student and restores it."""

    model: Any
    _recipe: Any
    _settings: dict[str, Any]
    _anew: frozenset[str] = frozenset()
    """The files of the checkpoint to resume whose states start afresh."""

    @property
    def distiller(self) -> Engine | None:
        """The distiller; ``None`` without terms, or after :func:`~kdgraft_nlp.undistill`."""
        return getattr(self.model, "distiller", None)

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
        if resume_from_checkpoint:
            folder, found = to_resume(
                resume_from_checkpoint,
                str(self.args.output_dir),
                self._states(),
                partial,
                self.is_world_process_zero(),
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
        if self.distiller is not None and self.args.should_save:
            torch.save(self.distiller.live_state(), os.path.join(output_dir, STATE_FILE))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        super().save_model(output_dir, _internal_call)
        if self.distiller is not None and self.args.should_save and not _internal_call:
            folder = Path(output_dir or str(self.args.output_dir))
            for name, peer in self.distiller.peers.items():
                peer.save_pretrained(folder / "peers" / name)  # type: ignore[operator]

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        if self.args.should_save:
            write_checksums(Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}")
        self._save_cache()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        with one_line(f"cannot resume from {resume_from_checkpoint}"):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None and self.distiller is not None and STATE_FILE not in self._anew:
            file = Path(checkpoint) / STATE_FILE
            if file.is_file():
                self.distiller.load_live_state(read_checkpoint(file))
        if checkpoint is not None and not {"optimizer.pt", "scheduler.pt"} & self._anew:
            with one_line(f"cannot resume from {checkpoint}"):
                super()._load_optimizer_and_scheduler(checkpoint)

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
