"""Flow of solution procedure (FSP): the products of two layers' features, averaged over positions.

Yim et al., "A Gift from Knowledge Distillation: Fast Optimization, Network Minimization and Transfer Learning", CVPR 2017,
equations 1 and 2.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import DistillError
from .reduction import Reduction, reduce_loss, same_shape, upcast
from .relations import dot

Layers = tuple[Tensor, Tensor]
"""Maps ``(B, C, H, W)`` of two layers of one model; their channels and grids may differ."""
Masks = tuple[Tensor | None, Tensor | None]
"""The positions ``(B, H, W)`` of each layer that count, > 0; ``None`` for all."""


def fsp(student: Layers, teacher: Layers, *, valid: Masks = (None, None), reduction: Reduction = "mean") -> Tensor:
    r"""FSP: squared difference of the flow matrices between two layers (Yim et al. 2017, equation 2).

    .. math:: \frac{1}{C_1 C_2} \|G_s - G_t\|_F^2, \qquad G_{ij} = \frac{1}{HW} \sum_p F^1_{ip} F^2_{jp}

    The larger of the two maps is average-pooled to the grid of the smaller one. The paper's norm is the sum over the entries of the
    matrix, so that its loss is C₁·C₂ times this one.

    Args:
        student: maps of two layers of the student, ``(B, C1, H1, W1)`` and ``(B, C2, H2, W2)``.
        teacher: maps of two layers of the teacher, of the same shapes.
        valid: the positions of the two layers to include; a pooled position includes the valid ones that it covers, and counts if
            both layers have one there.
        reduction: over images (those without a valid position are excluded); ``"none"`` gives ``(B,)``.

    Raises:
        DistillError: the shapes of the student's and the teacher's maps differ, or the two layers are not of the same images.
    """
    items, present = flow_differences(student, teacher, valid)
    return reduce_loss(items, present.to(items.dtype), reduction)


def flow_differences(student: Layers, teacher: Layers, valid: Masks = (None, None)) -> tuple[Tensor, Tensor]:
    """Return the loss of each image ``(B,)``, and ``(B,)``, true for images with a position that counts; see :func:`fsp`."""
    for ours, theirs in zip(student, teacher, strict=True):
        same_shape(ours, theirs, "fsp")
    if len(student[0]) != len(student[1]):
        raise DistillError(
            f"fsp: the layers hold {len(student[0])} and {len(student[1])} images; tap maps of one batch"
        )
    (s, present), (t, _) = (_flow(layers, valid) for layers in (student, teacher))
    return (s - t).square().mean((1, 2)), present


def _flow(layers: Layers, valid: Masks) -> tuple[Tensor, Tensor]:
    """Return the flow matrices ``(B, C1, C2)`` of a model, and which images have a position that counts."""
    height, width = (min(sides) for sides in zip(*(maps.shape[-2:] for maps in layers), strict=True))
    (first, here), (second, there) = (
        _pooled(upcast(maps), mask, (height, width)) for maps, mask in zip(layers, valid, strict=True)
    )
    counts = here & there
    number = counts.flatten(1).sum(1)
    first = first.masked_fill(~counts[:, None], 0)
    return dot(first.flatten(2), second.flatten(2)) / number.clamp(min=1)[:, None, None], number > 0


def _pooled(maps: Tensor, valid: Tensor | None, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Average the valid positions of maps on a grid of ``size``; return also which positions ``(B, h, w)`` cover a valid one."""
    inside = torch.ones_like(maps[:, :1]) if valid is None else (valid > 0).to(maps.dtype)[:, None]
    maps = maps.masked_fill(inside == 0, 0)
    if maps.shape[-2:] == size:
        return maps, inside[:, 0] > 0
    covered = F.adaptive_avg_pool2d(inside, size)
    return F.adaptive_avg_pool2d(maps, size) / covered.masked_fill(covered == 0, 1), covered[:, 0] > 0
