"""Focal and global distillation: attention-weighted features, separated into foreground and background, and a global relation.

Yang, Li, Jiang, Gong, Yuan, Zhao, Yuan, "Focal and Global Knowledge Distillation for Detectors" (FGD), CVPR 2022,
arXiv 2111.11837. In all functions ``valid`` is ``(B, H, W)``, > 0 for the positions to include (all by default). The authors
include padding as background and in the softmax; without padding both are the same.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..regions.foreground import BOXES_AT_ONCE
from .hint import hint
from .reduction import Reduction, reduce_loss, same_shape, upcast
from .soft_targets import check_temperature


def spatial_attention(features: Tensor, temperature: float = 0.5, *, valid: Tensor | None = None) -> Tensor:
    r"""Attention of positions, :math:`N \operatorname{softmax}_i(\operatorname{mean}_c |F_{ci}| / T)` over the N valid positions.

    ``(B, C, H, W) -> (B, H, W)``; 0 at positions that are not valid.
    """
    strength = _inside(features, valid).abs().mean(1)
    share = _softmax(strength.flatten(1) / temperature, valid)
    return (share * _count(strength, valid)[:, None]).view_as(strength)


def channel_attention(features: Tensor, temperature: float = 0.5, *, valid: Tensor | None = None) -> Tensor:
    r"""Attention of channels, :math:`C \operatorname{softmax}_c(\operatorname{mean}_i |F_{ci}| / T)`: ``(B, C, H, W) -> (B, C)``."""
    strength = _inside(features, valid).abs()
    mean = strength.flatten(2).sum(2) / _count(strength, valid).clamp(min=1)[:, None]
    return (mean / temperature).softmax(1) * features.shape[1]


@torch.no_grad()
def box_scales(
    boxes: Sequence[Tensor], padded_size: tuple[int, int], feature: Tensor, *, valid: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Compute the scale masks of foreground and background, each ``(B, H, W)`` in float32.

    A position inside boxes has weight 1 / (cells of the smallest of them); the others have weight 1 / (their number in the image).
    As in the authors' code a box consists of the cells from floor(low) to ceil(high), inclusive, and its area includes cells
    beyond the map.

    Args:
        boxes: boxes of each image, ``(n, 4)``: x1, y1, x2, y2 in pixels of the padded input.
        padded_size: (height, width) of the padded input, which the map covers. (The authors scale by the image's own size.)
        feature: a map ``(B, C, H, W)`` on the grid of the masks.
        valid: ``(B, H, W)``; positions that are 0 have weight 0 in both masks.
    """
    foreground = torch.stack([_foreground(found, padded_size, feature) for found in boxes])
    background = (foreground == 0).to(foreground.dtype)
    if valid is not None:
        foreground, background = (scale.masked_fill(valid <= 0, 0) for scale in (foreground, background))
    return foreground, background / background.sum((1, 2), keepdim=True).clamp(min=1)


def _foreground(boxes: Tensor, padded_size: tuple[int, int], feature: Tensor) -> Tensor:
    height, width = feature.shape[-2:]
    if len(boxes) == 0:
        return torch.zeros(height, width, device=feature.device)
    boxes = boxes.to(device=feature.device, dtype=torch.float32)
    stride = boxes.new_tensor([padded_size[1] / width, padded_size[0] / height])
    low, high = (boxes[:, :2] / stride).floor(), (boxes[:, 2:] / stride).ceil()
    scale = 1 / (high - low + 1).clamp(min=1).prod(1)
    x, y = (torch.arange(count, device=boxes.device) for count in (width, height))
    across = (x >= low[:, :1]) & (x <= high[:, :1])
    down = (y >= low[:, 1:]) & (y <= high[:, 1:])
    best = torch.zeros(height, width, device=boxes.device)
    for part in torch.arange(len(boxes), device=boxes.device).split(BOXES_AT_ONCE):
        found = scale[part, None, None] * (down[part, :, None] & across[part, None, :])
        best = torch.maximum(best, found.amax(0))
    return best


def focal_features(
    student: Tensor,
    teacher: Tensor,
    scale: Tensor,
    temperature: float = 0.5,
    *,
    valid: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Focal distillation (FGD; Yang et al. 2022): squared error weighted by scale and the teacher's attention.

    .. math:: \sum_{c,i} M_i A^S_i A^C_c (t_{ci} - s_{ci})^2

    Args:
        student, teacher: ``(B, C, H, W)``, the same shape.
        scale: ``(B, H, W)``: M = α · foreground + β · background of :func:`box_scales`.
        temperature: T > 0 of the attentions.
        valid: ``(B, H, W)``; positions that are 0 are excluded.
        reduction: over images; ``"none"`` gives ``(B,)``.

    Raises:
        DistillError: the shapes differ or T <= 0.
    """
    same_shape(student, teacher, "focal_features")
    check_temperature(temperature)
    s, t = (_inside(features, valid) for features in (student, teacher))
    channels = channel_attention(t, temperature, valid=valid)[:, :, None, None]
    positions = spatial_attention(t, temperature, valid=valid) * scale
    items = ((t - s).square() * channels).sum(1) * positions
    return reduce_loss(items.flatten(1).sum(1), None, reduction)


def focal_attention(
    student: Tensor,
    teacher: Tensor,
    temperature: float = 0.5,
    *,
    valid: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Attention imitation (FGD; Yang et al. 2022): absolute error of the attentions, summed.

    .. math:: \sum_i |A^S_i(t) - A^S_i(s)| + \sum_c |A^C_c(t) - A^C_c(s)|

    Args:
        student, teacher: ``(B, C, H, W)``, the same shape.
        temperature: T > 0.
        valid: ``(B, H, W)``; positions that are 0 are excluded.
        reduction: over images; ``"none"`` gives ``(B,)``.

    Raises:
        DistillError: the shapes differ or T <= 0.
    """
    same_shape(student, teacher, "focal_attention")
    check_temperature(temperature)
    positions, channels = (
        of(student, temperature, valid=valid) - of(teacher, temperature, valid=valid)
        for of in (spatial_attention, channel_attention)
    )
    return reduce_loss(positions.abs().flatten(1).sum(1) + channels.abs().sum(1), None, reduction)


class GlobalContext(nn.Module):
    """GcBlock without its residual sum: the attention-pooled context that is added to all positions of an image.

    A learned softmax over the valid positions pools the map; conv – layer norm – ReLU – conv follows, and the last convolution is
    initialised to 0, as in the authors' code. ``(B, C, H, W) -> (B, C, 1, 1)``.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = max(channels // 2, 1)
        self.attend = nn.Conv2d(channels, 1, 1)
        self.add = nn.Sequential(
            nn.Conv2d(channels, hidden, 1), nn.LayerNorm([hidden, 1, 1]), nn.ReLU(), nn.Conv2d(hidden, channels, 1)
        )
        nn.init.kaiming_normal_(self.attend.weight, nonlinearity="relu")
        for constant in (self.attend.bias, *self.add[-1].parameters()):
            assert constant is not None
            nn.init.zeros_(constant)

    def forward(self, features: Tensor, valid: Tensor | None = None) -> Tensor:
        """Compute the context; ``features`` must be finite everywhere, including invalid positions."""
        share = _softmax(self.attend(features).flatten(1), valid)
        context = torch.bmm(features.flatten(2), share[:, :, None])
        added: Tensor = self.add(context[..., None])
        return added


class GlobalRelation(nn.Module):
    r"""Global distillation (FGD; Yang et al. 2022): :math:`\sum (R_t(t) - R_s(s))^2`, a learned GcBlock for each.

    Both blocks are trained with the student, as in the authors' code. The module computes in the precision of its parameters, even
    under autocast.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.student = GlobalContext(channels)
        self.teacher = GlobalContext(channels)

    def forward(
        self, student: Tensor, teacher: Tensor, *, valid: Tensor | None = None, reduction: Reduction = "mean"
    ) -> Tensor:
        """Compute the loss of maps ``(B, C, H, W)`` of the same shape, reduced over images; ``"none"`` gives ``(B,)``."""
        same_shape(student, teacher, "global relation")
        dtype = self.student.attend.weight.dtype
        with torch.autocast(student.device.type, enabled=False):
            s, t = (_inside(features, valid).to(dtype) for features in (student, teacher))
            s, t = s + self.student(s, valid), t + self.teacher(t, valid)
        items = hint(s, t, weight=valid, reduction="none").flatten(1).sum(1) * s.shape[1]
        return reduce_loss(items, None, reduction)


def _inside(features: Tensor, valid: Tensor | None) -> Tensor:
    """Set invalid features to 0, as their values, which may be infinite, must not reach the gradient."""
    features = upcast(features)
    return features if valid is None else features.masked_fill((valid <= 0)[:, None], 0)


def _count(maps: Tensor, valid: Tensor | None) -> Tensor:
    """Count the valid positions of each image, ``(B,)``."""
    if valid is None:
        return maps.new_full((len(maps),), float(maps.shape[-2] * maps.shape[-1]))
    return (valid.flatten(1) > 0).sum(1).to(maps.dtype)


def _softmax(scores: Tensor, valid: Tensor | None) -> Tensor:
    """Compute the softmax of ``(B, N)`` over the valid positions; 0 elsewhere."""
    if valid is None:
        return scores.softmax(1)
    outside = valid.flatten(1) <= 0
    return scores.masked_fill(outside, torch.finfo(scores.dtype).min).softmax(1).masked_fill(outside, 0)
