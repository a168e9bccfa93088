"""MMDetection and MMSegmentation as hosts: how the command line and plans train in them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.runner import Runner, find_latest_checkpoint

from kdgraft.errors import DistillError
from kdgraft.hosts import Job, TrainedModel
from kdgraft.wiring import WiringRow

from . import evaluation, run
from .checkpoints import export_student
from .configs import is_distilled, load_config, type_name
from .resuming import newest_checkpoint

STUDENT = "student.pth"
"""The plain student of a finished run, with its config beside it."""


@dataclass(frozen=True)
class MMTrainer:
    """How a host on mmengine trains; a :class:`kdgraft.hosts.HostTrainer`.

    Attributes:
        scope: the host's registry scope.
        kind: the distilled model's type.
        plugin: the package that registers it.
    """

    scope: str
    kind: str
    plugin: str

    def train(
        self,
        config: str,
        options: Sequence[str] = (),
        work_dir: str | None = None,
        resume: str | None = None,
        amp: bool = False,
        seed: int | None = None,
        *,
        timeout: float | None = None,
        trusted: bool = False,
        partial: bool = False,
    ) -> Runner:
        """Trains a config; see :func:`kdgraft_mm.run.train`."""
        return run.train(
            config, options, work_dir, resume, amp, seed, timeout=timeout, trusted=trusted, partial=partial
        )

    def check(self, config: str, options: Sequence[str] = (), *, trusted: bool = False) -> list[WiringRow]:
        """Builds everything and runs one step; see :func:`kdgraft_mm.run.check`."""
        return run.check(config, options, trusted=trusted)

    def test(
        self, config: str, checkpoint: str, options: Sequence[str] = (), *, trusted: bool = False
    ) -> Mapping[str, float]:
        """Evaluates a checkpoint; see :func:`kdgraft_mm.evaluation.evaluate`."""
        return evaluation.evaluate(config, checkpoint, options, trusted=trusted)

    def export(
        self,
        checkpoint: str | Path,
        out: str | Path,
        *,
        peer: str | None = None,
        trusted: bool = False,
        force: bool = False,
    ) -> Sequence[Path]:
        """Writes the plain student, or a peer; see :func:`kdgraft_mm.checkpoints.export_student`."""
        return export_student(checkpoint, out, peer=peer, trusted=trusted, force=force)

    def reads(self, config: str) -> bool:
        """Whether it is a config of this host: by its default scope, else (of a project on top) by the model's type, else MMDetection's."""
        if "::" not in config and ":" in config:
            return False
        with run.config_mistakes(config):
            found = load_config(config, imports=False)
            kind = type_name(found.get("model") or {})
        scope = found.get("default_scope")
        if scope not in ("mmdet", "mmseg"):
            scope = "mmseg" if kind == "DistilledSegmentor" else "mmdet"
        return scope == self.scope

    def fingerprint(self, config: str, options: Mapping[str, Any]) -> Any:
        """The whole config with its bases, overrides in it."""
        return self._config(config, options).to_dict()

    def carry_out(self, job: Job) -> TrainedModel:
        """Trains through the Runner, and writes the plain student beside its checkpoints.

        Raises:
            DistillError: the config is distilled already and the run has teachers of its own.
        """
        config = self._config(job.config, job.options)
        config.work_dir = str(job.folder)
        config.randomness = {**config.get("randomness", {}), "seed": job.seed}
        if job.teachers:
            self._distil(config, job)
        config.load_from = newest_checkpoint(config) if job.resume else None
        config.resume = config.load_from is not None
        if config.load_from is None and job.start is not None:
            config.load_from = job.start.weights
        runner = run.train_config(config, job.config)
        trained = any(hook.trained for hook in runner.hooks if isinstance(hook, run.Outset))
        if not trained and config.get("val_cfg"):
            # It was killed after its last checkpoint, which the host saves before it validates. Not Runner.val(), by which
            # hooks begin anew: an average of weights from those of the last step.
            runner.val_loop.run()
        checkpoint = find_latest_checkpoint(str(job.folder))
        if checkpoint is None:
            raise DistillError(f"{job.config} trained without saving a checkpoint; give it a CheckpointHook")
        weights, described = export_student(checkpoint, job.folder / STUDENT, force=True)
        scalars = runner.message_hub.log_scalars
        metrics = {
            key[4:]: float(scalars[key].current()) for key in scalars if key.startswith("val/") and "time" not in key
        }
        return TrainedModel(str(described), str(weights), metrics)

    def _config(self, config: str, options: Mapping[str, Any]) -> Config:
        with run.config_mistakes(config):
            found = load_config(config)
            found.merge_from_dict(dict(options))
        if "model" not in found:
            raise DistillError(f"{config} has no 'model'; it is not the config of a training")
        found.setdefault("default_scope", self.scope)
        return found

    def _distil(self, config: Config, job: Job) -> None:
        """Makes the model a distilled one."""
        if is_distilled(config.model):
            raise DistillError(f"{job.config} is distilled already; give the plan the plain student's config")
        student = config.model
        teachers = {
            name: dict(config=given.config, checkpoint=given.weights)
            if isinstance(given, TrainedModel)
            else dict(given)
            for name, given in job.teachers.items()
        }
        given: dict[str, Any] = {"teachers": teachers, "terms": list(job.terms)}
        if job.recipe is not None:
            given["recipe"] = job.recipe
        kind = student.pop("type")
        config.model = dict(student, type=self.kind, student=kind, **given)
        imports = dict(config.get("custom_imports") or {})
        names = imports.get("imports", [])
        names = [names] if isinstance(names, str) else list(names)
        config.custom_imports = {**imports, "imports": list(dict.fromkeys([*names, self.plugin]))}
        __import__(self.plugin)


DET = MMTrainer("mmdet", "DistilledDetector", "kdgraft_det")
SEG = MMTrainer("mmseg", "DistilledSegmentor", "kdgraft_seg")
