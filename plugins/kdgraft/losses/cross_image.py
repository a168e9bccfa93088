"""Cross-image relations: similarities of pixels to those of other images, in the batch and in a memory.

Yang et al., "Cross-Image Relational Knowledge Distillation for Semantic Segmentation" (CIRKD), CVPR 2022, arXiv 2204.06986.
"""

from __future__ import annotations

from torch import Tensor

from ..errors import DistillError
from .reduction import Reduction, reduce_loss, upcast
from .relations import cosine, divergence, relations
from .soft_targets import check_temperature, soft_targets


def pixel_relations(
    student: Tensor,
    teacher: Tensor,
    temperature: float = 0.1,
    *,
    valid: Tensor | None = None,
    others: tuple[Tensor, Tensor, Tensor | None] | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Mini-batch pixel-to-pixel relations (Yang et al. 2022).

    For every pair of images (i, j) and every pixel of i, the KL compares the softmax over its cosines to all pixels of j; the
    loss is the mean over pixels and pairs. As in the authors' code i may equal j, and there is no factor T².

    Args:
        student, teacher: features ``(B, N, C)``, N pixels or pooled nodes per image; the numbers of channels may differ.
        temperature: τ > 0.
        valid: ``(B, N)``, > 0 for the pixels to include, on either side of a comparison.
        others: student, teacher and valid of the images j; the same images by default.
        reduction: over (i, j, pixel of i), without images j that have no valid pixel; ``"none"`` gives ``(B, B', N)``.
    """
    if student.shape[:2] != teacher.shape[:2]:
        raise DistillError(
            f"pixel_relations: student {tuple(student.shape)} and teacher {tuple(teacher.shape)} must have the same pixels"
        )
    check_temperature(temperature)
    other_student, other_teacher, other_valid = others if others is not None else (student, teacher, valid)
    compared = None if other_valid is None else (other_valid > 0)[None, :, None, :]
    items = relations(
        _only(student, valid),
        _only(teacher, valid),
        lambda own, other: _across_images(own, other) / temperature,
        divergence,
        others=(_only(other_student, other_valid), _only(other_teacher, other_valid)),
        valid=compared,
    )
    weight = None if valid is None else (valid > 0)[:, None, :]
    if compared is not None:
        has_any = compared.any(3)
        weight = has_any if weight is None else weight & has_any
    return reduce_loss(items, weight, reduction)


def memory_relations(
    student: Tensor,
    teacher: Tensor,
    memory: Tensor,
    *,
    contrast_temperature: float = 0.1,
    temperature: float = 1.0,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Relations to stored embeddings of pixels or regions (Yang et al. 2022).

    For each pixel, the KL compares the softmax over its cosines to all of the memory, divided by τ and by T; it is scaled by T².

    Args:
        student: pixels ``(N, C)``, projected into the teacher's space.
        teacher: the same pixels ``(N, C)``.
        memory: stored embeddings ``(M, C)`` of the teacher.
        contrast_temperature: τ; 0.1 in the authors' code.
        temperature: T; 1 in the authors' scripts.
        reduction: over pixels; without pixels, or with an empty memory, the loss is 0 with a live graph.
    """
    check_temperature(contrast_temperature)
    if student.shape != teacher.shape or memory.shape[1:] != teacher.shape[1:]:
        raise DistillError(
            f"memory_relations: student {tuple(student.shape)}, teacher {tuple(teacher.shape)} and memory "
            f"{tuple(memory.shape)} must have the same width"
        )
    if len(memory) == 0:
        return reduce_loss(upcast(student).sum(1) * 0, None, reduction)
    s, t = (cosine(x, memory) / contrast_temperature for x in (student, teacher))
    return soft_targets(s, t, temperature, reduction=reduction)


def _only(features: Tensor, valid: Tensor | None) -> Tensor:
    """Set invalid features to 0, as their values, which may be infinite, must not reach the gradient."""
    features = upcast(features)
    return features if valid is None else features.masked_fill((valid <= 0)[..., None], 0)


def _across_images(items: Tensor, others: Tensor) -> Tensor:
    """Compute the cosines of all rows of all images: ``(B, N, C), (B', M, C) -> (B, B', N, M)``."""
    found = cosine(items.flatten(0, 1), others.flatten(0, 1))
    return found.view(*items.shape[:2], *others.shape[:2]).transpose(1, 2)
