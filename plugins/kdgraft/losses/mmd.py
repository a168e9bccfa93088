"""Maximum mean discrepancy (MMD) between two sets of vectors: the distance of their means in the space of a kernel's features.

Gretton et al., "A Kernel Two-Sample Test", JMLR 2012, equation 5 (the biased estimate). Neuron selectivity transfer is the
discrepancy of channels, as vectors over positions.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import DistillError, check_number
from .reduction import Reduction, reduce_loss, same_shape, upcast
from .relations import dot, gram_difference

Kernel = Literal["linear", "poly", "gaussian"]


def mmd(
    student: Tensor,
    teacher: Tensor,
    *,
    kernel: Kernel = "gaussian",
    bandwidth: float | None = None,
    valid: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""MMD: squared maximum mean discrepancy between sets of feature vectors (Gretton et al. 2012, equation 5).

    The order of the vectors in a set does not matter, so that a student's vector need not imitate that of the same position. Dot
    products are means over channels, so that the loss does not grow with their number: with the linear kernel it is the mean
    squared difference of the mean vectors. See :func:`discrepancy` for the formula.

    Args:
        student, teacher: sets of vectors ``(B, N, C)``, the same shape.
        kernel: ``"gaussian"``, which needs N×N numbers per set, ``"linear"`` or ``"poly"`` (degree 2 without offset).
        bandwidth: σ² of the Gaussian kernel, of squared distances averaged over channels; by default their mean between the
            student's and the teacher's vectors of a set, taken as a constant.
        valid: ``(B, N)``, weights >= 0 of the vectors in their set; those with weight 0 are excluded. Equal weights by default.
        reduction: over sets (those without a vector are excluded); ``"none"`` gives ``(B,)``.

    Raises:
        DistillError: the shapes differ, or the kernel is unknown.
    """
    same_shape(student, teacher, "mmd")
    check_kernel(kernel, bandwidth)
    weight = student.new_ones(student.shape[:2]) if valid is None else valid
    weight = weight.to(upcast(student).dtype)
    outside, total = (weight == 0)[..., None], weight.sum(1, keepdim=True)
    shares = weight / total.masked_fill(total == 0, 1)
    s, t = (upcast(x).masked_fill(outside, 0) / math.sqrt(max(x.shape[2], 1)) for x in (student, teacher))
    items = discrepancy(s, t, kernel, shares=(shares, shares), bandwidth=bandwidth)
    return reduce_loss(items, (total[:, 0] > 0).to(items.dtype), reduction)


def pooled_vectors(maps: Tensor, weight: Tensor | None, most: int) -> tuple[Tensor, Tensor | None]:
    """Return the vectors of a map's positions, averaged over square patches so that at most ``most`` remain.

    Args:
        maps: ``(B, C, H, W)``.
        weight: weights of the positions ``(B, H, W)``; ``None`` for equal ones.
        most: the largest number of vectors.

    Returns:
        Vectors ``(B, N, C)`` in the order of rows, and their weights ``(B, N)``, the sums over the patches.
    """
    height, width = maps.shape[-2:]
    side = 1
    while math.ceil(height / min(side, height)) * math.ceil(width / min(side, width)) > most:
        side += 1
    if side == 1:
        return maps.flatten(2).transpose(1, 2), None if weight is None else weight.flatten(1)
    maps = upcast(maps)
    inside = torch.ones_like(maps[:, :1]) if weight is None else weight[:, None].to(maps.dtype)
    patch = (min(side, height), min(side, width))
    total, covered = (
        F.avg_pool2d(x, patch, ceil_mode=True, divisor_override=1)
        for x in (maps.masked_fill(inside == 0, 0) * inside, inside)
    )
    nodes = total / covered.masked_fill(covered == 0, 1)
    return nodes.flatten(2).transpose(1, 2), covered.flatten(1)


def discrepancy(
    student: Tensor,
    teacher: Tensor,
    kernel: Kernel,
    *,
    shares: tuple[Tensor, Tensor] | None = None,
    bandwidth: float | None = None,
) -> Tensor:
    r"""Compute the squared maximum mean discrepancy between two sets of vectors.

    .. math:: \sum_{ij} p_i p_j k(s_i, s_j) - 2 \sum_{ij} p_i q_j k(s_i, t_j) + \sum_{ij} q_i q_j k(t_i, t_j)

    The linear and the polynomial kernel have closed forms: the distance of the means, and that of the D×D second moments, which
    is taken from the dot products of the vectors instead if there are fewer of them. The Gaussian kernel needs the similarities
    of all vectors.

    Args:
        student: vectors ``(B, N, D)``, in float32 or float64.
        teacher: vectors ``(B, M, D)``.
        kernel: ``"linear"`` :math:`s^\top t`, ``"poly"`` :math:`(s^\top t)^2`, or ``"gaussian"``
            :math:`\exp(-\|s - t\|^2 / 2\sigma^2)`.
        shares: the weights p ``(B, N)`` and q ``(B, M)`` of the vectors, which add up to 1; equal weights by default.
        bandwidth: σ² of the Gaussian kernel; by default the mean squared distance between the student's and the teacher's vectors
            of each entry of the batch, taken as a constant.

    Returns:
        The discrepancy of each entry of the batch, ``(B,)``.
    """
    p, q = (_equal(student), _equal(teacher)) if shares is None else shares
    if kernel == "linear":
        return ((p[..., None] * student).sum(1) - (q[..., None] * teacher).sum(1)).square().sum(1)
    if kernel == "poly":
        s, t = ((w.sqrt()[..., None] * vectors).transpose(1, 2) for w, vectors in ((p, student), (q, teacher)))
        return gram_difference(s, t)
    # Distances do not depend on the origin: near the vectors, less cancels.
    centre = (q[..., None] * teacher).sum(1, keepdim=True).detach()
    student, teacher = student - centre, teacher - centre
    between = _distances(student, teacher)
    variance = _mean(between.detach(), p, q) if bandwidth is None else between.new_full(between.shape[:1], bandwidth)
    # Of vectors that are all equal the variance is 0, as are the distances.
    scale = 2 * torch.where(variance == 0, 1, variance)[:, None, None]
    parts = [
        _mean(torch.exp(-distances / scale), *weights)
        for distances, weights in (
            (_distances(student, student), (p, p)),
            (between, (p, q)),
            (_distances(teacher, teacher), (q, q)),
        )
    ]
    return parts[0] - 2 * parts[1] + parts[2]


def check_kernel(kernel: str, bandwidth: float | None = None) -> None:
    """Raise a :class:`DistillError` for an unknown kernel, or for a bandwidth that is not > 0 or that the kernel lacks."""
    if kernel not in get_args(Kernel):
        raise DistillError(f"kernel must be one of {', '.join(get_args(Kernel))}, got {kernel!r}")
    if bandwidth is None:
        return
    if kernel != "gaussian":
        raise DistillError(f"the kernel {kernel!r} has no bandwidth; use kernel='gaussian', or leave the bandwidth out")
    check_number("kernel 'gaussian'", "bandwidth", bandwidth, above=True)


def _equal(vectors: Tensor) -> Tensor:
    return vectors.new_full(vectors.shape[:2], 1 / max(vectors.shape[1], 1))


def _mean(values: Tensor, p: Tensor, q: Tensor) -> Tensor:
    return (values * p[:, :, None] * q[:, None, :]).sum((1, 2))


def _distances(items: Tensor, others: Tensor) -> Tensor:
    """Compute the squared distances ``(B, N, M)`` of all vectors."""
    squares = items.square().sum(2)[:, :, None] + others.square().sum(2)[:, None, :]
    return (squares - 2 * dot(items, others)).clamp(min=0)
