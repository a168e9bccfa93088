"""Sources: who a term listens to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ..batch import Batch
from ..errors import DistillError
from ..recorder import Recorder
from ..schedules import Step
from ..taps import Recording

STUDENT = "student"
"""The name of the student's own recording among those of the sources."""


class Source:
    """Base of everything that a term can listen to.

    It is no ``nn.Module``, so that no ``state_dict``, EMA, optimizer or DDP ever meets it. In each step the engine calls
    :meth:`begin`, then :meth:`record` before the student runs, and marks the recording with :attr:`class_order` and
    :attr:`scale`.

    Attributes:
        name: what terms call it; ``"teacher"`` unless the host was given several.
        class_order: indices that put its classes in the student's order; ``None`` when the order is the same.
        scale: its input size over the student's.
        model: what is recorded. A source that is made of others has none.
    """

    trains = False
    """Whether its parameters are trained beside the student's."""

    model: nn.Module

    def __init__(self) -> None:
        self.name = "teacher"
        self.class_order: Tensor | None = None
        self.scale = 1.0

    @property
    def members(self) -> tuple[str, ...]:
        """The names of the models whose recordings it is made of; its own where it has one."""
        return (self.name,)

    def load(self) -> None:
        """Reads weights that are not there yet. Called when training starts."""

    def begin(self, student: nn.Module, at: Step) -> None:
        """Called when a step starts, with the student as the optimizer left it."""

    def context(self, device_type: str) -> AbstractContextManager[Any]:
        """The context, such as an autocast, that its forward runs in."""
        return nullcontext()

    def rehearse(self, recorder: Recorder, run: Callable[[], Any]) -> Recording:
        """Records the dry run."""
        self.model.eval()
        return recorder.rehearse(self.model, run)

    def record(self, recorder: Recorder, run: Callable[[], Any], batch: Batch, device: torch.device) -> Recording:
        """Runs the model without gradient, no further than the last tap, and returns what was tapped."""
        with self.context(device.type):
            return recorder.record_prefix(self.model, run)

    def marked(self, recording: Recording) -> Recording:
        """The recording with this source's class order and scale."""
        recording.class_order, recording.scale = self.class_order, self.scale
        return recording

    def state(self) -> dict[str, Any]:
        """What a resumed run needs of it; see :meth:`load_state`."""
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restores :meth:`state`."""

    def apply(self, function: Callable[[Tensor], Tensor]) -> None:
        """Moves or converts what it holds, as ``nn.Module._apply`` does."""
        if self.class_order is not None:
            self.class_order = function(self.class_order)


def share_parameters(student: nn.Module, other: nn.Module) -> bool:
    """Whether two models have a trained parameter in common."""
    trained = {id(p) for p in student.parameters() if p.requires_grad}
    return any(id(p) in trained for p in other.parameters())


def check_names(sources: Mapping[str, Source]) -> None:
    """Raises a :class:`DistillError` for a source's name that could not be logged or that means something else."""
    for name in sources:
        if not isinstance(name, str) or not name.isidentifier() or name == STUDENT or "loss" in name:
            raise DistillError(
                f"a source's name is letters, digits and underscores, not 'student' and without 'loss' in it; got {name!r}"
            )
