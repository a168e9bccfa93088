"""Boxes and rows of dense heads: from a head's raw outputs, level by level, to one row an anchor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from mmdet.models.dense_heads import YOLOXHead
from torch import Tensor


def rows(level: Tensor, width: int) -> Tensor:
    """``(B, A·width, H, W) -> (B, H·W·A, width)`` in float32, in the order of the head's priors; A is the anchors a position."""
    return level.permute(0, 2, 3, 1).reshape(len(level), -1, width).float()


def decode(head: Any, levels: Sequence[Tensor]) -> Tensor:
    """The boxes that a dense head predicts, differentiable and in float32.

    Args:
        head: a head with distributions (GFL), deltas (ATSS, RetinaNet), distances (FCOS, RTMDet) or YOLOX's coding.
        levels: its raw second output: per level ``(B, A·C, H, W)``. FCOS with ``norm_on_bbox`` gives distances in strides while
            it trains and in pixels otherwise, and is read as it then is.

    Returns:
        ``(B, N, 4)`` as x1, y1, x2, y2 in pixels of the padded input, level by level; not clipped to the image.
    """
    generator = head.prior_generator
    settings = dict(dtype=torch.float32, device=levels[0].device)
    sizes = [level.shape[-2:] for level in levels]
    if isinstance(head, YOLOXHead):
        priors = torch.cat(generator.grid_priors(sizes, with_stride=True, **settings))
        return head._bbox_decode(priors, torch.cat([rows(level, 4) for level in levels], 1))
    priors = generator.grid_priors(sizes, **settings)
    coded = [
        _coded(head, level, stride[0], len(grid))
        for level, stride, grid in zip(levels, generator.strides, priors, strict=True)
    ]
    found, anchors = torch.cat(coded, 1), torch.cat(priors)
    if hasattr(head, "integral"):
        anchors = head.anchor_center(anchors)
    return head.bbox_coder.decode(anchors.repeat(len(found), 1), found.flatten(0, 1)).view_as(found)


def _coded(head: Any, level: Tensor, stride: float, count: int) -> Tensor:
    """What the head's box coder decodes on one level: ``(B, N, 4)``."""
    if hasattr(head, "integral"):
        return head.integral(rows(level, 4 * (head.reg_max + 1))).reshape(len(level), count, 4) * stride
    coded = rows(level, 4)
    return coded * stride if head.training and getattr(head, "norm_on_bbox", False) else coded
