"""Masks of maps, for losses and networks in which positions that are left out must count in nothing."""

from __future__ import annotations

import torch
from torch import Tensor


def inside(maps: Tensor, valid: Tensor | None) -> Tensor:
    """Set the maps ``(B, C, H, W)`` to 0 where ``valid`` ``(B, H, W)`` is 0, so that a convolution reads zero padding there."""
    return maps if valid is None else maps.masked_fill((valid <= 0)[:, None], 0)


def present_positions(maps: Tensor, valid: Tensor | None) -> Tensor:
    """Return a mask ``(B, H, W)`` of the positions that count: all by default."""
    return torch.ones_like(maps[:, 0], dtype=torch.bool) if valid is None else valid > 0


def image_means(values: Tensor, valid: Tensor | None) -> Tensor:
    """Return the mean ``(B,)`` of ``(B, H, W)`` over an image's valid positions; 0 with a live graph without any."""
    if valid is None:
        return values.flatten(1).sum(1) / max(values[:1].numel(), 1)
    present = valid > 0
    return values.masked_fill(~present, 0).flatten(1).sum(1) / present.flatten(1).sum(1).clamp(min=1)


def images_present(valid: Tensor | None) -> Tensor | None:
    """Return a mask ``(B,)`` of the images with a valid position; ``None`` for all."""
    return None if valid is None else (valid > 0).flatten(1).any(1)
