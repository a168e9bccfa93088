"""Pair-wise affinities between the positions of a map.

Liu et al., "Structured Knowledge Distillation for Semantic Segmentation", CVPR 2019, arXiv 1903.04197 (and TPAMI 2020).
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import DistillError
from .reduction import Reduction, reduce_loss, upcast
from .relations import gram_difference
from .scale import unit

Pool = Literal["average", "max"]


def pairwise_affinity(
    student: Tensor,
    teacher: Tensor,
    *,
    patch: int | float = 2,
    pool: Pool = "average",
    valid: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Pair-wise affinity: squared difference of the cosine similarities between nodes (Liu et al. 2019, section 3.2).

    .. math:: \frac{1}{N^2} \sum_{i,j} (a^s_{ij} - a^t_{ij})^2, \qquad a_{ij} = \frac{f_i^\top f_j}{\|f_i\| \|f_j\|}

    A node is a patch of positions, pooled. If there are more nodes than channels, the N×N affinities are not built: with the
    unit vectors in rows, :math:`\|SS^\top - TT^\top\|_F^2 = \|S^\top S\|_F^2 - 2\|S^\top T\|_F^2 + \|T^\top T\|_F^2`, which
    needs C×C numbers per image at any resolution. The gradient passes through the norms, which the authors' code treats as
    constants.

    Args:
        student, teacher: features ``(B, C, H, W)`` on one grid; the numbers of channels may differ.
        patch: side of a node in positions, or, as a float, a fraction of the map's height and width. The paper pools patches of
            2×2 positions; the authors' code pools halves of the map with ``pool="max"``.
        pool: ``"average"`` or ``"max"`` over the valid positions of a patch.
        valid: ``(B, H, W)``, true for the positions to include. Nodes without one are excluded.
        reduction: over images (those without a node are excluded); ``"none"`` gives ``(B,)``.

    Raises:
        DistillError: the grids differ, or ``patch`` is neither a whole number >= 1 nor a fraction.
    """
    if student.shape[0] != teacher.shape[0] or student.shape[2:] != teacher.shape[2:]:
        raise DistillError(
            f"pairwise_affinity: student {tuple(student.shape)} and teacher {tuple(teacher.shape)} must lie on one grid"
        )
    check_patch(patch, pool)
    (s, present), (t, _) = (pool_nodes(upcast(maps), patch, pool, valid) for maps in (student, teacher))
    count = present.sum(1)
    items = gram_difference(s, t) / (count * count).clamp(min=1)
    return reduce_loss(items, None if valid is None else (count > 0).to(items.dtype), reduction)


def check_patch(patch: int | float, pool: str) -> None:
    """Raise a :class:`DistillError` unless ``patch`` is an int >= 1 or a float in (0, 1), and ``pool`` is known."""
    fine = not isinstance(patch, bool) and (
        (isinstance(patch, int) and patch >= 1) or (isinstance(patch, float) and 0 < patch < 1)
    )
    if not fine:
        raise DistillError(
            f"patch must be a whole number >= 1, or a fraction of the map between 0 and 1, got {patch!r}"
        )
    if pool not in ("average", "max"):
        raise DistillError(f"pool must be 'average' or 'max', got {pool!r}")


def pool_nodes(maps: Tensor, patch: int | float, pool: Pool, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return unit vectors of the nodes ``(B, N, C)``, 0 for nodes without a valid position, and 1 for nodes with one ``(B, N)``."""
    height, width = maps.shape[-2:]
    kernel = (patch, patch) if isinstance(patch, int) else (max(int(height * patch), 1), max(int(width * patch), 1))
    kernel = (min(kernel[0], height), min(kernel[1], width))
    inside = torch.ones_like(maps[:, :1]) if valid is None else (valid > 0).to(maps.dtype)[:, None]
    covered = F.avg_pool2d(inside, kernel, ceil_mode=True)
    present = covered > 0
    if pool == "average":
        if valid is not None:
            maps = maps.masked_fill(inside == 0, 0)
        nodes = F.avg_pool2d(maps, kernel, ceil_mode=True) / covered.masked_fill(~present, 1)
    else:
        if valid is not None:
            maps = maps.masked_fill(inside == 0, torch.finfo(maps.dtype).min)
        nodes = F.max_pool2d(maps, kernel, ceil_mode=True)
    nodes = nodes.masked_fill(~present, 0).flatten(2).transpose(1, 2)
    return unit(nodes, 2, eps=1e-8), present.flatten(1).to(maps.dtype)
