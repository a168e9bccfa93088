"""Inputs of one batch that differ by model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from accelerate.utils import send_to_device
from torch import nn

from .errors import DistillError, nearest


class Views:
    """Inputs of one batch that differ by model: another augmentation of the same images, or another resolution.

    A :class:`~kdgraft.Distiller` takes it instead of its input, also as ``example`` of the dry run. The samples must be the same
    for all models and in the same order.

    Args:
        student: the student's input: a tensor, or a tuple or dict of arguments.
        sources: the inputs of sources by name, such as ``teacher=…``; a source that is not named gets the student's input.

    Example:
        >>> distiller = Distiller(student, teacher, [SoftTargets()], example=images)
        >>> seen_by_the_teacher = images.flip(-1)
        >>> distiller(Views(student=images, teacher=seen_by_the_teacher)).student.shape
        torch.Size([2, 5])
    """

    def __init__(self, student: Any, **sources: Any) -> None:
        self.student, self.sources = student, sources

    def of(self, name: str) -> Any:
        """Return the input of a source."""
        return self.sources.get(name, self.student)

    def check(self, names: Mapping[str, Any] | set[str]) -> None:
        """Raise a :class:`DistillError` for a source that is not among ``names``, those with a model of their own."""
        for name in self.sources:
            if name not in names:
                raise DistillError(
                    f"Views: {name!r} is not a source with a model of its own{nearest(name, sorted(names))}"
                )

    def to(self, device: Any, **how: Any) -> Views:
        """Return the views on a device."""
        student, sources = send_to_device((self.student, self.sources), device, **how)
        return Views(student, **sources)


def run_on(model: nn.Module, given: Any, **more: Any) -> Any:
    """Call a model on a tensor, or on a tuple or dict of arguments."""
    args, kwargs = arguments(given)
    return model(*args, **{**kwargs, **more})


def arguments(given: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the positional and keyword arguments that a tensor, or a tuple or dict of arguments, stands for."""
    if isinstance(given, Mapping):
        return (), dict(given)
    return (tuple(given), {}) if isinstance(given, (tuple, list)) else ((given,), {})
