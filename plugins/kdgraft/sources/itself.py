"""The student as its own teacher."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from ..batch import Batch
from ..errors import DistillError, check_share
from ..recorder import Recorder
from ..registry import SOURCES
from ..schedules import Step
from ..taps import Recording
from .base import STUDENT, Source
from .teacher import Teacher


@SOURCES.register
class Itself(Source):
    r"""The student's own recording of the same pass, without gradient: deeper layers teach earlier ones.

    Any term may hear it; :class:`~kdgraft.BYOT` adds exits to a classifier's shallow layers, and :class:`~kdgraft.ONE` branches
    beside its last part.

    With a momentum it is the moving average of the student (mean teacher; Tarvainen & Valpola 2017, arXiv 1703.01780):
    a frozen copy in eval mode, which starts as the student does and follows it after each step of the optimizer,
    :math:`\bar\theta \leftarrow m \bar\theta + (1 - m) \theta`. Buffers, such as running statistics, are copied.

    Args:
        momentum: m in [0, 1); ``None`` for the student's recording itself.

    Example:
        >>> distiller = Distiller(student, Itself(momentum=0.99), [SoftTargets()], example=images)
        >>> distiller(images).loss.abs() < 1e-6  # the average starts as the student
        tensor(True)
    """

    def __init__(self, momentum: float | None = None) -> None:
        super().__init__()
        if momentum is not None:
            check_share("Itself", "momentum", momentum)
            if momentum == 1:
                raise DistillError("Itself: with momentum=1 the average never moves; take a Teacher")
        self.momentum = momentum
        self._copy: Teacher | None = None
        self._seen: int | None = None

    @property
    def members(self) -> tuple[str, ...]:
        return (STUDENT,) if self.momentum is None else (self.name,)

    def adopt(self, student: nn.Module) -> None:
        """Create the copy that holds the average; the engine calls this before the dry run."""
        if self.momentum is not None:
            self._copy = Teacher(copy.deepcopy(student))
            self.model = self._copy.model
            self._seen = None  # the average of a new student starts anew

    @torch.no_grad()
    def begin(self, student: nn.Module, at: Step) -> None:
        if self._copy is None or self._seen == at.iteration:  # not the first part of an accumulated batch
            return
        momentum = 0.0 if self._seen is None else self.momentum or 0.0
        ours = dict(student.named_parameters())
        for name, average in self._copy.model.named_parameters():
            average.lerp_(ours[name].to(average.dtype), 1 - momentum)
        buffers = dict(student.named_buffers())
        for name, buffer in self._copy.model.named_buffers():
            buffer.copy_(buffers[name])
        self._seen = at.iteration

    def context(self, device_type: str) -> AbstractContextManager[Any]:
        return super().context(device_type) if self._copy is None else self._copy.context(device_type)

    def record(self, recorder: Recorder, run: Callable[[], Any], batch: Batch, device: torch.device) -> Recording:
        assert self._copy is not None
        return self._copy.record(recorder, run, batch, device)

    def state(self) -> dict[str, Any]:
        return {} if self._copy is None else {"model": self._copy.model.state_dict(), "seen": self._seen}

    def load_state(self, state: Mapping[str, Any]) -> None:
        if self._copy is not None:
            self._copy.model.load_state_dict(state["model"])
            self._seen = state["seen"]

    def apply(self, function: Callable[[Tensor], Tensor]) -> None:
        super().apply(function)
        if self._copy is not None:
            self._copy.apply(function)

    def __deepcopy__(self, memo: dict[int, Any]) -> Itself:
        return self
