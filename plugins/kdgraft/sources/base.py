"""Sources: the models that terms imitate."""

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
    """Base of all sources that a term can imitate.

    It is not an ``nn.Module``, so that ``state_dict``, EMA, optimizers and DDP do not see it. In each step the engine calls
    :meth:`begin`, then :meth:`record` before the student runs, and marks the recording with :attr:`class_order` and
    :attr:`scale`.

    Attributes:
        name: the name by which terms refer to it; ``"teacher"`` unless the host was given several sources.
        class_order: indices that put its classes in the student's order; ``None`` if the order is the same.
        scale: the ratio of its input size to the student's.
        model: the model to record. A source that combines others has none.

    Example:
        >>> class Uncompiled(Source):
        ...     def __init__(self, model):
        ...         super().__init__()
        ...         self.model = model.requires_grad_(False)
        >>> list(Distiller(student, Uncompiled(teacher), ["ForwardKL"], example=images)(images).losses)
        ['distill.forward_kl.loss']
    """

    trains = False
    """True if its parameters are trained beside the student's."""

    model: nn.Module

    def __init__(self) -> None:
        self.name = "teacher"
        self.class_order: Tensor | None = None
        self.scale = 1.0

    @property
    def members(self) -> tuple[str, ...]:
        """The names of the sources whose recordings it combines; its own name if it has a model."""
        return (self.name,)

    def parts(self) -> dict[str, Source]:
        """Return further sources by name that it consists of; hosts and engine treat these as any other source."""
        return {}

    def load(self) -> None:
        """Read weights that are not loaded yet; called when training starts."""

    def begin(self, student: nn.Module, at: Step) -> None:
        """Prepare for a step; called when it starts, after the optimizer has updated the student."""

    def context(self, device_type: str) -> AbstractContextManager[Any]:
        """Return the context, such as an autocast, in which its forward pass runs."""
        return nullcontext()

    def rehearse(self, recorder: Recorder, run: Callable[[], Any]) -> Recording:
        """Record the dry run."""
        self.model.eval()
        return recorder.rehearse(self.model, run)

    def record(self, recorder: Recorder, run: Callable[[], Any], batch: Batch, device: torch.device) -> Recording:
        """Run the model without gradient, as far as the last tap, and return the recording."""
        with self.context(device.type):
            return recorder.record_prefix(self.model, run)

    def marked(self, recording: Recording) -> Recording:
        """Set this source's class order and scale on a recording, and return it."""
        recording.class_order, recording.scale = self.class_order, self.scale
        return recording

    def state(self) -> dict[str, Any]:
        """Return the state that a resumed run needs; see :meth:`load_state`."""
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state`."""

    def apply(self, function: Callable[[Tensor], Tensor]) -> None:
        """Move or convert its tensors, as ``nn.Module._apply`` does."""
        if self.class_order is not None:
            self.class_order = function(self.class_order)


def share_parameters(student: nn.Module, other: nn.Module) -> bool:
    """Return true if the two models share a parameter that is trained."""
    trained = {id(p) for p in student.parameters() if p.requires_grad}
    return any(id(p) in trained for p in other.parameters())


def check_names(sources: Mapping[str, Source]) -> None:
    """Raise a :class:`DistillError` for a source's name that cannot be logged or is reserved."""
    for name in sources:
        if not isinstance(name, str) or not name.isidentifier() or name == STUDENT or "loss" in name:
            raise DistillError(
                f"a source's name must be letters, digits and underscores, not 'student' and without 'loss' in it; got {name!r}"
            )
