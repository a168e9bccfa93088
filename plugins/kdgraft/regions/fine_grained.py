"""The region near objects: positions with an anchor whose IoU with an object is close to the best of all anchors.

Wang, Yuan, Zhang, Feng, "Distilling Object Detectors with Fine-Grained Feature Imitation" (FGFI), CVPR 2019, arXiv 1906.03609.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..batch import Batch
from ..errors import DistillError, WiringError, check_number, check_share
from ..registry import REGIONS
from .base import Region, on_grid, valid_positions
from .foreground import BOXES_AT_ONCE


class _Level(NamedTuple):
    """A grid of anchors: rows and columns, the stride (x, y) in pixels, and the anchors ``(A, 4)`` of position (0, 0)."""

    size: tuple[int, int]
    stride: tuple[float, float]
    anchors: Tensor


@REGIONS.register("fine_grained")
class FineGrained(Region):
    """Positions near objects, with equal weight (FGFI; Wang et al., CVPR 2019).

    The threshold of each box is a fraction of the best IoU that any anchor has with it; a position belongs to the region if the
    IoU of one of its anchors with some box exceeds that box's threshold. The best IoU is taken over all levels of the pyramid, so
    that a box marks the levels that can detect it. (The paper and its authors' code have one level.) Positions in the padding have
    weight 0, and their anchors do not count for the best IoU.

    The host may give the student's anchors as ``batch.extra["base_anchors"]``: for each level its stride (x, y) and the anchors
    ``(A, 4)`` around position (0, 0). Where these are ``None``, and for maps whose grid is that of no level, the anchors are
    boxes with sides of ``scale`` strides in the given ratios.

    Args:
        threshold: ψ in [0, 1], the fraction of the best IoU; 0.5 in the paper.
        scale: side of the default anchors in strides.
        ratios: aspect ratios, height / width, of the default anchors at equal area.

    Example:
        >>> batch = Batch(padded_size=(8, 8), boxes=[torch.tensor([[2.0, 2.0, 6.0, 6.0]])])
        >>> FineGrained(threshold=0.6, scale=4.0)(batch, images[:1]).sum()
        tensor(12.)
    """

    needs = frozenset({"boxes"})

    def __init__(
        self, threshold: float = 0.5, *, scale: float = 8.0, ratios: Sequence[float] = (0.5, 1.0, 2.0)
    ) -> None:
        check_share("region 'fine_grained'", "threshold", threshold)
        check_number("region 'fine_grained'", "scale", scale, above=True)
        if not isinstance(ratios, (list, tuple)) or not ratios:
            raise DistillError(f"region 'fine_grained': ratios must be a list of numbers, got {ratios!r}")
        for ratio in ratios:
            check_number("region 'fine_grained'", "a ratio", ratio, above=True)
        self.threshold, self.scale, self.ratios = threshold, scale, tuple(ratios)

    @torch.no_grad()
    def __call__(self, batch: Batch, feature: Tensor, scale: float = 1.0) -> Tensor:
        if feature.ndim != 4 or batch.boxes is None or batch.padded_size is None:
            raise WiringError("region 'fine_grained' needs a map (B, C, H, W) and a batch with boxes")
        boxes = torch.cat([found.to(device=feature.device, dtype=torch.float32) for found in batch.boxes])
        image = torch.arange(len(batch.boxes)).repeat_interleave(torch.tensor([len(found) for found in batch.boxes]))
        image = image.to(feature.device)
        # The anchors are the student's, even if the map of a teacher with larger inputs has a finer grid.
        size = tuple(round(side / scale) for side in feature.shape[-2:])
        own, levels = self._levels(batch, feature, (size[0], size[1]))
        threshold = self.threshold * self._best(batch, boxes, image, levels)
        marks = feature.new_zeros(len(batch.boxes), *own.size, dtype=torch.float32)
        for part in _parts(boxes):
            near = best_overlaps(boxes[part], own) > threshold[part, None, None]
            marks.index_add_(0, image[part], near.to(torch.float32))
        mask = on_grid((marks > 0).to(torch.float32), feature.shape[-2:])
        if batch.image_sizes is None:
            return mask
        valid = valid_positions(batch.image_sizes, batch.padded_size, feature)
        return mask if valid is None else mask * valid

    def _levels(self, batch: Batch, feature: Tensor, size: tuple[int, int]) -> tuple[_Level, list[_Level]]:
        """Return the level of this grid and all levels; a grid that matches no level is appended as one."""
        assert batch.padded_size is not None
        height, width = batch.padded_size
        levels = [
            _Level(
                (math.ceil(height / y), math.ceil(width / x)),
                (x, y),
                self._squares(x, y, feature) if anchors is None else anchors.to(feature.device, torch.float32),
            )
            for (x, y), anchors in batch.extra.get("base_anchors", ())
        ]
        for level in levels:
            if level.size == size:
                return level, levels
        x, y = width / size[1], height / size[0]
        own = _Level(size, (x, y), self._squares(x, y, feature))
        return own, [*levels, own]

    def _squares(self, x: float, y: float, feature: Tensor) -> Tensor:
        ratio = feature.new_tensor(self.ratios, dtype=torch.float32)
        half = torch.stack([x * self.scale / ratio.sqrt() / 2, y * self.scale * ratio.sqrt() / 2], 1)
        centre = half.new_tensor([x / 2, y / 2])
        return torch.cat([centre - half, centre + half], 1)

    def _best(self, batch: Batch, boxes: Tensor, image: Tensor, levels: Sequence[_Level]) -> Tensor:
        """Return the best IoU ``(n,)`` of each box with any anchor of a valid position, computed once for all maps of a step."""

        def find() -> Tensor:
            best = boxes.new_zeros(len(boxes))
            for level in levels:
                valid = _valid(batch, level, boxes)
                for part in _parts(boxes):
                    overlaps = best_overlaps(boxes[part], level)
                    if valid is not None:
                        overlaps = overlaps * valid[image[part]]
                    best[part] = torch.maximum(best[part], overlaps.flatten(1).amax(1))
            return best

        return batch.once(("fine_grained", self.scale, self.ratios, *(level.stride for level in levels)), find)


def _parts(boxes: Tensor) -> list[slice]:
    """Split the boxes of the batch into slices of a fixed size, so that memory does not grow with their number."""
    at_once = 4 * BOXES_AT_ONCE
    return [slice(first, first + at_once) for first in range(0, len(boxes), at_once)]


def best_overlaps(boxes: Tensor, level: _Level) -> Tensor:
    """Return the best IoU of each box ``(n, 4)`` with the anchors of each position: ``(n, H, W)``."""
    height, width = level.size
    best = boxes.new_zeros(len(boxes), height, width)
    x1, y1, x2, y2 = (edge[:, None] for edge in boxes.unbind(1))
    area = (x2 - x1) * (y2 - y1)
    left = torch.arange(width, device=boxes.device) * level.stride[0]
    top = torch.arange(height, device=boxes.device) * level.stride[1]
    for a in level.anchors:
        across = (torch.minimum(x2, left + a[2]) - torch.maximum(x1, left + a[0])).clamp(min=0)
        down = (torch.minimum(y2, top + a[3]) - torch.maximum(y1, top + a[1])).clamp(min=0)
        overlap = down[:, :, None] * across[:, None, :]
        union = (area + (a[2] - a[0]) * (a[3] - a[1]))[:, :, None] - overlap
        best = torch.maximum(best, overlap / union.clamp(min=1e-6))
    return best


def _valid(batch: Batch, level: _Level, place: Tensor) -> Tensor | None:
    """Return 1 for positions of a level that lie in the images, ``(B, H, W)``; ``None`` if all do."""
    if batch.image_sizes is None or batch.padded_size is None:
        return None
    return valid_positions(batch.image_sizes, batch.padded_size, place.new_empty(level.size))
