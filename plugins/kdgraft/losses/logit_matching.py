"""Logit matching: squared error on the logits, the high-temperature limit of soft targets.

Hinton et al. 2015, arXiv 1503.02531, section 2.1; Ba & Caruana 2014, arXiv 1312.6184.
"""

from __future__ import annotations

from torch import Tensor

from ..registry import LOSSES
from .reduction import Reduction, reduce_loss, same_shape, upcast


@LOSSES.register
def logit_matching(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    center: bool = False,
    dim: int = -1,
    weight: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Squared logit error, halved: mean over classes, mean over items (Ba & Caruana 2014).

    .. math:: \tfrac12 (z_s - z_t)^2

    With the mean (not the sum) over classes it is the limit of :func:`~kdgraft.losses.soft_targets` for
    :math:`T \to \infty`, whose gradient is :math:`(z_s - z_t)/C` for zero-mean logits.

    Args:
        student_logits, teacher_logits: ``(…, C, …)`` with the classes at ``dim``, the same shape.
        center: subtract each item's mean logit first. As in a softmax, a difference of the means then has no effect, and the
            limit holds for any logits.
        dim: the class dimension.
        weight: item weights that broadcast to the shape without ``dim``.
        reduction: over items.
    """
    same_shape(student_logits, teacher_logits, "logit_matching")
    difference = upcast(student_logits) - upcast(teacher_logits)
    if center:
        difference = difference - difference.mean(dim, keepdim=True)
    return reduce_loss(0.5 * difference.square().mean(dim), weight, reduction)
