"""The region on objects, which gives each object the same total weight."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..batch import Batch
from ..errors import WiringError
from ..registry import REGIONS
from .base import Region


@REGIONS.register("foreground")
class Foreground(Region):
    """Positions on ground-truth boxes; each box has a total weight of 1, so that small objects count as much as large ones.

    Where boxes overlap, a position belongs to the smallest; a box that smaller ones cover completely has no weight.
    """

    needs = frozenset({"boxes"})

    def __call__(self, batch: Batch, feature: Tensor, scale: float = 1.0) -> Tensor:
        if feature.ndim != 4 or batch.boxes is None or batch.padded_size is None:
            raise WiringError("region 'foreground' needs a map (B, C, H, W) and a batch with boxes")
        return foreground_weights(batch.boxes, batch.padded_size, feature)


BOXES_AT_ONCE = 16
"""Number of boxes per image to compare with all positions at a time; memory does not grow with the number of boxes."""


@torch.no_grad()
def foreground_weights(boxes: Sequence[Tensor], padded_size: tuple[int, int], feature: Tensor) -> Tensor:
    """Compute foreground weights that are normalised by area.

    A box covers every position that it touches, at least one. Where boxes overlap, the smallest owns the position. A box spreads
    a weight of 1 evenly over the positions that it owns; the background has weight 0.

    Args:
        boxes: boxes of each image, ``(n, 4)``: x1, y1, x2, y2 in pixels of the padded input.
        padded_size: (height, width) of the padded input.
        feature: a map ``(B, C, H, W)`` on the grid of the weights.

    Returns:
        The weights ``(B, H, W)`` in float32.
    """
    height, width = feature.shape[-2:]
    device = feature.device
    most = max((len(b) for b in boxes), default=0)
    weights = torch.zeros(len(boxes), height, width, device=device)
    if most == 0:
        return weights
    padded = torch.zeros(len(boxes), most, 4, device=device)
    real = torch.zeros(len(boxes), most, dtype=torch.bool, device=device)
    for image, found in enumerate(boxes):
        padded[image, : len(found)] = found.to(device=device, dtype=torch.float32)
        real[image, : len(found)] = True
    x1, y1, x2, y2 = padded.unbind(-1)
    area = ((x2 - x1).clamp(min=0) * (y2 - y1).clamp(min=0)).masked_fill(~real, torch.inf)
    cover_y = _touched(y1, y2, padded_size[0] / height, height)
    cover_x = _touched(x1, x2, padded_size[1] / width, width)
    cover_y, cover_x = cover_y & real[..., None], cover_x & real[..., None]
    smallest = torch.full_like(weights, torch.inf)
    owner = torch.zeros_like(weights, dtype=torch.long)
    for first in range(0, most, BOXES_AT_ONCE):
        part = slice(first, first + BOXES_AT_ONCE)
        cover = cover_y[:, part, :, None] & cover_x[:, part, None, :]
        size, place = area[:, part, None, None].expand_as(cover).masked_fill(~cover, torch.inf).min(1)
        owner = torch.where(size < smallest, place + first, owner)
        smallest = torch.minimum(smallest, size)
    covered = smallest.isfinite().to(torch.float32)
    counts = torch.zeros(len(boxes), most, device=device).scatter_add_(1, owner.flatten(1), covered.flatten(1))
    return covered / counts.gather(1, owner.flatten(1)).view_as(covered).clamp(min=1)


def _touched(low: Tensor, high: Tensor, stride: float, count: int) -> Tensor:
    """Mark those of ``count`` cells of ``stride`` pixels that each interval touches, at least one: ``(B, n) -> (B, n, count)``."""
    first = (low / stride).floor().clamp(0, count - 1)
    last = torch.maximum((high / stride).ceil() - 1, first).clamp(max=count - 1)
    cells = torch.arange(count, device=low.device)
    return (cells >= first[..., None]) & (cells <= last[..., None])
