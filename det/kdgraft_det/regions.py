"""Regions of objects: upright boxes around the ground truth, and the valuable localization region of their anchors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from mmdet.structures.bbox import BaseBoxes, bbox_overlaps
from torch import Tensor

from kdgraft.batch import Batch
from kdgraft.errors import DistillError
from kdgraft.regions.base import valid_positions


def pixels_inside(batch: Batch, maps: Tensor, counts: Sequence[int]) -> Tensor | None:
    """Return for each object's mask on the grid of ``maps`` ``(B, C, H, W)`` which of its pixels are no padding.

    Args:
        batch: the batch.
        maps: maps of the grid, which cover the padded images.
        counts: the number of objects of each image.

    Returns:
        ``(objects, H·W)``; ``None`` without padding.
    """
    assert batch.image_sizes is not None and batch.padded_size is not None
    inside = valid_positions(batch.image_sizes, batch.padded_size, maps)
    if inside is None:
        return None
    return (inside.flatten(1) > 0).repeat_interleave(torch.tensor(counts, device=maps.device), 0)


def enclosing_boxes(boxes: Tensor | BaseBoxes) -> Tensor:
    """Return the upright boxes ``(n, 4)`` around ground truth boxes of any kind, as x1, y1, x2, y2.

    Args:
        boxes: boxes of a type that mmdet can convert to ``"hbox"``; or a tensor ``(n, 4)`` of upright boxes, ``(n, 5)`` of
            rotated ones (centre, width, height and angle in radians, as in all mm packages) or ``(n, 8)`` of four corners.

    Raises:
        DistillError: the boxes are of another kind.
    """
    if isinstance(boxes, BaseBoxes):
        return boxes.convert_to("hbox").tensor
    size = boxes.shape[-1]
    if size == 5:
        centre, sides, angle = boxes.split((2, 2, 1), -1)
        cos, sin = angle.cos().abs(), angle.sin().abs()
        half = (sides * cos + sides.flip(-1) * sin) / 2
        return torch.cat([centre - half, centre + half], -1)
    if size == 8:
        corners = boxes.unflatten(-1, (4, 2))
        return torch.cat([corners.amin(-2), corners.amax(-2)], -1)
    if size != 4:
        raise DistillError(
            f"ground truth boxes of {size} numbers cannot be read; give them as mmdet's box types (boxtype2tensor=False in the "
            "data_preprocessor), with a converter to 'hbox'"
        )
    return boxes


@torch.no_grad()
def valuable_region(
    anchors: Tensor,
    num_per_level: Sequence[int],
    boxes: Tensor,
    *,
    gamma: float = 0.25,
    topk: int = 9,
    variant: Literal["paper", "code"] = "paper",
) -> Tensor:
    r"""Valuable localization region (VLR) of one image; Zheng et al., CVPR 2022, arXiv 2102.12252, algorithm 1.

    An anchor belongs to the region if :math:`\gamma\,\alpha_{pos} \le \mathrm{DIoU} < \alpha_{pos}` for some box, where
    :math:`\alpha_{pos}` is ATSS's threshold for that box: mean plus standard deviation of the IoU of the ``topk`` anchors
    nearest to its centre on each level. Positives may belong to the region too, as in the authors' code.

    Args:
        anchors: ``(N, 4)`` as x1, y1, x2, y2 in pixels, level by level.
        num_per_level: the number of anchors of each level.
        boxes: ``(G, 4)`` ground truth, in the same format.
        gamma: the lower threshold as a fraction of the upper one.
        topk: the number of nearest anchors on each level.
        variant: ``"paper"`` uses the true DIoU; ``"code"`` divides the overlap by the *anchor's* area, as the authors' code
            does in its ``diou`` mode.

    Returns:
        ``(N,)``: the largest IoU with a box that claims the anchor, 0 outside the region.
    """
    if len(boxes) == 0 or len(anchors) == 0:
        return anchors.new_zeros(len(anchors))
    iou, diou = _iou_and_diou(anchors, boxes, by_anchor=variant == "code")
    centres = (anchors[:, :2] + anchors[:, 2:]) / 2
    box_centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    # By matrix multiplication, the error at a thousand pixels is a third of a pixel, which lets another anchor in.
    distance = torch.cdist(centres, box_centres, compute_mode="donot_use_mm_for_euclid_dist")
    candidates, start = [], 0
    for count in num_per_level:
        nearest = distance[start : start + count].topk(min(topk, count), dim=0, largest=False).indices + start
        candidates.append(iou.gather(0, nearest))
        start += count
    threshold = torch.cat(candidates)
    positive = threshold.mean(0) + (threshold.std(0) if len(threshold) > 1 else 0)
    inside = (diou >= gamma * positive) & (diou < positive)
    return iou.masked_fill(~inside, 0).amax(1)


def _iou_and_diou(anchors: Tensor, boxes: Tensor, *, by_anchor: bool) -> tuple[Tensor, Tensor]:
    a, b = anchors[:, None], boxes[None]
    iou = bbox_overlaps(anchors, boxes)
    enclosing = (torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])).square().sum(-1)
    apart = ((a[..., :2] + a[..., 2:] - b[..., :2] - b[..., 2:]) / 2).square().sum(-1)
    ratio = bbox_overlaps(anchors, boxes, mode="iof") if by_anchor else iou
    return iou, ratio - apart / enclosing.clamp(min=1e-6)
