"""Rescaling of features, for losses that are independent of their scale, so that their squares do not overflow float32."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.no_grad()
def power_of_two(size: Tensor) -> Tensor:
    """Return the largest power of two that does not exceed each number; division by it causes no rounding.

    The result is 1 for 0, and for numbers that are not finite, which must stay visible in the loss.
    """
    exponent = torch.frexp(size).exponent - 1
    return torch.ldexp(torch.ones_like(size), exponent).masked_fill(~size.isfinite() | (size <= 0), 1)


def bounded(vectors: Tensor, dim: int) -> Tensor:
    """Divide vectors by a power of two so that all entries are below 2; leave smaller vectors as they are.

    Args:
        vectors: any shape, with the channels at ``dim``.
        dim: the channel dimension.
    """
    return vectors / power_of_two(vectors.detach().abs().amax(dim, keepdim=True)).clamp(min=1)


def unit(vectors: Tensor, dim: int, eps: float = 1e-12) -> Tensor:
    """Normalise vectors of any size to length 1; vectors shorter than ``eps`` stay shorter."""
    return F.normalize(bounded(vectors, dim), dim=dim, eps=eps)
