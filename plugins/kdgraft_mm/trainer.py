"""MMDetection and MMSegmentation as hosts in which the command line and plans train."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mmengine.config import Config
from mmengine.runner import find_latest_checkpoint

from kdgraft.errors import DistillError
from kdgraft.files import written_whole
from kdgraft.hosts import Job, TrainedModel
from kdgraft.sources.teacher import read_checkpoint, weights_of

from . import filling, run
from .checkpoints import SAFE_TYPES, export_student
from .configs import imported_names, is_distilled, load_config, plain_config, scope_of
from .evaluation import built_model, evaluate
from .onnx import export_student_onnx
from .replaying import let_replay
from .resuming import newest_checkpoint
from .transfer import end_early, transfer

STUDENT = "student.pth"
"""The plain student of a finished run, with its config beside it."""


@dataclass(frozen=True)
class MMTrainer:
    """Trains in a host that is built on mmengine; a :class:`kdgraft.hosts.HostTrainer`.

    Attributes:
        scope: the host's registry scope.
        kind: the distilled model's type.
        plugin: the package that registers it.
    """

    scope: str
    kind: str
    plugin: str

    train = staticmethod(run.train)
    check = staticmethod(run.check)
    test = staticmethod(evaluate)
    export = staticmethod(export_student)
    export_onnx = staticmethod(export_student_onnx)

    def cache(
        self,
        config: str,
        out: str | None,
        options: Sequence[str] = (),
        *,
        epochs: int | None = None,
        values: filling.Values = "float16",
        top_k: str | None = None,
    ) -> None:
        """Fill stores with what the terms of a config read of its teachers: ``kdgraft cache``."""
        if top_k is not None:
            raise DistillError("--top-k is for language models; leave it out")
        filling.fill(config, out, options, epochs=epochs, values=values)

    def reads(self, config: str) -> bool:
        """Return true for a config of this host; see :func:`kdgraft_mm.configs.scope_of`."""
        if "::" not in config and ":" in config:
            return False
        with run.config_mistakes(config):
            return scope_of(load_config(config, imports=False)) == self.scope

    def fingerprint(self, config: str, options: Mapping[str, Any]) -> Any:
        """Return the whole config with its bases and the overrides."""
        return self._config(config, options).to_dict()

    def carry_out(self, job: Job) -> TrainedModel:
        """Train through the Runner, and write the plain student beside its checkpoints.

        Raises:
            DistillError: the config is distilled already, and the job names teachers as well.
        """
        config = self.config_of(job)
        config.load_from = newest_checkpoint(config) if job.resume else None
        config.resume = config.load_from is not None
        if config.load_from is None and job.start is not None:
            config.load_from = job.start.weights
        runner = run.train_config(config, job.config)
        trained = any(hook.trained for hook in runner.hooks if isinstance(hook, run.Outset))
        if not trained and config.get("val_cfg"):
            # The run was killed after its last checkpoint, which the host saves before it validates. Runner.val() would restart
            # hooks: an average of weights would start from those of the last step.
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

    def given(self, job: Job, checkpoint: str) -> TrainedModel:
        """Return the config's plain model with weights of a file, after a look whether these fit."""
        config = plain_config(self.config_of(job))
        weights = weights_of(read_checkpoint(checkpoint, safe_types=SAFE_TYPES))
        built_model(config, weights, job.config, checkpoint)
        path = (job.folder / STUDENT).with_suffix(".py")
        with written_whole(path) as part:
            part.write_text(config.pretty_text, encoding="utf-8")
        return TrainedModel(str(path), checkpoint)

    def config_of(self, job: Job) -> Config:
        """Return the config with which a run is trained; see :meth:`carry_out`."""
        config = self._config(job.config, job.options)
        config.work_dir = config.experiment_name = str(job.folder)  # by its name a Runner finds its message hub
        config.randomness = {**config.get("randomness", {}), "seed": job.seed}
        if job.data is not None:
            transfer(config, job.data, job.seed, job.folder, self.scope)
        if job.stop is not None:
            end_early(config, job.stop)
        if job.teachers:
            self._distil(config, job)
        run.replay_stored(config)
        let_replay(config, seed=None)  # so that a run that was killed and begun again ends like one that was not
        return config

    def _config(self, config: str, options: Mapping[str, Any]) -> Config:
        with run.config_mistakes(config):
            found = load_config(config)
            found.merge_from_dict({key: _fitting(value, key, found) for key, value in options.items()})
        if "model" not in found:
            raise DistillError(f"{config} has no 'model'; it is not the config of a training")
        found.setdefault("default_scope", self.scope)
        return found

    def _distil(self, config: Config, job: Job) -> None:
        """Turn the config's model into a distilled one."""
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
        names = list(dict.fromkeys([*imported_names(config), self.plugin]))
        config.custom_imports = {**(config.get("custom_imports") or {}), "imports": names}
        __import__(self.plugin)


def _fitting(value: Any, key: str, config: Config) -> Any:
    """Return an option as a tuple, or as a list of tuples, if it is a list in the place of one, as TOML has no tuples."""
    if not isinstance(value, list):
        return value
    found: Any = config
    for part in key.split("."):
        if isinstance(found, (list, tuple)) and part.isdecimal() and int(part) < len(found):
            found = found[int(part)]
        else:
            found = found.get(part) if isinstance(found, (Config, Mapping)) else None
    if isinstance(found, list) and found and all(isinstance(one, tuple) for one in found):
        return [tuple(one) if isinstance(one, list) else one for one in value]
    return tuple(value) if isinstance(found, tuple) else value


DET = MMTrainer("mmdet", "DistilledDetector", "kdgraft_det")
SEG = MMTrainer("mmseg", "DistilledSegmentor", "kdgraft_seg")
