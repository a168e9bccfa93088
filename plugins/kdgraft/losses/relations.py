"""Relations between items (nodes, pixels, tokens, samples), for any similarity and any comparison of similarities.

They are the base of pair-wise affinity (nodes, cosine, squared difference), of cross-image relations (pixels, cosine, KL), of
token relations (tokens, dot product, KL), and of the relations of samples, which :func:`between_samples` selects and averages.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import DistillError
from .attention_maps import attention_distributions
from .reduction import Reduction, reduce_loss, upcast
from .scale import power_of_two, unit

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


def distance(items: Tensor, others: Tensor) -> Tensor:
    """Compute the Euclidean distances of all items: ``(…, N, C), (…, M, C) -> (…, N, M)``; the gradient at distance 0 is 0."""
    with torch.autocast(items.device.type, enabled=False):
        return torch.cdist(upcast(items), upcast(others), compute_mode="donot_use_mm_for_euclid_dist")


def angle(items: Tensor, others: Tensor) -> Tensor:
    """Compute the cosines of the angles that pairs of others form at each item: ``(…, N, C), (…, M, C) -> (…, N, M²)``.

    The cosine is 0 where an other lies on the item. It needs N · M · (M + C) numbers.
    """
    sides = upcast(others)[..., None, :, :] - upcast(items)[..., :, None, :]
    lengths = torch.linalg.vector_norm(sides, dim=-1, keepdim=True)
    sides = sides / lengths.masked_fill(lengths == 0, 1)
    return dot(sides, sides).flatten(-2)


def kernel(items: Tensor, others: Tensor, gamma: float = 0.4, order: int = 2) -> Tensor:
    r"""Compute the Gaussian kernel of the items' directions by its Taylor series: ``(…, N, C), (…, M, C) -> (…, N, M)``.

    .. math:: e^{-\gamma \|x - y\|^2} \approx e^{-2\gamma} \sum_{p=0}^{P} \frac{(2\gamma)^p}{p!} (x^\top y)^p, \qquad \|x\| = \|y\| = 1
    """
    found = cosine(items, others)
    terms = [(2 * gamma) ** p / math.factorial(p) * found**p for p in range(order + 1)]
    return math.exp(-2 * gamma) * torch.stack(terms).sum(0)


def divergence(student: Tensor, teacher: Tensor, valid: Tensor | None = None) -> Tensor:
    """Compute KL(teacher ‖ student) of the softmaxes over the relations of each item: ``(…, N, M) -> (…, N)``."""
    return attention_distributions(student, teacher, valid=valid, reduction="none")


def squared_difference(student: Tensor, teacher: Tensor, valid: Tensor | None = None) -> Tensor:
    """Sum the squared differences of the relations of each item: ``(…, N, M) -> (…, N)``."""
    return _summed((student - teacher).square(), valid)


def huber(student: Tensor, teacher: Tensor, valid: Tensor | None = None) -> Tensor:
    """Sum Huber's loss (δ = 1) of the relations of each item: ``(…, N, M) -> (…, N)``."""
    return _summed(F.smooth_l1_loss(student, teacher, reduction="none"), valid)


def _summed(items: Tensor, valid: Tensor | None) -> Tensor:
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


def between_samples(
    loss: str,
    student: Tensor,
    teacher: Tensor,
    compute: Callable[[Tensor, Tensor], Tensor],
    valid: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """Compute a loss of the relations between samples that no common factor of a model's vectors changes.

    Args:
        loss: the name of the loss, for messages.
        student: ``(B, C_s)``, one vector per sample.
        teacher: ``(B, C_t)``.
        compute: computes the loss of each of N >= 1 samples, ``(N, C_s), (N, C_t) -> (N,)``, in float32 even under autocast.
        valid: ``(B,)``, > 0 for the samples to include; all by default.
        reduction: over the samples that are included; ``"none"`` gives ``(B,)``.

    Raises:
        DistillError: the two do not hold one vector for each of the same samples.
    """
    if student.ndim != 2 or teacher.ndim != 2 or len(student) != len(teacher):
        raise DistillError(
            f"{loss}: student {tuple(student.shape)} and teacher {tuple(teacher.shape)} must have the same samples, (B, C)"
        )
    present = None if valid is None else valid > 0
    rows = None if present is None else present.nonzero()[:, 0]
    s, t = (upcast(vectors if rows is None else vectors[rows]) for vectors in (student, teacher))
    if not len(s):
        return reduce_loss(upcast(student).new_zeros(len(student)) + s.sum(), None, reduction)
    with torch.autocast(student.device.type, enabled=False):
        items = compute(*(vectors / power_of_two(vectors.detach().abs().amax()) for vectors in (s, t)))
    if rows is None or present is None:
        return reduce_loss(items, None, reduction)
    spread = items.new_zeros(len(student)).index_put((rows,), items)
    return reduce_loss(spread, present.to(items.dtype), reduction)
