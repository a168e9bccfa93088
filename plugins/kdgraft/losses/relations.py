"""Relations: how items (nodes, pixels, tokens, samples) relate to items, by any similarity and any comparison.

The base of pair-wise affinity (nodes, cosine, squared difference), of cross-image relations (pixels, cosine, KL) and of token
relations (tokens, dot product, KL).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .attention_maps import attention_distributions
from .reduction import upcast
from .scale import unit

Similarity = Callable[[Tensor, Tensor], Tensor]
"""``(…, N, C), (…, M, C) -> (…, N, M)``."""
Comparison = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""Similarities of student and teacher ``(…, N, M)`` and which of them count, broadcasting to them -> ``(…, N)``."""


def relations(
    student: Tensor,
    teacher: Tensor,
    similarity: Similarity,
    comparison: Comparison,
    *,
    others: tuple[Tensor, Tensor] | None = None,
    valid: Tensor | None = None,
) -> Tensor:
    """Compare how each item relates to the others in student and teacher.

    Args:
        student: ``(…, N, C_s)``.
        teacher: ``(…, N, C_t)``; the widths may differ.
        similarity: of two sets of items, such as :func:`dot` or :func:`cosine`.
        comparison: of the two models' similarities, such as :func:`divergence` or :func:`squared_difference`.
        others: student's and teacher's items ``(…, M, C)`` that each item is related to; the same items by default.
        valid: the relations that count, broadcasts to ``(…, N, M)``; ``None`` for all.

    Returns:
        The loss of each item, ``(…, N)``.
    """
    pairs = ((student, teacher) if others is None else others, (student, teacher))
    s, t = (similarity(own, other) for other, own in zip(*pairs, strict=True))
    return comparison(s, t, valid)


def dot(items: Tensor, others: Tensor) -> Tensor:
    """Dot products of all items, in float32 also under autocast: ``(…, N, C), (…, M, C) -> (…, N, M)``."""
    with torch.autocast(items.device.type, enabled=False):
        return upcast(items) @ upcast(others).transpose(-1, -2)


def cosine(items: Tensor, others: Tensor) -> Tensor:
    """Cosines of all items: ``(…, N, C), (…, M, C) -> (…, N, M)``; that of a vector of zeros is 0."""
    return dot(unit(upcast(items), -1), unit(upcast(others), -1))


def divergence(student: Tensor, teacher: Tensor, valid: Tensor | None = None) -> Tensor:
    """KL(teacher ‖ student) of the softmaxes over the relations of each item: ``(…, N, M) -> (…, N)``."""
    return attention_distributions(student, teacher, valid=valid, reduction="none")


def squared_difference(student: Tensor, teacher: Tensor, valid: Tensor | None = None) -> Tensor:
    """The squared differences of the relations of each item, summed: ``(…, N, M) -> (…, N)``."""
    items = (student - teacher).square()
    return (items if valid is None else items.masked_fill(~valid.bool(), 0)).sum(-1)
