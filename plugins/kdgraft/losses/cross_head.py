"""Cross-head distillation (CrossKD): rescaling of the student's features to the teacher's statistics, and the loss on classes.

Wang, Chen, Zheng, Li, Cheng, Hou, "CrossKD: Cross-Head Knowledge Distillation for Object Detection", CVPR 2024, arXiv 2306.11369.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .reduction import Reduction, divide, reduce_loss, same_shape, upcast
from .scale import power_of_two


def focused_entropy(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    weight: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Binary cross-entropy of independent classes, weighted by the difference of the probabilities (CrossKD 2024).

    .. math:: |p_s - p_t|\,\mathrm{BCE}(p_s, p_t)

    As in the authors' code the factor has a gradient too, unlike that of :func:`~kdgraft.losses.binary_soft_targets`.

    Args:
        student_logits, teacher_logits: one logit per class, of any common shape.
        weight: element weights that broadcast to the logits.
        reduction: over elements.
    """
    same_shape(student_logits, teacher_logits, "focused_entropy")
    s, p = upcast(student_logits), upcast(teacher_logits).sigmoid()
    items = F.binary_cross_entropy_with_logits(s, p, reduction="none") * (s.sigmoid() - p).abs()
    return reduce_loss(items, weight, reduction)


def align_scale(
    student_features: Tensor,
    teacher_features: Tensor,
    valid: Tensor | None = None,
    total: Callable[[Tensor], Tensor] = lambda part: part,
) -> Tensor:
    r"""Return the student's features with the teacher's mean and standard deviation, channel by channel.

    .. math:: \frac{s - \mu_s}{\sigma_s + 10^{-6}}\,\sigma_t + \mu_t

    as in the authors' code, over all valid positions of the batch; a channel that is constant in the student becomes
    :math:`\mu_t`, without gradient. Invalid positions take the teacher's values, so that the student's have no effect.

    Args:
        student_features, teacher_features: ``(B, C, H, W)``; the same shape.
        valid: ``(B, H, W)`` of 0 and 1; all valid by default.
        total: sums a tensor over processes, with gradient, for statistics over all processes.
    """
    same_shape(student_features, teacher_features, "align_scale")
    s, t = upcast(student_features), upcast(teacher_features)
    inside = torch.ones_like(s[:, :1]) if valid is None else valid[:, None].to(s)
    s, known = (x.masked_fill(inside == 0, 0) for x in (s, t))
    count = total(inside.sum())
    (mean, std), (teacher_mean, teacher_std) = (_moments(x, inside, count, total) for x in (s, known))
    # Rounding errors of a constant are no variation, and must not be a divisor.
    constant = std <= 8 * torch.finfo(s.dtype).eps * mean.abs()
    scaled = ((s - mean) / (std + 1e-6)).masked_fill(constant, 0) * teacher_std + teacher_mean
    return torch.where(inside == 0, t, scaled)


def _moments(maps: Tensor, inside: Tensor, count: Tensor, total: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Return mean and (unbiased) standard deviation ``(1, C, 1, 1)``, the latter without gradient where it is 0."""
    # The squares, and the sum, of large features would not fit in float32.
    largest = total((maps.detach().abs() / max(maps[:, 0].numel(), 1)).sum((0, 2, 3), keepdim=True))
    size = power_of_two(largest).clamp(min=1)
    maps = maps / size
    mean = divide(total(maps.sum((0, 2, 3), keepdim=True)), count)
    squares = total(((maps - mean).square() * inside).sum((0, 2, 3), keepdim=True))
    variance = squares / (count - 1).clamp(min=1)
    return mean * size, variance.masked_fill(variance == 0, 1).sqrt().masked_fill(variance == 0, 0) * size
