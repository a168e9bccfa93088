"""Hint: the student's (adapted) features imitate the teacher's.

Romero et al., "FitNets: Hints for Thin Deep Nets", 2015, arXiv 1412.6550, equation 3. For detection: Chen et al. 2017,
section 3.4.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from ..errors import DistillError
from ..registry import LOSSES
from .reduction import Reduction, reduce_loss, same_shape, upcast


@LOSSES.register
def hint(
    student_features: Tensor,
    teacher_features: Tensor,
    *,
    norm: Literal["l2", "l1"] = "l2",
    dim: int = 1,
    weight: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Hint: squared or absolute feature error, mean over channels, mean over positions (FitNets 2015).

    .. math:: (r(s) - t)^2 \quad\text{or}\quad |r(s) - t|

    The adapter :math:`r` is applied beforehand. Without weights this equals torch's ``mse_loss``; the paper's
    :math:`\tfrac12\|\cdot\|^2` differs by a constant factor, which the term's weight absorbs.

    Args:
        student_features, teacher_features: ``(B, C, H, W)``, or ``(…, C)`` with ``dim=-1``; the same shape.
        norm: ``"l2"`` (squared error) or ``"l1"``.
        dim: the channel dimension.
        weight: position weights that broadcast to the shape without ``dim``: ``(B, H, W)``.
        reduction: over positions.
    """
    same_shape(student_features, teacher_features, "hint")
    difference = upcast(student_features) - upcast(teacher_features)
    if norm == "l2":
        items = difference.square().mean(dim)
    elif norm == "l1":
        items = difference.abs().mean(dim)
    else:
        raise DistillError(f"norm must be 'l2' or 'l1', got {norm!r}")
    return reduce_loss(items, weight, reduction)
