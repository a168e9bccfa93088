"""Hugging Face as a host of the command line and of plans, which train from recipe files."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kdgraft.errors import DistillError, nearest
from kdgraft.hosts import Job, TrainedModel, TransferSet
from kdgraft.onnx import Exported

from . import filling, run
from .checkpoints import NothingComplete, newest_first
from .checks import check_folder
from .onnx import export_student
from .settings import load, untaught
from .trainer import DistillTrainer

logger = logging.getLogger("kdgraft")


class RecipeTrainer:
    """The :class:`kdgraft.hosts.HostTrainer` of Hugging Face, which trains recipe files."""

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
    ) -> DistillTrainer:
        """Train a recipe; see :func:`kdgraft_nlp.run.train`."""
        _refuse_trust(trusted)
        return run.train(config, options, work_dir, resume, amp, seed, timeout=timeout, partial=partial)

    def check(self, config: str, options: Sequence[str] = (), *, trusted: bool = False) -> None:
        """Build everything and run one step; see :func:`kdgraft_nlp.run.check`."""
        _refuse_trust(trusted)
        run.check(config, options)

    def test(
        self, config: str, checkpoint: str, options: Sequence[str] = (), *, trusted: bool = False
    ) -> Mapping[str, float]:
        """Evaluate a saved student; see :func:`kdgraft_nlp.run.evaluate`."""
        _refuse_trust(trusted)
        return run.evaluate(config, checkpoint, options)

    def export(self, checkpoint: str | Path, out: str | Path, **told: Any) -> Sequence[Path]:
        """Raise a :class:`DistillError`: a saved student is already a plain student."""
        raise DistillError(
            f"{checkpoint}: a student saved by the Trainer is already plain; load it with from_pretrained, or say --onnx"
        )

    def export_onnx(
        self,
        checkpoint: str | Path,
        out: str | Path,
        *,
        size: Sequence[int] | None = None,
        peer: str | None = None,
        trusted: bool = False,
        force: bool = False,
    ) -> Exported:
        """Write a saved student, or one of its peers, as ONNX; see :func:`kdgraft_nlp.onnx.export_student`."""
        _refuse_trust(trusted)
        folder = Path(checkpoint) if peer is None else Path(checkpoint) / "peers" / peer
        return export_student(folder, out, size=size, force=force)

    def reads(self, config: str) -> bool:
        """Return true: every file with a recipe's suffix is a recipe."""
        return True

    def fingerprint(self, config: str, options: Mapping[str, Any]) -> Any:
        """Return the recipe with its overrides, without its output folder."""
        found = load(config, [f"{key}={value}" for key, value in options.items()])
        return {key: value for key, value in found.items() if key != "output"}

    def cache(
        self,
        config: str,
        out: str | None,
        options: Sequence[str] = (),
        *,
        top_k: str = "50",
        values: str = "float16",
        epochs: int | None = None,
    ) -> None:
        """Fill a store with what the terms of a recipe read of its teacher: ``kdgraft cache``."""
        if out is None:
            raise DistillError("say --out FOLDER: the folder of the store")
        if epochs is not None or values == "int8":
            given = "--epochs" if epochs is not None else "--values int8"
            raise DistillError(f"{given} is for stores of images; leave it out")
        if top_k != "all" and not top_k.isdecimal():
            raise DistillError(f"--top-k must be a whole number >= 1, or 'all'; got {top_k!r}")
        kept = None if top_k == "all" else int(top_k)
        filling.fill_recipe(config, out, options, top_k=kept, values=values)  # type: ignore[arg-type]

    def carry_out(self, job: Job) -> TrainedModel:
        """Train in the run's folder, in which the student is saved too."""
        recipe, schedule = self.recipe_of(job)
        try:
            resume = "auto" if job.resume and newest_first(job.folder) else None
            _, metrics = run.train_recipe(recipe, resume, schedule=schedule)
        except NothingComplete as error:  # killed while it wrote its first checkpoint
            logger.warning("%s; the run starts afresh", error)
            _, metrics = run.train_recipe(recipe, schedule=schedule)
        return TrainedModel(job.config, str(job.folder), metrics)

    def given(self, job: Job, checkpoint: str) -> TrainedModel:
        """Return the model of a folder that ``save_pretrained`` wrote."""
        check_folder("checkpoint", checkpoint)
        return TrainedModel(job.config, checkpoint)

    def recipe_of(self, job: Job) -> tuple[dict[str, Any], float]:
        """Return the recipe with which a run is trained, and the length of its schedule in units of the training."""
        recipe = load(job.config, [f"{key}={value}" for key, value in job.options.items()])
        if not job.teachers:
            recipe = {**untaught(recipe), "trainer": recipe.get("trainer")}
        recipe |= {"output": str(job.folder), "recipe": job.recipe, "terms": list(job.terms) or None}
        recipe |= {"teacher": None, "teachers": None}  # the plan gives the teachers
        recipe["training"] = {**(recipe.get("training") or {}), "seed": job.seed}
        if job.teachers:
            teachers = {name: _teacher(given) for name, given in job.teachers.items()}
            recipe |= {"teacher": teachers["teacher"]} if list(teachers) == ["teacher"] else {"teachers": teachers}
        if job.start is not None:
            recipe["student"] = job.start.weights
        if job.data is not None:
            recipe["data"] = _transferred(recipe.get("data"), job.data)
        return recipe, 1.0 if job.stop is None else _stopped(recipe["training"], job.stop)


def _transferred(data: Any, transfer: TransferSet) -> dict[str, Any]:
    """Return a recipe's data with another training set, a share of it, or without its labels."""
    found = dict(data or {})
    if transfer.set is not None:
        found["train"] = transfer.set
    if transfer.share != 1:
        found["fraction"] = transfer.share
    return found if transfer.labels else {**found, "labels": False}


def _stopped(training: dict[str, Any], stop: int) -> float:
    """Set where a training ends, in steps if it is counted in ``max_steps`` and else in epochs; return the schedule's length.

    Raises:
        DistillError: the training is shorter.
    """
    unit = "max_steps" if (training.get("max_steps") or -1) > 0 else "num_train_epochs"
    whole = training.get(unit) or 3  # the default of the Trainer
    if not isinstance(whole, (int, float)) or stop > whole:
        raise DistillError(f"stop must be at most training.{unit}={whole}, got {stop}")
    training[unit] = stop
    return float(whole) / stop


def _teacher(given: TrainedModel | Mapping[str, Any]) -> Any:
    """Return a recipe's entry for a teacher: the folder of a finished run, of ``{checkpoint: folder}``, or ``{type: …}`` itself."""
    if isinstance(given, TrainedModel):
        return given.weights
    if "type" in given:
        return dict(given)
    for key in given:
        if key != "checkpoint":
            raise DistillError(f"a teacher takes no argument {key!r}{nearest(key, ('checkpoint', 'type'))}")
    if not isinstance(given.get("checkpoint"), str):
        raise DistillError("a teacher needs checkpoint: the folder that save_pretrained wrote")
    return given["checkpoint"]


def _refuse_trust(trusted: bool) -> None:
    if trusted:
        raise DistillError("--trusted is for configs of MMDetection and MMSegmentation, not for recipe files")


TRAINER = RecipeTrainer()
