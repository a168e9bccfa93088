"""Soft targets: the student learns the teacher's softened class probabilities.

Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015, arXiv 1503.02531, section 2.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import FLOAT32_MAX, DistillError, check_number, check_share, is_number
from ..registry import LOSSES
from .reduction import Reduction, reduce_loss, same_shape, upcast


@LOSSES.register
def soft_targets(
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: float = 4.0,
    *,
    dim: int = -1,
    weight: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Soft targets: KL of the softened class probabilities, summed over classes, mean over items (Hinton 2015).

    .. math:: T^2 \, \mathrm{KL}(p_t^T \,\|\, p_s^T)

    The factor :math:`T^2` keeps the size of the gradient independent of :math:`T`: per logit it is :math:`T (q_i - p_i)`, which
    for large :math:`T` tends to that of :func:`~kdgraft.losses.logit_matching`.

    Args:
        student_logits, teacher_logits: ``(…, C, …)`` with the classes at ``dim``, the same shape. Natural-log units.
        temperature: T > 0.
        dim: the class dimension; 1 for dense maps ``(B, C, H, W)``.
        weight: item weights that broadcast to the shape without ``dim``.
        reduction: over items; see :func:`~kdgraft.losses.reduction.reduce_loss`.

    Raises:
        DistillError: the shapes differ or T <= 0.
    """
    same_shape(student_logits, teacher_logits, "soft_targets")
    check_temperature(temperature)
    log_student = F.log_softmax(upcast(student_logits) / temperature, dim)
    log_teacher = F.log_softmax(upcast(teacher_logits) / temperature, dim)
    items = F.kl_div(log_student, log_teacher, reduction="none", log_target=True).sum(dim) * temperature**2
    return reduce_loss(items, weight, reduction)


def binary_soft_targets(
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: float = 1.0,
    *,
    focus: float = 0.0,
    weight: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Soft targets for independent sigmoid outputs: KL of the Bernoulli distributions, per element.

    .. math:: T^2 |p_t - p_s|^\gamma \, \mathrm{KL}(\sigma_t \,\|\, \sigma_s)

    This is binary cross-entropy less the teacher's entropy, so that equal outputs give 0; it is not reduced over classes.

    Args:
        student_logits, teacher_logits: one logit per class, of any common shape.
        temperature: T > 0, divides both logits; the factor T² as in :func:`soft_targets`.
        focus: :math:`\gamma \ge 0`; values above 0 reduce the weight of elements on which the two agree, without a gradient
            through the factor; 1 as in CrossKD (arXiv 2306.11369).
        weight: element weights that broadcast to the logits.
        reduction: over elements.
    """
    same_shape(student_logits, teacher_logits, "binary_soft_targets")
    check_temperature(temperature)
    check_number("binary_soft_targets", "focus", focus)
    student, teacher = upcast(student_logits) / temperature, upcast(teacher_logits) / temperature
    p = teacher.sigmoid()
    # softplus(s) - p·s is BCE(s, p); the same at s = t is the teacher's entropy.
    items = (F.softplus(student) - F.softplus(teacher) - p * (student - teacher)) * temperature**2
    if focus:
        items = items * (p - student.detach().sigmoid()).abs() ** focus
    return reduce_loss(items, weight, reduction)


def mixed_targets(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    temperature: float = 4.0,
    hard_weight: float = 0.1,
    ignore_index: int = -100,
    dim: int = -1,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Mixture of hard and soft targets.

    .. math:: \lambda\,\mathrm{CE}(y, p_s) + (1-\lambda)\,T^2\,\mathrm{KL}(p_t^T\|p_s^T)

    The paper recommends a *considerably lower* weight on the hard loss.

    Args:
        student_logits, teacher_logits: ``(…, C, …)`` with the classes at ``dim``.
        labels: class indices of the shape without ``dim``.
        temperature: temperature of the soft part; that of the hard part is 1.
        hard_weight: λ in [0, 1].
        ignore_index: the label of items that both parts exclude.
        dim: the class dimension.
        reduction: over the items that are not ignored; 0 with a live graph if there are none.
    """
    check_share("mixed_targets", "hard_weight", hard_weight)
    valid = (labels != ignore_index).to(upcast(student_logits).dtype)
    scores = upcast(student_logits).movedim(dim, 1)
    hard = F.cross_entropy(scores, labels, ignore_index=ignore_index, reduction="none")
    soft = soft_targets(student_logits, teacher_logits, temperature, dim=dim, reduction="none")
    return reduce_loss(hard_weight * hard + (1 - hard_weight) * soft, valid, reduction)


class SoftTargetsLoss(nn.Module):
    """Module with the settings of :func:`soft_targets`, or of :func:`mixed_targets` if labels are given."""

    def __init__(self, temperature: float = 4.0, *, hard_weight: float = 0.1) -> None:
        super().__init__()
        check_temperature(temperature)
        check_share("SoftTargetsLoss", "hard_weight", hard_weight)
        self.temperature, self.hard_weight = temperature, hard_weight

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return the soft targets' loss, or its mixture with the hard loss if ``labels`` are given; a scalar."""
        if labels is None:
            return soft_targets(student_logits, teacher_logits, self.temperature)
        return mixed_targets(
            student_logits, teacher_logits, labels, temperature=self.temperature, hard_weight=self.hard_weight
        )


def check_temperature(temperature: float) -> None:
    """Raise a :class:`DistillError` unless the temperature is > 0, and its square and inverse square fit in float32."""
    if not is_number(temperature) or temperature <= 0:
        raise DistillError(f"temperature must be > 0, got {temperature!r}")
    if not 1 / FLOAT32_MAX <= temperature**2 <= FLOAT32_MAX:
        raise DistillError(f"temperature must be a number whose square float32 holds, got {temperature!r}")
