"""The host of plain PyTorch, in which ``kdgraft plan`` trains a function that returns a :class:`Task`."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from .distiller import Distiller
from .ensembles import EnsembleModel, Kind
from .errors import DistillError, nearest
from .files import held, written_whole
from .fit import TaskLoss, distils, fit, student_of
from .functions import called, file_of, function_of
from .hosts import Job, TrainedModel, TransferSet
from .isolation import isolated_rng
from .sources import SOURCES, Teacher, gather_sources
from .sources.teacher import load_strictly, read_checkpoint
from .training import MakeOptimizer, pair_of
from .transfer import share_of, unlabelled
from .views import Views

WEIGHTS, PEERS = "student.pth", "peer_{}.pth"
SETTINGS = [
    name
    for name in inspect.signature(fit).parameters
    if name not in ("model", "loader", "loss", "epochs", "optimizer", "evaluate", "folder", "resume")
]
"""The arguments of ``fit`` that a task may set; the others are its own fields, or the plan's."""


@dataclass
class Task:
    """A training in plain PyTorch.

    Attributes:
        model: the model to train; the student of a distilled run.
        loader: yields batches of ``(inputs, targets)``.
        loss: the task's own loss of (output, targets).
        epochs: number of epochs.
        optimizer: builds the optimizer from the parameters to train; AdamW by default.
        evaluate: computes metrics of the model after each epoch.
        tested: batches of ``(inputs, class indices)`` that the model never trains on, for ``kdgraft bench``: its latency, its
            calibration and its agreement with the teacher.
        settings: further arguments of :func:`~kdgraft.fit.fit`, such as ``dict(schedule="cosine", clip=1.0, best="accuracy")``.
    """

    model: nn.Module
    loader: Iterable[Any]
    loss: TaskLoss
    epochs: int
    optimizer: MakeOptimizer = torch.optim.AdamW
    evaluate: Callable[[nn.Module], Mapping[str, float]] | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    tested: Iterable[Any] | None = None

    def __post_init__(self) -> None:
        for name in self.settings:
            if name not in SETTINGS:
                raise DistillError(f"Task: settings takes no {name!r}{nearest(name, SETTINGS)}")


class PlainTrainer:
    """Trains :class:`Task` functions, named ``file.py:function``; a :class:`kdgraft.hosts.HostTrainer`."""

    def reads(self, config: str) -> bool:
        """Return true if the config names a function, ``file.py:function``."""
        return "::" not in config and ":" in config

    def fingerprint(self, config: str, options: Mapping[str, Any]) -> Any:
        """Return the file's text, the function's name and its arguments.

        Raises:
            DistillError: there is no such file, or the function's name does not occur in it.
        """
        file, _, name = config.rpartition(":")
        try:
            text = file_of(config).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise DistillError(f"{file} is no Python file: {error}") from None
        if not re.search(rf"\b{re.escape(name)}\b", text):
            known = re.findall(r"^def (\w+)", text, re.MULTILINE)
            raise DistillError(f"{file} has no function {name!r}{nearest(name, known)}")
        return [text, name, dict(options)]

    def carry_out(self, job: Job) -> TrainedModel:
        """Carry out one run with :func:`~kdgraft.fit.fit`, or evaluate an ensemble, and lock its folder meanwhile."""
        with held(job.folder):
            return self._fit(job) if job.ensemble is None else self._evaluate(job, job.ensemble)

    def _evaluate(self, job: Job, kind: Kind) -> TrainedModel:
        task = _task(job.config, job.options)
        if task.evaluate is None:
            raise DistillError(f"{job.config} measures nothing; give its Task evaluate=…, to evaluate the ensemble")
        ensemble = SOURCES.build(job.teachers["teacher"])
        members = [_teacher(name, job.teachers[name]) for name in ensemble.members]
        for member in members:
            member.load()
        model = EnsembleModel([member.model for member in members], ensemble, kind).eval()
        return TrainedModel(job.config, str(job.folder), _measured(task, model), dict(job.options))

    def given(self, job: Job, checkpoint: str) -> TrainedModel:
        """Return the task's model with weights of a file, and what the task measures of it."""
        task, _ = self.build(job)
        load_strictly(student_of(task.model), read_checkpoint(checkpoint), checkpoint, "checkpoint")
        return TrainedModel(job.config, checkpoint, _measured(task, task.model.eval()), dict(job.options))

    def build(self, job: Job) -> tuple[Task, nn.Module]:
        """Return the task of a run and the model that it trains: the task's own, or a :class:`Distiller` around it."""
        own = {"start": job.start.weights} if job.start is not None and _starts(job.config) else {}
        if own and "start" in job.options:
            raise DistillError(f"{job.config} gets start from the run's own entry; leave it out of the options")
        torch.manual_seed(job.seed)
        task = _task(job.config, {**job.options, **own})
        if job.data is not None:
            task = _transferred(task, job.data, job.seed)
        model: nn.Module = task.model
        if job.start is not None and not own:
            load_strictly(student_of(model), read_checkpoint(job.start.weights), job.start.weights, "student")
        if job.teachers:
            if distils(model):
                raise DistillError(
                    f"{job.config} trains a {type(model).__name__}, which takes no teacher in a plan; give its Task the student"
                )
            with isolated_rng():  # the same batches in the same order as without teachers
                example = _example(task)
                teachers = gather_sources(None, job.teachers, _teacher, _peer)
            model = Distiller(model, terms=job.terms, example=example, teachers=teachers, recipe=job.recipe)
        return task, model

    def _fit(self, job: Job) -> TrainedModel:
        task, model = self.build(job)
        fitted = fit(
            model,
            task.loader,
            task.loss,
            epochs=task.epochs,
            optimizer=task.optimizer,
            evaluate=task.evaluate,
            folder=job.folder,
            resume=job.resume,
            **{**task.settings, **({} if job.stop is None else {"stop": job.stop})},
        )
        weights = job.folder / WEIGHTS
        saved = {weights: fitted.model}
        if isinstance(model, Distiller):
            saved |= {job.folder / PEERS.format(name): peer for name, peer in model.peers.items()}
        for file, trained in saved.items():
            with written_whole(file) as part:
                torch.save(trained.state_dict(), part)
        return TrainedModel(job.config, str(weights), fitted.metrics, dict(job.options))

    def train(
        self,
        config: str,
        options: Sequence[str] = (),
        work_dir: str | None = None,
        resume: str | None = None,
        amp: bool = False,
        seed: int | None = None,
        **told: Any,
    ) -> None:
        """Raise a :class:`DistillError`: only plans run tasks; other training in plain PyTorch is a script of the user's."""
        raise DistillError(
            f"{config} is a task of a plan; put it in one ([runs.student] config = {config!r}) and run kdgraft plan"
        )

    def check(self, config: str, options: Sequence[str] = (), **told: Any) -> None:
        """Raise a :class:`DistillError`, as :meth:`train` does."""
        self.train(config)

    def test(self, config: str, checkpoint: str, options: Sequence[str] = (), **told: Any) -> Mapping[str, float]:
        """Raise a :class:`DistillError`, as :meth:`train` does."""
        raise DistillError(f"{config} is a task of a plan, which evaluates it; see the metrics in the run's folder")

    def export(self, checkpoint: str | Path, out: str | Path, **told: Any) -> Sequence[Path]:
        """Raise a :class:`DistillError`: :func:`~kdgraft.fit.fit` saves the plain student already."""
        raise DistillError(
            f"{checkpoint}: a plan's student and peers are plain already, see student.pth and peer_<name>.pth in the run's folder"
        )


TRAINER = PlainTrainer()


@torch.no_grad()
def _measured(task: Task, model: nn.Module) -> dict[str, float]:
    """Return what a task measures of a model."""
    return {} if task.evaluate is None else {name: float(value) for name, value in task.evaluate(model).items()}


def _example(task: Task) -> Any:
    """Return one sample of the first batch, as the models will see it."""
    inputs, targets = tree_map(
        lambda part: part[:1] if isinstance(part, Tensor) and part.ndim else part, pair_of(next(iter(task.loader)))
    )
    views = task.settings.get("views")
    if views is not None:
        inputs, _ = views(inputs, targets)
    return inputs if isinstance(inputs, (Tensor, Views)) else (inputs,)  # the model's only argument, as fit gives it


def _teacher(where: str, given: Any) -> Teacher:
    """Build a teacher from a finished run or ``{config, options, checkpoint}``."""
    if isinstance(given, TrainedModel):
        given = {"config": given.config, "options": given.options, "checkpoint": given.weights}
    return Teacher(_model(where, given, _TEACHER), given.get("checkpoint"))


def _peer(where: str, given: Any) -> nn.Module:
    """Build a further student from ``{config, options}``, which trains on the student's own loss and data."""
    return _model(where, given, _TEACHER[:2])


def _model(where: str, given: Any, known: Sequence[str]) -> nn.Module:
    if not isinstance(given, Mapping):
        raise DistillError(f"{where} must be a table with config = 'file.py:function', got {given!r}")
    for key in given:
        if key not in known:
            raise DistillError(f"{where} takes no argument {key!r}{nearest(key, known)}")
    if "config" not in given:
        raise DistillError(f"{where} needs config = 'file.py:function'")
    return student_of(_task(given["config"], given.get("options", {})).model)


_TEACHER = ("config", "options", "checkpoint")


def _transferred(task: Task, data: TransferSet, seed: int) -> Task:
    """Return a task with other data to train on; what it is evaluated on stays."""
    if data.set is not None:
        if not TRAINER.reads(data.set):
            raise DistillError(f"data.set must name a function, 'file.py:function', got {data.set!r}")
        with isolated_rng():  # the model that the other task makes is not used
            other = called(data.set, {})
        task = replace(task, loader=other.loader if isinstance(other, Task) else other)
    if data.share != 1:
        task = replace(task, loader=share_of(task.loader, data.share, seed))
    return task if data.labels else replace(task, loader=unlabelled(task.loader))


def _task(config: str, options: Mapping[str, Any]) -> Task:
    """Call the function that a config names.

    Raises:
        DistillError: there is no such file or function, or it does not return a :class:`Task`.
    """
    found = called(config, options)
    if not isinstance(found, Task):
        raise DistillError(f"{config} returned a {type(found).__name__}, not a kdgraft.plain.Task")
    return found


def _starts(config: str) -> bool:
    """Return true if a task's function has an argument ``start``, the file of the weights from which its model starts."""
    return "start" in inspect.signature(function_of(config)).parameters
