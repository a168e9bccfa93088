"""Alignment of the student's and the teacher's classes by their names."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from .errors import WiringError

logger = logging.getLogger("kdgraft")


def class_order(
    student: Any, teacher: Any, sides: tuple[str, str] = ("training set", "teacher's checkpoint")
) -> Tensor | None:
    """Return indices that put the teacher's classes in the student's order.

    Args:
        student, teacher: class names in order, or ``None`` if they are not known.
        sides: where the names of each side come from, for messages.

    Returns:
        The indices; ``None`` if the order is the same, or, with a warning, if one side does not name its classes.

    Raises:
        WiringError: the sets of names differ.
    """
    if not student or not teacher:
        side = sides[0] if not student else sides[1]
        logger.warning(
            "the %s does not name its classes; assuming that student and teacher have the same classes", side
        )
        return None
    student, teacher = list(student), list(teacher)
    if student == teacher:
        return None
    if sorted(student) != sorted(teacher):
        missing = [name for name in student if name not in teacher]
        extra = [name for name in teacher if name not in student]
        raise WiringError(
            f"the teacher was trained on other classes: it lacks {missing[:5]}, and has {extra[:5]} that the student lacks; "
            "remove the terms on class outputs, or use a teacher of the same classes"
        )
    return torch.tensor([teacher.index(name) for name in student])


def class_axis(ndim: int) -> int:
    """Return the axis of classes or channels of a tensor of so many axes: 1 for maps ``(B, C, H, W)``, −1 otherwise."""
    return 1 if ndim == 4 else -1


def reordered(logits: Tensor, order: Tensor | None) -> Tensor:
    """Return the teacher's class logits ``(…, C)`` or ``(…, C + 1)`` in the student's order; a background stays last."""
    if order is None:
        return logits
    background = torch.arange(len(order), logits.shape[-1], device=order.device)
    return logits[..., torch.cat([order, background])]
