"""Neuron selectivity transfer (NST): the channels' patterns of activation are distributed like the teacher's.

Huang, Wang, "Like What You Like: Knowledge Distill via Neuron Selectivity Transfer", 2017, arXiv 1707.01219, section 4.
"""

from __future__ import annotations

from torch import Tensor

from ..errors import DistillError
from .mmd import Kernel, check_kernel, discrepancy
from .reduction import Reduction, reduce_loss, upcast
from .scale import unit


def nst(
    student: Tensor,
    teacher: Tensor,
    *,
    kernel: Kernel = "poly",
    bandwidth: float | None = None,
    valid: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""NST: squared maximum mean discrepancy between the channels of two maps (Huang & Wang 2017, section 4).

    A channel is the vector of its activations over positions, normalised to length 1; see
    :func:`kdgraft.losses.mmd.discrepancy` for the formula. With the polynomial kernel of degree 2 this is the difference of
    the Gram matrices of positions, each divided by the number of channels; with the linear kernel that of the mean normalised
    channels, which resembles attention transfer.

    Args:
        student, teacher: features ``(B, C, H, W)`` on one grid; the numbers of channels may differ.
        kernel: ``"poly"`` (degree 2 without offset, as in the authors' code), ``"linear"`` or ``"gaussian"``; the Gaussian one needs
            C×C numbers per image.
        bandwidth: σ² of the Gaussian kernel; by default the mean squared distance between the student's and the teacher's channels
            of an image, taken as a constant.
        valid: ``(B, H, W)``, > 0 for the positions to include; all by default.
        reduction: over images (those without a valid position are excluded); ``"none"`` gives ``(B,)``.

    Raises:
        DistillError: the grids differ, or the kernel is unknown.
    """
    if student.shape[0] != teacher.shape[0] or student.shape[2:] != teacher.shape[2:]:
        raise DistillError(
            f"nst: student {tuple(student.shape)} and teacher {tuple(teacher.shape)} must lie on one grid"
        )
    check_kernel(kernel, bandwidth)
    s, t = (_channels(maps, valid) for maps in (student, teacher))
    present = None if valid is None else (valid > 0).flatten(1).any(1).to(s.dtype)
    return reduce_loss(discrepancy(s, t, kernel, bandwidth=bandwidth), present, reduction)


def _channels(maps: Tensor, valid: Tensor | None) -> Tensor:
    """Return unit vectors ``(B, C, N)`` of the channels over the valid positions."""
    inside = upcast(maps) if valid is None else upcast(maps).masked_fill(~(valid > 0)[:, None], 0)
    return unit(inside.flatten(2), 2)
