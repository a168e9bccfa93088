"""Relations between items (nodes, pixels, tokens, samples), for any similarity and any comparison of similarities.

They are the base of pair-wise affinity (nodes, cosine, squared difference), of cross-image relations (pixels, cosine, KL) and of
token relations (tokens, dot product, KL).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .attention_maps import attention_distributions
from .reduction import upcast
from .scale import unit

Similarity = Callable[[Tensor, Tensor], Tensor]
"""Computes the similarities of two sets of items: ``(…, N, C), (…, M, C) -> (…, N, M)``."""
Comparison = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""Compares similarities of student and teacher ``(…, N, M)``, given a mask of those that count: ``-> (…, N)``."""


def relations(
    student: Tensor,
    teacher: Tensor,
    similarity: Similarity,
    comparison: Comparison,
    *,
    others: tuple[Tensor, Tensor] | None = None,
    valid: Tensor | None = None,
) -> Tensor:
    """Compare the relations of each item to the others in the student with those in the teacher.

    Args:
        student: the student's items ``(…, N, C_s)``.
        teacher: the teacher's items ``(…, N, C_t)``; the widths may differ.
        similarity: computes the similarities of two sets of items, such as :func:`dot` or :func:`cosine`.
        comparison: compares the two models' similarities, such as :func:`divergence` or :func:`squared_difference`.
        others: student's and teacher's items ``(…, M, C)`` to which each item is related; the same items by default.
        valid: true for the relations that count; broadcasts to ``(…, N, M)``; ``None`` for all.

    Returns:
        The loss of each item, ``(…, N)``.
    """
    pairs = ((student, teacher) if others is None else others, (student, teacher))
    s, t = (similarity(own, other) for other, own in zip(*pairs, strict=True))
    return comparison(s, t, valid)


def dot(items: Tensor, others: Tensor) -> Tensor:
    """Compute the dot products of all items, in float32 even under autocast: ``(…, N, C), (…, M, C) -> (…, N, M)``."""
    with torch.autocast(items.device.type, enabled=False):
        return upcast(items) @ upcast(others).transpose(-1, -2)


def cosine(items: Tensor, others: Tensor) -> Tensor:
    """Compute the cosines of all items: ``(…, N, C), (…, M, C) -> (…, N, M)``; the cosine of a zero vector is 0."""
    return dot(unit(upcast(items), -1), unit(upcast(others), -1))


def divergence(student: Tensor, teacher: Tensor, valid: Tensor | None = None) -> Tensor:
    """Compute KL(teacher ‖ student) of the softmaxes over the relations of each item: ``(…, N, M) -> (…, N)``."""
    return attention_distributions(student, teacher, valid=valid, reduction="none")


def squared_difference(student: Tensor, teacher: Tensor, valid: Tensor | None = None) -> Tensor:
    """Sum the squared differences of the relations of each item: ``(…, N, M) -> (…, N)``."""
    items = (student - teacher).square()
    return (items if valid is None else items.masked_fill(~valid.bool(), 0)).sum(-1)


def gram_difference(student: Tensor, teacher: Tensor) -> Tensor:
    r"""Compute :math:`\|SS^\top - TT^\top\|_F^2`, with the items in rows, in the way that needs less memory.

    The N×N dot products are built if N is at most the larger width; otherwise those of the columns, as
    :math:`\|S^\top S\|_F^2 - 2\|S^\top T\|_F^2 + \|T^\top T\|_F^2`.

    Args:
        student: the student's items ``(B, N, C_s)``.
        teacher: the teacher's items ``(B, N, C_t)``; the widths may differ.

    Returns:
        The squared norm for each entry of the batch, ``(B,)``.
    """
    if student.shape[1] <= max(student.shape[2], teacher.shape[2]):
        return relations(student, teacher, dot, squared_difference).sum(1)
    # Large sums nearly cancel, so that double precision is needed (for C×C numbers).
    s, t = student.transpose(1, 2), teacher.transpose(1, 2)
    parts = [dot(a, b).double().square().sum((1, 2)) for a, b in ((s, s), (s, t), (t, t))]
    return (parts[0] - 2 * parts[1] + parts[2]).clamp(min=0).to(upcast(s).dtype)
