"""Box regression between two models: L1 distance and generalised IoU of boxes given by centre and size.

The two losses are those of DETR (Carion et al., ECCV 2020, arXiv 2005.12872), with the teacher's box in the place of the true one, as in
KD-DETR (Wang et al., CVPR 2024, arXiv 2211.08071).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import check_number
from .reduction import Reduction, reduce_loss, same_shape, upcast


def box_regression(
    student_boxes: Tensor,
    teacher_boxes: Tensor,
    *,
    boxes: float = 5.0,
    overlaps: float = 2.0,
    weight: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""L1 distance and generalised IoU to the teacher's boxes (KD-DETR, CVPR 2024).

    .. math:: \lambda_b \tfrac14 |b^s - b^t|_1 + \lambda_g (1 - \mathrm{GIoU}(b^s, b^t))

    Args:
        student_boxes, teacher_boxes: ``(…, 4)`` as centre x, y, width, height, in fractions of the image; the same shape.
        boxes, overlaps: the weights λ of the two parts; those of DETR by default.
        weight: box weights that broadcast to ``(…,)``.
        reduction: over boxes.
    """
    same_shape(student_boxes, teacher_boxes, "box_regression")
    for name, value in (("boxes", boxes), ("overlaps", overlaps)):
        check_number("box_regression", name, value)
    student, teacher = upcast(student_boxes), upcast(teacher_boxes)
    items = boxes * (student - teacher).abs().mean(-1) + overlaps * (1 - generalized_iou(student, teacher))
    return reduce_loss(items, weight, reduction)


def generalized_iou(first: Tensor, second: Tensor, eps: float = 1e-9) -> Tensor:
    """Return the generalised IoU of boxes (Rezatofighi et al., CVPR 2019, arXiv 1902.09630), between −1 and 1.

    Args:
        first, second: ``(…, 4)`` as centre x, y, width, height; shapes that broadcast to each other.
        eps: the least area by which is divided. Boxes are fractions of the image, in which a pixel has an area of about 1e-6.

    Returns:
        A value for each pair of boxes, of the broadcast shape without the last axis.
    """
    (low, high, area), (other_low, other_high, other_area) = (_corners(boxes) for boxes in (first, second))
    shared = _area(torch.maximum(low, other_low), torch.minimum(high, other_high))
    union = (area + other_area - shared).clamp(min=eps)
    around = _area(torch.minimum(low, other_low), torch.maximum(high, other_high)).clamp(min=eps)
    return shared / union - (around - union) / around


def _corners(boxes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the lower and the upper corner of boxes, and their areas; a negative size counts as 0."""
    centre, size = boxes[..., :2], boxes[..., 2:].clamp(min=0)
    return centre - size / 2, centre + size / 2, size.prod(-1)


def _area(low: Tensor, high: Tensor) -> Tensor:
    return (high - low).clamp(min=0).prod(-1)
