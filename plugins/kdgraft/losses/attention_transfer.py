"""Attention transfer (AT) by activations: the strengths of a map's positions follow the teacher's, for any two widths.

Zagoruyko, Komodakis, "Paying More Attention to Attention: Improving the Performance of Convolutional Neural Networks via Attention
Transfer", ICLR 2017, arXiv 1612.03928, equation 2.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ..errors import DistillError
from .reduction import Reduction, reduce_loss, upcast
from .scale import bounded, unit


def attention_transfer(
    student: Tensor,
    teacher: Tensor,
    *,
    variant: Literal["code", "paper"] = "code",
    valid: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Attention transfer (AT): difference of normalised spatial attention maps (Zagoruyko & Komodakis 2017, equation 2).

    .. math:: \frac{1}{N} \|q_s - q_t\|_2^2 \quad\text{(code)}, \qquad \tfrac12 \|q_s - q_t\|_2 \quad\text{(paper)}, \qquad
              q = \frac{a}{\|a\|_2}, \; a_i = \frac{1}{C} \sum_c F_{ci}^2

    Args:
        student, teacher: features ``(B, C, H, W)`` on one grid; the numbers of channels may differ.
        variant: ``"code"`` is the mean of the squared differences over the N positions, with weight 1000 in the authors' code;
            ``"paper"`` is half their distance.
        valid: ``(B, H, W)``, > 0 for the positions to include; all by default.
        reduction: over images (those without a valid position are excluded); ``"none"`` gives ``(B,)``.

    Raises:
        DistillError: the grids differ, or the variant is unknown.
    """
    if student.shape[0] != teacher.shape[0] or student.shape[2:] != teacher.shape[2:]:
        raise DistillError(
            f"attention_transfer: student {tuple(student.shape)} and teacher {tuple(teacher.shape)} must lie on one grid"
        )
    if variant not in ("code", "paper"):
        raise DistillError(f"variant must be 'code' or 'paper', got {variant!r}")
    present = torch.ones_like(teacher[:, 0], dtype=torch.bool) if valid is None else valid > 0
    difference = _attention(student, present) - _attention(teacher, present)
    count = present.flatten(1).sum(1)
    if variant == "code":
        items = difference.square().sum(1) / count.clamp(min=1)
    else:
        items = torch.linalg.vector_norm(difference, dim=1) / 2
    return reduce_loss(items, None if valid is None else (count > 0).to(items.dtype), reduction)


def _attention(maps: Tensor, present: Tensor) -> Tensor:
    """Return unit vectors ``(B, N)`` of the mean squared activations of each image's positions."""
    inside = upcast(maps).masked_fill(~present[:, None], 0)
    return unit(bounded(inside.flatten(1), 1).view_as(inside).square().mean(1).flatten(1), 1)
