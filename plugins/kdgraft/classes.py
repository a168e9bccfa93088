"""Class names of student and teacher: compared by name, brought into one order."""

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
    """Indices that put the teacher's classes in the student's order.

    Args:
        student, teacher: class names in order, or ``None`` where they are not known.
        sides: where each side's names stand, for messages.

    Returns:
        ``None`` when the order is the same, or when one side does not know its class names (said in a warning).

    Raises:
        WiringError: the names differ.
    """
    if not student or not teacher:
        side = sides[0] if not student else sides[1]
        logger.warning("the %s does not name its classes; taking student's and teacher's classes to be the same", side)
        return None
    student, teacher = list(student), list(teacher)
    if student == teacher:
        return None
    if sorted(student) != sorted(teacher):
        missing = [name for name in student if name not in teacher]
        extra = [name for name in teacher if name not in student]
        raise WiringError(
            f"the teacher was trained on other classes: it lacks {missing[:5]}, and has {extra[:5]} that the student lacks; "
            "drop the terms on class outputs, or use a teacher of the same classes"
        )
    return torch.tensor([teacher.index(name) for name in student])
