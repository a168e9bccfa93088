"""Pearson correlation that stays finite: the correlation of constants is 0, and no square overflows."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .reduction import divide
from .scale import power_of_two


class Centred(NamedTuple):
    """Centred values, the sum of the squared means, and the scale by which the values were divided first."""

    values: Tensor
    squared_means: Tensor
    scale: Tensor


def correlation_over_items(
    p: Tensor, q: Tensor, weight: Tensor | None = None, total: Callable[[Tensor], Tensor] = lambda part: part
) -> tuple[Tensor, Tensor]:
    """Return the correlation ``(C,)`` of each column over the rows, and the sum ``(1,)`` of the rows' weights.

    Args:
        p, q: the values ``(N, C)``.
        weight: weights of the rows ``(N,)``.
        total: sums a tensor over processes, with gradient, to correlate over the rows of all processes.
    """
    w = torch.ones_like(p[:, :1]) if weight is None else weight[:, None].to(p.dtype)
    count = total(w.sum(0))
    first, second = (_centred(x, w, count, total) for x in (p, q))
    return correlation(first, second, 0, total), count


def _centred(x: Tensor, w: Tensor, count: Tensor, total: Callable[[Tensor], Tensor]) -> Centred:
    # Divide before summing: the sum of rows near the limit of float32 would overflow.
    scale = power_of_two(total((x.detach().abs() / max(len(x), 1)).sum(0)))
    x = x / scale
    mean = divide(total((w * x).sum(0)), count)
    return Centred((x - mean) * w.sqrt(), count * mean.square(), scale)


def correlation(
    first: Centred, second: Centred, dim: int, total: Callable[[Tensor], Tensor] = lambda part: part
) -> Tensor:
    """Return the correlation along ``dim``; 0, with gradient 0, for values that are constant or hardly vary before scaling."""
    (p, p_means, p_scale), (q, q_means, q_scale) = first, second
    pq, pp, qq = (total((a * b).sum(dim)) for a, b in ((p, q), (p, p), (q, q)))
    # Rounding errors of a constant are no variation. With clamp() the gradient would be q divided by a tiny number.
    rounding = (8 * torch.finfo(p.dtype).eps) ** 2
    constant = (pp <= rounding * p_means) | (qq <= rounding * q_means)
    constant |= (pp * qq).detach().sqrt() * (p_scale * q_scale) <= 1e-8
    # What is not finite must reach the value, so that the term is dropped: masked, its gradient would be 0 · inf all the same.
    constant &= pp.isfinite() & qq.isfinite()
    return pq.masked_fill(constant, 0) / (pp * qq).masked_fill(constant, 1).sqrt()
