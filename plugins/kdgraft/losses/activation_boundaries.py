"""Activation boundaries (AB): each unit is on or off where the teacher's is, by a margin.

Heo, Lee, Yun, Choi, "Knowledge Transfer via Distillation of Activation Boundaries Formed by Hidden Neurons", AAAI 2019, arXiv
1811.03233, section 3.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import check_number
from ..registry import LOSSES
from .reduction import Reduction, reduce_loss, same_shape, upcast


@LOSSES.register
def activation_boundaries(
    student_features: Tensor,
    teacher_features: Tensor,
    *,
    margin: float = 1.0,
    dim: int = 1,
    weight: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""AB: squared hinge that puts the student's units on the teacher's side of 0 (Heo et al. 2019, section 3).

    .. math:: \sum_c [t_c > 0]\,(m - s_c)_+^2 + [t_c \le 0]\,(m + s_c)_+^2

    It is a surrogate, with a gradient, of :func:`sparsity_mismatch`. The features are those before a ReLU. It is 0 only where the
    student keeps the margin, and therefore not for equal features.

    Args:
        student_features, teacher_features: ``(B, C, H, W)``, or ``(…, C)`` with ``dim=-1``; the same shape. Of the teacher only the
            signs count, so that its features may also be those after the ReLU.
        margin: m >= 0; 1 in the paper.
        dim: the dimension of the units.
        weight: position weights that broadcast to the shape without ``dim``.
        reduction: over positions. The authors add up positions, too, and divide by the number of images.
    """
    same_shape(student_features, teacher_features, "activation_boundaries")
    check_number("activation_boundaries", "margin", margin)
    student = upcast(student_features)
    toward = torch.where(teacher_features > 0, -student, student)
    return reduce_loss((margin + toward).clamp(min=0).square().sum(dim), weight, reduction)


@torch.no_grad()
def sparsity_mismatch(
    student_features: Tensor, teacher_features: Tensor, *, dim: int = 1, weight: Tensor | None = None
) -> Tensor:
    r"""Measure the share of units whose state, on or off, differs from the teacher's (Heo et al. 2019, section 3).

    .. math:: \frac{1}{C} \sum_c \left| [s_c > 0] - [t_c > 0] \right|

    Args:
        student_features, teacher_features: ``(B, C, H, W)``, or ``(…, C)`` with ``dim=-1``; the same shape.
        dim: the dimension of the units.
        weight: position weights that broadcast to the shape without ``dim``.

    Returns:
        The mean over positions, in [0, 1], without gradient.
    """
    same_shape(student_features, teacher_features, "sparsity_mismatch")
    differs = (student_features > 0) != (teacher_features > 0)
    return reduce_loss(differs.to(upcast(student_features).dtype).mean(dim), weight)
