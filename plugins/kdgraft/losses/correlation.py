"""Pearson correlation that stays finite: constants correlate with nothing."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .reduction import divide


def correlation_over_items(
    p: Tensor, q: Tensor, weight: Tensor | None = None, total: Callable[[Tensor], Tensor] = lambda part: part
) -> tuple[Tensor, Tensor]:
    """The correlation of each column over the rows, ``(C,)``, and the sum of the rows' weights, ``(1,)``.

    Args:
        p, q: ``(N, C)``.
        weight: ``(N,)``.
        total: sums a tensor over processes (with its gradient), to correlate over the rows of all of them.
    """
    w = torch.ones_like(p[:, :1]) if weight is None else weight[:, None].to(p.dtype)
    count = total(w.sum(0))
    means = [divide(total((w * x).sum(0)), count) for x in (p, q)]
    centred = [((x - mean) * w.sqrt(), count * mean.square()) for x, mean in zip((p, q), means, strict=True)]
    return correlation(centred[0], centred[1], 0, total), count


def correlation(
    first: tuple[Tensor, Tensor],
    second: tuple[Tensor, Tensor],
    dim: int,
    total: Callable[[Tensor], Tensor] = lambda part: part,
) -> Tensor:
    """Of centred values, each with its sum of squared means. Constant ones correlate with nothing: 0, gradient 0."""
    (p, p_means), (q, q_means) = first, second
    pq, pp, qq = (total((a * b).sum(dim)) for a, b in ((p, q), (p, p), (q, q)))
    # What rounding leaves of a constant is none. Not clamp(): the gradient would be q divided by next to nothing.
    rounding = (8 * torch.finfo(p.dtype).eps) ** 2
    # NaN is not below anything: it is no constant, and shows in the value, so that the term is dropped.
    constant = (pp <= rounding * p_means) | (qq <= rounding * q_means) | (pp * qq <= 1e-16)
    return pq.masked_fill(constant, 0) / (pp * qq).masked_fill(constant, 1).sqrt()
