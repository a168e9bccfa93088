"""Teacher-bounded regression: the student regresses to the true box until it is better than its teacher.

Chen, Choi, Yu, Han, Chandraker, "Learning Efficient Object Detection Models with Knowledge Distillation", NeurIPS 2017,
equation 4.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import check_number
from .reduction import Reduction, reduce_loss, same_shape, upcast


def bounded_regression(
    student_boxes: Tensor,
    teacher_boxes: Tensor,
    targets: Tensor,
    *,
    margin: float = 0.0,
    weight: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Teacher-bounded regression: squared error to the truth, where the student is not better than the teacher (Chen 2017).

    .. math:: L_b = \|R_s - y\|_2^2 \;\text{ if }\; \|R_s - y\|_2^2 + m > \|R_t - y\|_2^2, \text{ else } 0

    The teacher's box may point in the wrong direction, so it is not a target but a bound: a student that is better than the bound
    has no loss. A bound of NaN makes the loss NaN. An infinite truth, such as the logarithm of a box's width of 0, is excluded.

    Args:
        student_boxes, teacher_boxes, targets: ``(…, D)`` in the units of the box coder; the same shape.
        margin: m >= 0, by which the student must be better than the teacher; the paper does not state its value.
        weight: item weights that broadcast to ``(…,)``.
        reduction: over items.
    """
    for other, name in ((teacher_boxes, "teacher"), (targets, "targets")):
        same_shape(student_boxes, other, f"bounded_regression ({name})")
    check_number("bounded_regression", "margin", margin)
    student, teacher, truth = upcast(student_boxes), upcast(teacher_boxes), upcast(targets)
    difference = student - truth
    bound = (teacher - truth).square().sum(-1)
    free = difference.detach().square().sum(-1) + margin <= bound
    # Mask the difference, not its square: for a box of width 0, infinitely far for both, the gradient would contain 0 · inf.
    items = difference.masked_fill(free[..., None], 0).square().sum(-1)
    return reduce_loss(torch.where(bound.isnan(), bound, items), weight, reduction)
