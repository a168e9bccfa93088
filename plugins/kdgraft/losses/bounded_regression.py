"""Teacher-bounded regression: learn the true box until the student is better than its teacher.

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

    The teacher's box is no target: it may point the wrong way. It is the bound from which on the student is left alone. A bound
    that is no number gives none either. A truth that is infinite, such as the logarithm of a box's width of 0, is left out.

    Args:
        student_boxes, teacher_boxes, targets: ``(…, D)`` in one unit, that of the box coder; the same shape.
        margin: m >= 0, by which the student has to be better; unpublished, 0 by default.
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
    # The difference is masked, not its square: of a box without width, infinitely far for both, 0 · inf would be left in the gradient.
    items = difference.masked_fill(free[..., None], 0).square().sum(-1)
    return reduce_loss(torch.where(bound.isnan(), bound, items), weight, reduction)
