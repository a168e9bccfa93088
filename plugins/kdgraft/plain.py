"""The host of plain PyTorch: what ``kdgraft plan`` trains is a function that returns a :class:`Task`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .distiller import Distiller
from .errors import DistillError, nearest
from .files import held, written_whole
from .fit import TaskLoss, fit
from .hosts import Job, TrainedModel
from .isolation import isolated_rng
from .registry import RECIPES, expand_recipe
from .sources import Teacher
from .sources.teacher import load_strictly, read_checkpoint

WEIGHTS = "student.pth"


@dataclass
class Task:
    """A training in plain PyTorch.

    Attributes:
        model: the model to train; of a distilled run the student.
        loader: batches of ``(inputs, targets)``.
        loss: the task's own loss of (output, targets).
        epochs: how many.
        optimizer: made from the parameters to train; AdamW by default.
        evaluate: metrics of the model after each epoch.
    """

    model: nn.Module
    loader: Iterable[Any]
    loss: TaskLoss
    epochs: int
    optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer] = torch.optim.AdamW
    evaluate: Callable[[nn.Module], Mapping[str, float]] | None = None


class PlainTrainer:
    """Trains :class:`Task` functions, named ``file.py:function``; a :class:`kdgraft.hosts.HostTrainer`."""

    def reads(self, config: str) -> bool:
        """Whether it names a function: ``file.py:function``."""
        return "::" not in config and ":" in config

    def fingerprint(self, config: str, options: Mapping[str, Any]) -> Any:
        """What the file says, the function's name and its arguments."""
        file, _, name = config.rpartition(":")
        return [Path(file).read_text(encoding="utf-8") if Path(file).is_file() else file, name, dict(options)]

    def carry_out(self, job: Job) -> TrainedModel:
        """Makes one run with :func:`~kdgraft.fit.fit`; one process at a time works in its folder."""
        with held(job.folder):
            return self._fit(job)

    def _fit(self, job: Job) -> TrainedModel:
        torch.manual_seed(job.seed)
        task = _task(job.config, job.options)
        model: nn.Module = task.model
        if job.start is not None:
            load_strictly(model, read_checkpoint(job.start.weights), job.start.weights)
        if job.teachers:
            terms = [*expand_recipe(job.recipe, RECIPES), *job.terms]
            with isolated_rng():  # the same batches in the same order as without teachers
                inputs, _ = next(iter(task.loader))
                teachers = {name: _teacher(given) for name, given in job.teachers.items()}
            model = Distiller(model, terms=terms, example=inputs[:1], teachers=teachers)
        optimizer = task.optimizer([p for p in model.parameters() if p.requires_grad])
        fitted = fit(
            model,
            task.loader,
            task.loss,
            epochs=task.epochs,
            optimizer=optimizer,
            evaluate=task.evaluate,
            folder=job.folder,
            resume=job.resume,
        )
        weights = job.folder / WEIGHTS
        with written_whole(weights) as part:
            torch.save(fitted.model.state_dict(), part)
        return TrainedModel(job.config, str(weights), fitted.history[-1])

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
        """Refused: a script of one's own trains in plain PyTorch; only plans run tasks."""
        raise DistillError(
            f"{config} is a task of a plan; put it in one ([runs.student] config = {config!r}) and run kdgraft plan"
        )

    def check(self, config: str, options: Sequence[str] = (), **told: Any) -> None:
        """Refused, as :meth:`train` is."""
        self.train(config)

    def test(self, config: str, checkpoint: str, options: Sequence[str] = (), **told: Any) -> Mapping[str, float]:
        """Refused, as :meth:`train` is."""
        raise DistillError(f"{config} is a task of a plan, which evaluates it; see the metrics in the run's folder")

    def export(self, checkpoint: str | Path, out: str | Path, **told: Any) -> Sequence[Path]:
        """Refused: what :func:`~kdgraft.fit.fit` trains is the plain student."""
        raise DistillError(f"{checkpoint}: a plan's student is plain already, see student.pth in the run's folder")


TRAINER = PlainTrainer()


def _teacher(given: TrainedModel | Mapping[str, Any]) -> Any:
    """A teacher from a finished run, from ``{config, checkpoint}``, or what the distiller takes as it is."""
    if isinstance(given, TrainedModel):
        given = {"config": given.config, "checkpoint": given.weights}
    if "config" not in given:
        return dict(given)
    for key in given:
        if key not in ("config", "checkpoint"):
            raise DistillError(f"a teacher takes no argument {key!r}{nearest(key, ('config', 'checkpoint'))}")
    return Teacher(_task(given["config"], {}).model, given.get("checkpoint"))


def _task(config: str, options: Mapping[str, Any]) -> Task:
    """Calls the function that a config names.

    Raises:
        DistillError: there is no such file or function, or it returns something else.
    """
    file, _, name = config.rpartition(":")
    path = Path(file)
    if not path.is_file():
        raise DistillError(f"config not found: {file}")
    spec = spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    function = getattr(module, name, None)
    if not callable(function):
        known = [key for key, value in vars(module).items() if inspect.isfunction(value)]
        raise DistillError(f"{file} has no function {name!r}{nearest(name, known)}")
    found = function(**options)
    if not isinstance(found, Task):
        raise DistillError(f"{config} returned a {type(found).__name__}, not a kdgraft.plain.Task")
    return found
