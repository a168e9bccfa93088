"""Distillation in plain PyTorch: one module around the student and its sources."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .batch import Batch, Samples
from .engine import Engine
from .errors import DistillError, WiringError, check_number
from .registry import RECIPES, expand_recipe, listed
from .schedules import Step
from .sources import Source, Teacher, gather_sources
from .sources.base import share_parameters
from .step import StepInProgress, scaled
from .views import Views, run_on


@dataclass
class DistillOutput:
    """The result of a call of :class:`Distiller`.

    Attributes:
        student: the student's output.
        losses: the weighted distillation losses by name.
        peers: the output of each peer by name; train the peers on the task's loss as well.
        host_share: factor that active terms leave to the task's own loss: 1 unless there is a ``TaskShare``, or a ``SoftTargets``
            with a ``hard_weight``.
        peer_shares: the same factor for the task's own loss of each peer.
        figures: values for a log: ``distill.<term>.raw``, the loss before its weight, and ``distill.<term>.weight``.
        settle: sets the weights that depend on the task's own loss, given that loss, and returns the losses of these terms, which are
            0 until then; ``None`` in steps where no weight does. :meth:`total` calls it.

    Example:
        >>> out = Distiller(student, teacher, ["ForwardKL"], example=images)(images)
        >>> torch.equal(out.total(torch.tensor(2.0)), 2.0 + out.loss)
        True
    """

    student: Any
    losses: dict[str, Tensor]
    peers: dict[str, Any] = field(default_factory=dict)
    host_share: float = 1.0
    peer_shares: dict[str, float] = field(default_factory=dict)
    figures: dict[str, Tensor] = field(default_factory=dict)
    settle: Callable[[Tensor], Mapping[str, Tensor]] | None = field(default=None, repr=False)

    @property
    def loss(self) -> Tensor:
        """The sum of the distillation losses, 0 without any; add the task's own loss to it."""
        values = [value for name, value in self.losses.items() if name.endswith(".loss")]
        return torch.stack(values).sum() if values else torch.zeros(())

    def total(self, task_loss: Tensor) -> Tensor:
        """Return the task's own loss times :attr:`host_share` plus the distillation losses."""
        if self.settle is not None:
            self.losses.update(self.settle(task_loss))
            self.settle = None
        return scaled(task_loss, self.host_share) + self.loss


class Distiller(Engine):
    """Distillation in plain PyTorch: one module around student and teacher.

    Train ``distiller.parameters()`` (those of the student and of the adapters), wrap the distiller in DDP or
    ``accelerator.prepare``, and save ``distiller.student``. In eval mode a call runs the student alone. The distiller counts its
    iterations and saves them with ``state_dict``; for schedules by epoch set ``distiller.epoch``, also after resuming.

    Args:
        student: the model to train.
        teacher: the model to learn from, which is frozen in eval mode; or any :class:`~kdgraft.Source`.
        terms: names, dicts or :class:`~kdgraft.Term` instances.
        example: a small input for the dry run, on the device of the models: a tensor, a tuple or dict of arguments, or
            :class:`~kdgraft.Views` of models whose inputs differ.
        teachers: several teachers by name, instead of ``teacher``; the ``source`` of a term selects one of them.
        recipe: a recipe's name, or ``dict(type=name, …)`` to change its settings. Its terms come before ``terms``.

    Example:
        >>> distiller = Distiller(student, teacher, terms=[SoftTargets(temperature=4), Hint("conv")], example=images)
        >>> out = distiller(images)
        >>> out.total(nn.functional.cross_entropy(out.student, labels)).backward()
        >>> list(out.losses)
        ['distill.soft_targets.loss', 'distill.hint.loss']
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | Source | None = None,
        terms: Sequence[Any] = (),
        example: Any = None,
        *,
        teachers: Mapping[str, Any] | None = None,
        recipe: Any = None,
    ) -> None:
        def frozen(name: str, model: Any) -> Source:
            if not isinstance(model, nn.Module):
                raise DistillError(f"{name} must be a model or a Source, got {type(model).__name__}")
            if share_parameters(student, model):
                raise WiringError(
                    "student and teacher share parameters, which the teacher would freeze; copy.deepcopy one"
                )
            return Teacher(model)

        terms = [*expand_recipe(recipe, RECIPES), *listed(terms)]
        super().__init__(gather_sources(teacher, teachers, frozen), terms)
        self.student = student
        self.epoch = 0
        self.iteration = 0
        self._share, self._completes = 1.0, True
        self._settled = True
        self.load()
        if terms and example is None:
            raise DistillError("terms need example=…, a small input of the models for the dry run, such as one batch")
        views = example if isinstance(example, Views) else Views(example)
        views.check({*self._leaves})
        self.wire(
            student,
            lambda: _plain("the student", student, run_on(student, views.student)),
            lambda source: _plain(source.name, source.model, run_on(source.model, views.of(source.name))),
            frozenset({"labels", "boxes", "valid"}),
        )

    def forward(
        self, *args: Any, targets: Any = None, batch: Batch | None = None, indices: Any = None, **kwargs: Any
    ) -> DistillOutput:
        """Run every source and the student on the same input, or each on its own of :class:`~kdgraft.Views`.

        Args:
            args, kwargs: arguments of all models; one :class:`~kdgraft.Views` where the models' inputs differ.
            targets: classes, for terms that need labels or mix hard and soft targets; or true numbers, for terms on numbers.
            batch: sizes, boxes and so on, for terms with a region.
            indices: the samples' indices in the training set, or other names, for terms that remember samples.
        """
        views = args[0] if len(args) == 1 and isinstance(args[0], Views) else Views(args)
        views.check({*self._leaves})
        if not self.training:
            return DistillOutput(run_on(self.student, views.student, **kwargs), {})
        if not self._settled:
            raise DistillError(
                "weight='auto' compares with the task's own loss: add up the losses of each step by out.total(task_loss)"
            )
        batch = batch if batch is not None else Batch()
        if targets is not None:
            batch.labels = targets
        if indices is not None:
            batch.samples = Samples(_names(indices))
        at, device = Step(self.iteration, self.epoch), next(self.student.parameters()).device

        def run(source: Source) -> Any:
            return run_on(source.model, views.of(source.name), **kwargs)

        with self.step(self.student, batch, at, run, device, parts=1 / self._share) as step:
            output = run_on(self.student, views.student, **kwargs)
        self.iteration += self._completes
        losses = step.losses(later=True)
        self._settled = not step.unweighted
        shares = {name: step.host_share(listener=name) for name in step.outputs}
        settle = None if self._settled else lambda own: self._settle(step, own)
        return DistillOutput(output, losses, step.outputs, step.host_share(), shares, step.figures, settle)

    def _settle(self, step: StepInProgress, own: Tensor) -> Mapping[str, Tensor]:
        self._settled = True
        return step.settle(own)

    @contextmanager
    def part(self, share: float, *, last: bool) -> Iterator[None]:
        """Treat the call in the body as one part of the step's batch, for the accumulation of gradients.

        The losses of the parts add up to that of the whole batch: exactly for terms that are a mean over samples, if ``share`` is
        the part's share of the samples. Schedules count the whole batch as one iteration.

        Args:
            share: the part's share of the batch, in (0, 1]; multiply the task's own loss by it.
            last: true for the last part.
        """
        check_number("Distiller.part", "share", share, above=True)
        self._share, self._completes = share, last
        try:
            yield
        finally:
            self._share, self._completes = 1.0, True

    def get_extra_state(self) -> dict[str, Any]:
        """Return the number of iterations and the hidden state of terms and sources, which ``state_dict`` includes."""
        state = self.live_state()
        kept = {key: state[key] for key in ("hidden", "sources") if state[key]}
        return {"iteration": self.iteration, **kept}

    def set_extra_state(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`get_extra_state`."""
        self.iteration = int(state["iteration"])
        self.load_beyond_modules(state)


def _plain(name: str, model: nn.Module, output: Any) -> Any:
    """Return the output of a dry run; raise a :class:`WiringError` for that of a module around a student."""
    if isinstance(output, DistillOutput):
        raise WiringError(
            f"{name} is a {type(model).__name__} around a student; give its .student here. A NetAug takes no teacher: in a loop of "
            "your own, add the loss on its augmented(x) to that of the Distiller"
        )
    return output


def _names(indices: Any) -> list[Any]:
    """Return one hashable name per sample; raise a :class:`DistillError` for anything else."""
    names = indices.tolist() if isinstance(indices, Tensor) else indices
    if not isinstance(names, (list, tuple, range)) or not all(isinstance(name, Hashable) for name in names):
        raise DistillError(
            f"indices must be a list or a tensor (B,) with one number or name for each sample, got {type(indices).__name__}"
        )
    return list(names)
