"""Knowledge review (ReviewKD): the student's levels are fused from deep to shallow, then compared with the teacher's at several sizes.

Chen, Liu, Zhao, Jia, "Distilling Knowledge via Knowledge Review", CVPR 2021, arXiv 2104.09044, sections 3.2 and 3.3.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..distributed import total_over_ranks
from .masking import image_means, images_present, inside, present_positions
from .reduction import Reduction, reduce_loss, same_shape, upcast

POOLED_SIZES = (4, 2, 1)


class ValidNorm(nn.Module):
    """Batch normalisation over the positions that count, on all processes together, in float32.

    The result has the precision of its weights. It always uses the batch's statistics, as the networks of terms run in training only, and returns 0 where a position does not
    count.
    """

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.eps = eps

    def forward(self, maps: Tensor, valid: Tensor | None = None) -> Tensor:
        """Normalise maps ``(B, C, H, W)``; ``valid`` is ``(B, H, W)``, > 0 for the positions that count."""
        maps = inside(upcast(maps), valid)
        present = present_positions(maps, valid)[:, None]
        count = present.sum().to(maps.dtype)
        total = total_over_ranks(torch.cat([maps.sum((0, 2, 3)), count[None]]))
        count = total[-1].clamp(min=1)
        centred = (maps - (total[:-1] / count)[:, None, None]).masked_fill(~present, 0)
        variance = total_over_ranks(centred.square().sum((0, 2, 3))) / count
        # An infinite variance would give 0, whose gradient is not a number.
        scale = self.weight * (variance + self.eps).rsqrt().masked_fill(~variance.isfinite(), torch.nan)
        normalised = centred * scale[:, None, None] + self.bias[:, None, None]
        return normalised.masked_fill(~present, 0).to(self.weight.dtype)


class Fusion(nn.Module):
    """Attention based fusion (ABF) of one level with what deeper levels were fused to (section 3.2, figure 3).

    Args:
        channels: width of the student's level.
        width: width in which levels are fused.
        out_channels: width of the teacher's level.
        fuse: false for the deepest level, which nothing is fused with.
    """

    def __init__(self, channels: int, width: int, out_channels: int, fuse: bool) -> None:
        super().__init__()
        self.enter = nn.Conv2d(channels, width, 1, bias=False)
        self.enter_norm = ValidNorm(width)
        self.leave = nn.Conv2d(width, out_channels, 3, padding=1, bias=False)
        self.leave_norm = ValidNorm(out_channels)
        self.attention = nn.Conv2d(2 * width, 2, 1) if fuse else None
        nn.init.kaiming_uniform_(self.enter.weight, a=1)
        nn.init.kaiming_uniform_(self.leave.weight, a=1)

    def forward(self, student: Tensor, deeper: Tensor | None, valid: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the level for the comparison with the teacher's, and the fused level for the next shallower one.

        Args:
            student: the student's level ``(B, C, H, W)``.
            deeper: the fused deeper level, of any size; ``None`` for the deepest.
            valid: ``(B, H, W)``, > 0 for the positions that count; ``None`` for all.
        """
        fused = self.enter_norm(self.enter(inside(student, valid).to(self.enter.weight.dtype)), valid)
        if self.attention is not None and deeper is not None:
            deeper = inside(F.interpolate(deeper, fused.shape[-2:], mode="nearest"), valid)
            shares = self.attention(torch.cat([fused, deeper], 1)).sigmoid()
            fused = inside(fused * shares[:, :1] + deeper * shares[:, 1:], valid)
        return self.leave_norm(self.leave(fused), valid), fused


class LevelFusion(nn.Module):
    """Fusion of a student's levels from deep to shallow, to the widths of the teacher's levels (section 3.2).

    Args:
        channels: widths of the student's levels, from shallow to deep.
        out_channels: widths of the teacher's levels.
        width: width in which levels are fused; by default that of the deepest level, at most 512, as in the authors' code.
    """

    def __init__(self, channels: Sequence[int], out_channels: Sequence[int], width: int | None = None) -> None:
        super().__init__()
        width = min(512, channels[-1]) if width is None else width
        last = len(channels) - 1
        self.levels = nn.ModuleList(
            Fusion(own, width, other, level < last)
            for level, (own, other) in enumerate(zip(channels, out_channels, strict=True))
        )

    def forward(self, student: Sequence[Tensor], valid: Sequence[Tensor | None]) -> list[Tensor]:
        """Return the fused levels, from shallow to deep, in float32 even under autocast."""
        found: list[Tensor] = []
        deeper = None
        with torch.autocast(student[0].device.type, enabled=False):
            for level, maps, present in reversed(list(zip(self.levels, student, valid, strict=True))):
                out, deeper = level(maps, deeper, present)
                found.insert(0, out)
        return found


def hierarchical_context(
    student: Tensor, teacher: Tensor, *, valid: Tensor | None = None, reduction: Reduction = "mean"
) -> Tensor:
    r"""Hierarchical context loss (HCL): squared errors of an image's maps, whole and pooled (Chen et al. 2021, section 3.3).

    .. math:: \frac{\sum_k 2^{-k} \, \mathrm{MSE}(P_k(s), P_k(t))}{\sum_k 2^{-k}}

    :math:`P_0` leaves the maps as they are; the next ones average them to 4×4, 2×2 and 1×1 cells, as far as the map is higher than
    that. Cells divide the part of the map up to the last valid row and column, and average its valid positions.

    Args:
        student, teacher: features ``(B, C, H, W)``, the same shape.
        valid: ``(B, H, W)``, > 0 for the positions to include; all by default.
        reduction: over images (those without a valid position are excluded); ``"none"`` gives ``(B,)``.

    Raises:
        DistillError: the shapes differ.
    """
    same_shape(student, teacher, "hierarchical_context")
    present = present_positions(teacher, valid)
    difference = (upcast(student) - upcast(teacher)).masked_fill(~present[:, None], 0)
    weight, used = torch.ones_like(difference[:, 0, :1, :1].flatten()), torch.zeros(len(present), device=present.device)
    total, items = weight.clone(), image_means(difference.square().mean(1), valid)
    height, width = _extent(present.any(2)), _extent(present.any(1))
    for size in POOLED_SIZES:
        rows, columns = (
            _cells(extent, length, size).to(items.dtype)
            for extent, length in ((height, present.shape[1]), (width, present.shape[2]))
        )
        with torch.autocast(difference.device.type, enabled=False):
            counts = rows @ present.to(items.dtype) @ columns.transpose(1, 2)
            sums = rows[:, None] @ difference @ columns[:, None].transpose(2, 3)
        pooled = sums / counts.clamp(min=1)[:, None]
        fits = height > size
        used = used + fits
        factor = weight * fits * 0.5**used
        items = items + factor * image_means(pooled.square().mean(1), counts)
        total = total + factor
    some = images_present(valid)
    return reduce_loss(items / total, None if some is None else some.to(items.dtype), reduction)


def _extent(present: Tensor) -> Tensor:
    """Return the number of rows (or columns) up to the last one with a valid position: ``(B, L) -> (B,)``."""
    places = torch.arange(1, present.shape[1] + 1, device=present.device)
    return (places * present).amax(1) if present.numel() else places.new_zeros(len(present))


def _cells(extent: Tensor, length: int, size: int) -> Tensor:
    """Return the rows of ``length`` in each of ``size`` cells, 0 or 1: ``(B, size, length)``, those of adaptive pooling."""
    cells, places = torch.arange(size, device=extent.device)[:, None], torch.arange(length, device=extent.device)
    extent = extent[:, None, None]
    first = cells * extent // size
    last = -(-(cells + 1) * extent // size)
    return (places >= first) & (places < last)
