"""Localization distillation: soft targets on the distribution of each box edge.

Zheng et al., "Localization Distillation for Dense Object Detection", CVPR 2022, arXiv 2102.12252, equations 3 and 4.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from ..errors import DistillError
from .reduction import Reduction, reduce_loss
from .soft_targets import soft_targets


def localization(
    student_edges: Tensor,
    teacher_edges: Tensor,
    temperature: float = 10.0,
    *,
    variant: Literal["code", "paper"] = "code",
    weight: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Localization distillation: KL of the softened distribution of each box edge over its bins (LD, CVPR 2022).

    .. math:: T^2 \, \mathrm{KL}(p_t^T \,\|\, p_s^T)

    Args:
        student_edges, teacher_edges: logits ``(…, n + 1)`` of the distribution of an edge's distance over its bins
            0 … n (``reg_max``), the same shape; usually ``(boxes, 4, n + 1)``.
        temperature: T > 0; 10 in the paper.
        variant: ``"code"`` takes the *mean* over bins, as the authors' code (and mmdet's) does; it is the default because the
            published weight 0.25 refers to it. ``"paper"`` takes the sum, which is n + 1 times as large.
        weight: edge weights that broadcast to the shape without the bins.
        reduction: over edges.
    """
    if variant not in ("code", "paper"):
        raise DistillError(f"variant must be 'code' or 'paper', got {variant!r}")
    edges = soft_targets(student_edges, teacher_edges, temperature, reduction="none")
    if variant == "code":
        edges = edges / student_edges.shape[-1]
    return reduce_loss(edges, weight, reduction)
