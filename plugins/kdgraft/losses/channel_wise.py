"""Channel-wise distillation: each channel's activations as a distribution over positions.

Shu, Liu, Gao, Yan, Shen, "Channel-wise Knowledge Distillation for Dense Prediction", ICCV 2021, arXiv 2011.13256.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .reduction import Reduction, reduce_loss, same_shape, upcast
from .soft_targets import check_temperature


def channel_wise(
    student: Tensor,
    teacher: Tensor,
    temperature: float = 4.0,
    *,
    valid: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Channel-wise distillation (CWD): KL of each channel's softmax over positions (Shu et al. 2021).

    .. math:: \frac{T^2}{C} \sum_c \sum_i \phi(t_{c,i}) \log \frac{\phi(t_{c,i})}{\phi(s_{c,i})}, \qquad
              \phi(x_{c,i}) = \frac{\exp(x_{c,i} / T)}{\sum_j \exp(x_{c,j} / T)}

    Args:
        student, teacher: logits or features ``(B, C, H, W)``, the same shape.
        temperature: T > 0.
        valid: ``(B, H, W)``, true (or > 0) for the positions to include; all by default.
        reduction: over images and channels; ``"none"`` gives ``(B, C)``. Images without a valid position are excluded.

    Raises:
        DistillError: the shapes differ or T <= 0.
    """
    same_shape(student, teacher, "channel_wise")
    check_temperature(temperature)
    log_student, log_teacher = (
        _log_distribution(upcast(maps).flatten(2) / temperature, valid) for maps in (student, teacher)
    )
    items = (log_teacher.exp() * (log_teacher - log_student)).sum(2) * temperature**2
    weight = None if valid is None else (valid.flatten(1) > 0).any(1, keepdim=True).to(items.dtype)
    return reduce_loss(items, weight, reduction)


def _log_distribution(scores: Tensor, valid: Tensor | None) -> Tensor:
    """Compute the log-softmax over valid positions; 0 (not minus infinity, whose gradient is NaN) elsewhere."""
    if valid is None:
        return scores.log_softmax(2)
    outside = (valid.flatten(1) <= 0)[:, None]
    lowest = torch.finfo(scores.dtype).min
    return scores.masked_fill(outside, lowest).log_softmax(2).masked_fill(outside, 0)
