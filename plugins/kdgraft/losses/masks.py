"""Mask regression between two models: divergence of the pixels of binary masks, and dice.

The two losses are those of MaskFormer (Cheng et al., NeurIPS 2021, arXiv 2107.06278) and Mask2Former (CVPR 2022, arXiv 2112.01527), with
the teacher's mask in the place of the true one.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ..errors import check_number
from .reduction import Reduction, reduce_loss, same_shape, upcast
from .soft_targets import binary_soft_targets


def mask_regression(
    student_masks: Tensor,
    teacher_masks: Tensor,
    *,
    masks: float = 5.0,
    dice: float = 5.0,
    valid: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Divergence of pixels and dice to the teacher's masks.

    .. math:: \lambda_m \frac1P \sum_p \mathrm{KL}(t_p \,\|\, s_p)
              + \lambda_d \Big(1 - \frac{2 \sum_p s_p t_p + 1}{\sum_p s_p^2 + \sum_p t_p^2 + 1}\Big)

    with the probabilities s and t of pixels. The KL of Bernoulli distributions is the binary cross-entropy less the teacher's
    entropy, and squares in the denominator (Milletari et al. 2016, arXiv 1606.04797) let equal masks cost nothing.

    Args:
        student_masks, teacher_masks: logits ``(…, P)`` of P pixels; the same shape.
        masks, dice: the weights λ of the two parts; those of Mask2Former by default.
        valid: ``(…, P)``, false for pixels that are left out; all count by default.
        weight: mask weights that broadcast to ``(…,)``.
        reduction: over masks.
    """
    same_shape(student_masks, teacher_masks, "mask_regression")
    for name, value in (("masks", masks), ("dice", dice)):
        check_number("mask_regression", name, value)
    student, teacher = upcast(student_masks), upcast(teacher_masks)
    divergence = binary_soft_targets(student, teacher, 1.0, reduction="none")
    ours, theirs = student.sigmoid(), teacher.sigmoid()
    count: Tensor | int = student.shape[-1]
    if valid is not None:
        valid = valid.expand_as(student)
        divergence, ours, theirs = (part.masked_fill(~valid, 0) for part in (divergence, ours, theirs))
        count = valid.sum(-1).clamp(min=1)
    overlap = (2 * (ours * theirs).sum(-1) + 1) / (ours.square().sum(-1) + theirs.square().sum(-1) + 1)
    return reduce_loss(masks * divergence.sum(-1) / count + dice * (1 - overlap), weight, reduction)


def mask_costs(first: Tensor, second: Tensor, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the two parts of :func:`mask_regression` for all pairs of masks.

    Args:
        first, second: logits ``(…, Q, P)`` and ``(…, R, P)``.
        valid: ``(…, 1, P)``, false for pixels that are left out.

    Returns:
        The divergences of the second masks from the first ones, and 1 − dice, ``(…, Q, R)`` each.
    """
    first, second = upcast(first), upcast(second)
    ours, theirs = first.sigmoid(), second.sigmoid()
    count: Tensor | int = first.shape[-1]
    own, other = F.softplus(first), second * theirs - F.softplus(second)
    if valid is not None:
        first, ours, theirs, own, other = (part.masked_fill(~valid, 0) for part in (first, ours, theirs, own, other))
        count = valid.sum(-1, keepdim=True).clamp(min=1)
    divergence = (own.sum(-1)[..., None] - first @ theirs.mT + other.sum(-1)[..., None, :]) / count
    squares = ours.square().sum(-1)[..., None] + theirs.square().sum(-1)[..., None, :]
    return divergence.clamp(min=0), 1 - (2 * ours @ theirs.mT + 1) / (squares + 1)
