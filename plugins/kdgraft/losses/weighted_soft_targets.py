"""Soft targets with class weights, for the background of detectors, which dominates their predictions.

Chen, Choi, Yu, Han, Chandraker, "Learning Efficient Object Detection Models with Knowledge Distillation", NeurIPS 2017,
equation 3.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ..errors import DistillError, check_number
from ..registry import LOSSES
from .reduction import Reduction, reduce_loss, same_shape, upcast
from .soft_targets import check_temperature


@LOSSES.register
def weighted_soft_targets(
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: float = 1.0,
    *,
    class_weight: Tensor | None = None,
    dim: int = -1,
    weight: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Class-weighted soft cross-entropy: -Σ_c w_c p_t log p_s (Chen et al. 2017; background 1.5, others 1).

    .. math:: -T^2 \sum_c w_c \, p_{t,c}^T \log p_{s,c}^T

    As in the paper this is a cross-entropy, not a KL: it is not 0 where student and teacher agree, and with unequal weights its
    minimum is at :math:`p_s \propto w\,p_t`.

    Args:
        student_logits, teacher_logits: ``(…, C, …)`` with the classes at ``dim``, the same shape.
        temperature: T > 0; 1 in the paper.
        class_weight: weights ``(C,)`` of the classes; equal by default.
        dim: the class dimension.
        weight: item weights that broadcast to the shape without ``dim``.
        reduction: over items.
    """
    same_shape(student_logits, teacher_logits, "weighted_soft_targets")
    check_temperature(temperature)
    log_student = F.log_softmax(upcast(student_logits).movedim(dim, -1) / temperature, -1)
    target = F.softmax(upcast(teacher_logits).movedim(dim, -1) / temperature, -1)
    if class_weight is not None:
        if class_weight.shape != target.shape[-1:]:
            raise DistillError(
                f"weighted_soft_targets: class_weight {tuple(class_weight.shape)} must have {target.shape[-1]} entries"
            )
        target = target * class_weight.to(target)
    # A class to which the student gives probability 0 (log 0) counts only if the teacher's probability is not 0.
    items = -(target * log_student.masked_fill(target == 0, 0)).sum(-1) * temperature**2
    return reduce_loss(items, weight, reduction)


def weighted_binary_soft_targets(
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: float = 1.0,
    *,
    background_weight: float = 1.5,
    weight: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Background-weighted soft cross-entropy of independent classes, each with its own background (after Chen et al. 2017).

    .. math:: -T^2 \big( p_t \log p_s + w_{bg} (1 - p_t) \log (1 - p_s) \big)

    which is :func:`weighted_soft_targets` of the two classes "this one" and "background".

    Args:
        student_logits, teacher_logits: one logit per class, of any common shape.
        temperature: T > 0.
        background_weight: :math:`w_{bg} > 0`.
        weight: element weights that broadcast to the logits.
        reduction: over elements.
    """
    same_shape(student_logits, teacher_logits, "weighted_binary_soft_targets")
    check_temperature(temperature)
    check_number("weighted_binary_soft_targets", "background_weight", background_weight, above=True)
    student, p = upcast(student_logits) / temperature, (upcast(teacher_logits) / temperature).sigmoid()
    items = (p * F.softplus(-student) + background_weight * (1 - p) * F.softplus(student)) * temperature**2
    return reduce_loss(items, weight, reduction)
