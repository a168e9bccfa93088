"""Pearson correlation that stays finite: constants correlate with nothing, and no square overflows."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .reduction import divide
from .scale import power_of_two


class Centred(NamedTuple):
    """Values less their mean, the sum of the squared means, and what both were divided by before they were squared."""

    values: Tensor
    squared_means: Tensor
    scale: Tensor


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
    first, second = (_centred(x, w, count, total) for x in (p, q))
    return correlation(first, second, 0, total), count


def _centred(x: Tensor, w: Tensor, count: Tensor, total: Callable[[Tensor], Tensor]) -> Centred:
    # Divided before it is summed: of rows close to what float32 can hold even the sum would overflow.
    scale = power_of_two(total((x.detach().abs() / max(len(x), 1)).sum(0)))
    x = x / scale
    mean = divide(total((w * x).sum(0)), count)
    return Centred((x - mean) * w.sqrt(), count * mean.square(), scale)


def correlation(
    first: Centred, second: Centred, dim: int, total: Callable[[Tensor], Tensor] = lambda part: part
) -> Tensor:
    """Constant values correlate with nothing: 0, gradient 0. So do values that hardly vary before they are scaled."""
    (p, p_means, p_scale), (q, q_means, q_scale) = first, second
    pq, pp, qq = (total((a * b).sum(dim)) for a, b in ((p, q), (p, p), (q, q)))
    # What rounding leaves of a constant is none. Not clamp(): the gradient would be q divided by next to nothing.
    rounding = (8 * torch.finfo(p.dtype).eps) ** 2
    # NaN is not below anything: it is no constant, and shows in the value, so that the term is dropped.
    constant = (pp <= rounding * p_means) | (qq <= rounding * q_means)
    constant |= (pp * qq).detach().sqrt() * (p_scale * q_scale) <= 1e-8
    return pq.masked_fill(constant, 0) / (pp * qq).masked_fill(constant, 1).sqrt()
