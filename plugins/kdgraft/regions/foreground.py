"""The region on objects, each of which weighs the same."""

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
    """Positions on a ground-truth box; each box weighs 1 in total, so that small objects count as much as large ones.

    Overlapped positions belong to the smallest box; a box that smaller ones hide altogether weighs nothing.
    """

    needs = frozenset({"boxes"})

    def __call__(self, batch: Batch, feature: Tensor, scale: float = 1.0) -> Tensor:
        if feature.ndim != 4 or batch.boxes is None or batch.padded_size is None:
            raise WiringError("region 'foreground' needs a map (B, C, H, W) and a batch with boxes")
        return foreground_weights(batch.boxes, batch.padded_size, feature)


BOXES_AT_ONCE = 16
"""How many boxes of an image are compared with all positions at a time, so that memory does not grow with the number of boxes."""


@torch.no_grad()
def foreground_weights(boxes: Sequence[Tensor], padded_size: tuple[int, int], feature: Tensor) -> Tensor:
    """Area-normalised foreground weights.

    A box covers every position that it touches, at least one. Where boxes overlap, the smallest wins. A box spreads a weight
    of 1 evenly over the positions that it won; the background weighs 0.

    Args:
        boxes: per image ``(n, 4)``: x1, y1, x2, y2 in pixels of the padded input.
        padded_size: (height, width) of the padded input.
        feature: the map ``(B, C, H, W)`` whose grid is meant.

    Returns:
        ``(B, H, W)``, float32.
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
    """Which of ``count`` cells of ``stride`` pixels the intervals touch: ``(B, n) -> (B, n, count)``, at least one each."""
    first = (low / stride).floor().clamp(0, count - 1)
    last = torch.maximum((high / stride).ceil() - 1, first).clamp(max=count - 1)
    cells = torch.arange(count, device=low.device)
    return (cells >= first[..., None]) & (cells <= last[..., None])
