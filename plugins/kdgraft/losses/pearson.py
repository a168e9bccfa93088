"""Pearson imitation (PKD): correlation of features, independent of their scale.

Cao, Zhang, Liu, Li, Xu, "PKD: General Distillation Framework for Object Detectors via Pearson Correlation Coefficient",
NeurIPS 2022, arXiv 2207.02039.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from .correlation import correlation_over_items
from .reduction import Reduction, reduce_loss, same_shape, upcast


def pearson(
    student_features: Tensor,
    teacher_features: Tensor,
    *,
    dim: int = 1,
    weight: Tensor | None = None,
    reduction: Reduction = "mean",
    total: Callable[[Tensor], Tensor] = lambda part: part,
) -> Tensor:
    r"""1 - Pearson correlation of each channel over all positions of the batch (PKD; Cao et al. 2022).

    .. math:: 1 - r = \tfrac{1}{2 N} \sum_i (\hat s_i - \hat t_i)^2, \qquad \hat x = (x - \mu_x) / \sigma_x

    so that neither the scale nor the offset of a channel matters. The loss of a channel that is constant in either model is 1,
    without gradient, as is that of a channel that hardly varies (product of the two squared sums at most 1e-16).

    Args:
        student_features, teacher_features: ``(B, C, H, W)``, or ``(…, C)`` with ``dim=-1``; the same shape.
        dim: the channel dimension.
        weight: position weights, of the shape without ``dim``; positions with weight 0 are excluded.
        reduction: over channels; ``"none"`` gives ``(C,)``. The loss is 0 if all weights are 0.
        total: sums a tensor over processes, with gradient, to correlate over the positions of all processes.
    """
    same_shape(student_features, teacher_features, "pearson")
    s, t = (upcast(x).movedim(dim, -1) for x in (student_features, teacher_features))
    if weight is not None:
        s, t = (x.masked_fill((weight == 0)[..., None], 0) for x in (s, t))
        weight = weight.reshape(-1)
    found, count = correlation_over_items(s.flatten(0, -2), t.flatten(0, -2), weight, total)
    return reduce_loss((1 - found) * (count > 0), None, reduction)
