"""Hidden states, compared by direction (DistilBERT) or as normalised vectors (patient distillation).

Sanh et al., "DistilBERT", 2019, arXiv 1910.01108, section 2 (cosine loss); Sun et al., "Patient Knowledge Distillation for BERT
Model Compression", 2019, arXiv 1908.09355, equation 7. The squared error of TinyBERT and MobileBERT is :func:`hint`.
"""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from ..errors import DistillError
from ..registry import LOSSES
from .reduction import Reduction, reduce_loss, same_shape, upcast
from .scale import bounded, unit


@LOSSES.register
def cosine(
    student_features: Tensor,
    teacher_features: Tensor,
    *,
    dim: int = -1,
    weight: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Cosine: 1 − cos of student's and teacher's vectors (DistilBERT 2019; of maps, RT-DETRv4 2025, arXiv 2510.25257).

    It does not depend on the lengths of the vectors, as where a detector's map follows that of a vision foundation model, whose
    scale is another.

    Args:
        student_features, teacher_features: ``(…, C)``, or ``(B, C, H, W)`` with ``dim=1``; the same shape.
        dim: the channel dimension.
        weight: position weights that broadcast to the shape without ``dim``.
        reduction: over positions. A vector of zeros has cosine 0.
    """
    same_shape(student_features, teacher_features, "cosine")
    student, teacher = (bounded(upcast(features), dim) for features in (student_features, teacher_features))
    items = 1 - F.cosine_similarity(student, teacher, dim=dim)
    return reduce_loss(items, weight, reduction)


@LOSSES.register
def patient(
    student_features: Tensor,
    teacher_features: Tensor,
    *,
    dim: int = -1,
    variant: Literal["paper", "code"] = "paper",
    weight: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Patient: squared distance of the L2-normalised vectors (PKD 2019, equation 7).

    .. math:: \left\| \frac{h_s}{\|h_s\|_2} - \frac{h_t}{\|h_t\|_2} \right\|_2^2

    Args:
        student_features, teacher_features: ``(…, C)`` with the channels at ``dim``, the same shape.
        dim: the channel dimension.
        variant: ``"paper"`` sums over channels; the authors' ``"code"`` takes the mean over them.
        weight: position weights that broadcast to the shape without ``dim``.
        reduction: over positions.
    """
    same_shape(student_features, teacher_features, "patient")
    if variant not in ("paper", "code"):
        raise DistillError(f"variant must be 'paper' or 'code', got {variant!r}")
    student, teacher = (unit(upcast(features), dim) for features in (student_features, teacher_features))
    items = (student - teacher).square()
    return reduce_loss(items.sum(dim) if variant == "paper" else items.mean(dim), weight, reduction)
