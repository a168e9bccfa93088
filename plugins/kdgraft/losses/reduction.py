"""Helpers of all losses: fp32 under autocast, and a weighted reduction that gives 0, not NaN, for an empty batch."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ..errors import DistillError

Reduction = Literal["none", "sum", "mean"]


class Ratio(NamedTuple):
    """A loss as numerator, the sum over this process, and denominator.

    They are kept apart so that several processes divide by their common denominator. Both have shape ``(K,)``, or ``()`` for
    K = 1: K parts, such as the levels of a pyramid, are divided separately and then added. Only the numerator carries a
    gradient.
    """

    numerator: Tensor
    denominator: Tensor

    def value(self) -> Tensor:
        """Return the loss of this process alone: the sum of the K quotients; 0 with a live graph where a denominator is 0."""
        return divide(self.numerator, self.denominator).sum()


def divide(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Return ``numerator / denominator``, or the numerator (an empty sum, 0 with its graph) where the denominator is 0."""
    return numerator / torch.where(denominator == 0, torch.ones_like(denominator), denominator)


def upcast(tensor: Tensor) -> Tensor:
    """Convert half precisions to float32; leave float32 and float64 as they are."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def same_shape(student: Tensor, teacher: Tensor, loss: str) -> None:
    """Raise a :class:`DistillError` unless the two shapes are equal, as broadcasting would hide mistakes."""
    if student.shape != teacher.shape:
        raise DistillError(
            f"{loss}: student {tuple(student.shape)} and teacher {tuple(teacher.shape)} must have the same shape"
        )


def weighted_ratio(values: Tensor, weight: Tensor | None = None) -> Ratio:
    """Return the sum of ``weight * values`` and the sum of ``weight`` (the number of values without weights).

    Values with weight 0 are excluded, even if they are infinite.
    """
    if weight is None:
        return Ratio(values.sum(), values.new_full((), float(values.numel())))
    weight = weight.to(values.dtype).expand_as(values)
    return Ratio((values.masked_fill(weight == 0, 0) * weight).sum(), weight.sum().detach())


def reduce_loss(values: Tensor, weight: Tensor | None = None, reduction: Reduction = "mean") -> Tensor:
    """Reduce a loss per item.

    Args:
        values: loss per item, any shape.
        weight: item weights that broadcast to ``values``, or ``None``.
        reduction: ``"none"`` (weighted values), ``"sum"``, or ``"mean"`` = sum(w·v) / sum(w). Without any item, or with all
            weights 0, sum and mean are 0 with a live graph.
    """
    if reduction == "none":
        return values if weight is None else values.masked_fill(weight.expand_as(values) == 0, 0) * weight
    ratio = weighted_ratio(values, weight)
    if reduction == "sum":
        return ratio.numerator
    if reduction == "mean":
        return ratio.value()
    raise DistillError(f"reduction must be 'none', 'sum' or 'mean', got {reduction!r}")
