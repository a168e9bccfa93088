"""Maximum mean discrepancy between two sets of vectors: the distance of their means in the space of a kernel's features.

It is the base of neuron selectivity transfer (channels as vectors over positions) and of the discrepancy of feature vectors.
Gretton et al., "A Kernel Two-Sample Test", JMLR 2012, equation 5 (the biased estimate).
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from ..errors import DistillError, check_number
from .relations import dot, gram_difference

Kernel = Literal["linear", "poly", "gaussian"]


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
        student: vectors ``(B, N, D)`` in float32 or float64.
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
