"""Sizes of numbers, for losses that do not depend on it: brings features into a range whose squares float32 can hold."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.no_grad()
def power_of_two(size: Tensor) -> Tensor:
    """The largest power of two that is no larger than each number: dividing by it rounds nothing.

    1 for 0, and for what is not finite, which must stay visible in the loss.
    """
    exponent = torch.frexp(size).exponent - 1
    return torch.ldexp(torch.ones_like(size), exponent).masked_fill(~size.isfinite() | (size <= 0), 1)


def bounded(vectors: Tensor, dim: int) -> Tensor:
    """Vectors divided by a power of two, so that no entry is 2 or more; smaller ones are left as they are.

    Args:
        vectors: any shape, with the channels at ``dim``.
        dim: the channel dimension.
    """
    return vectors / power_of_two(vectors.detach().abs().amax(dim, keepdim=True)).clamp(min=1)


def unit(vectors: Tensor, dim: int, eps: float = 1e-12) -> Tensor:
    """Vectors of length 1, whatever their length before; those shorter than ``eps`` stay shorter."""
    return F.normalize(bounded(vectors, dim), dim=dim, eps=eps)
