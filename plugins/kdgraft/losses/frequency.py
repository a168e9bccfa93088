"""Frequency distillation (FreeKD): bands of a wavelet transform are compared where learned prompts mark them.

Zhang, Huang, Liu, Jiang, Cheng, Zhang, "FreeKD: Knowledge Distillation via Semantic Frequency Prompt", CVPR 2024, arXiv
2311.12079, and the authors' code (Gumpest/FreeKD@e0874f5: mmrazor/models/losses/freekd.py).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import DistillError
from .masking import image_means, images_present, inside
from .receptive_tokens import mask_overlap, soft_masks, unmasked_share
from .reduction import Reduction, reduce_loss, same_shape, upcast

Bands = tuple[Tensor, list[Tensor]]
"""The low band ``(B, C, h, w)``, and the three high bands ``(B, C, 3, h, w)`` of each level, from fine to coarse."""


def haar_bands(maps: Tensor, levels: int = 3) -> Bands:
    """Return the bands of an orthonormal Haar transform of maps ``(B, C, H, W)``; sides of odd length are padded with one 0.

    Each level halves the map. The results are in float32 for half precision. The high bands are differences of rows, of columns, and of both.
    """
    maps, high = upcast(maps), list[Tensor]()
    for _ in range(levels):
        maps = F.pad(maps, (0, maps.shape[-1] % 2, 0, maps.shape[-2] % 2))
        rows = maps[..., 0::2, :] + maps[..., 1::2, :], maps[..., 0::2, :] - maps[..., 1::2, :]
        (low, columns), (across, both) = ((x[..., 0::2] + x[..., 1::2], x[..., 0::2] - x[..., 1::2]) for x in rows)
        high.append(torch.stack([across, columns, both], 2) / 2)
        maps = low / 2
    return maps, high


def haar_maps(bands: Bands, size: Sequence[int]) -> Tensor:
    """Return the maps ``(B, C, H, W)`` of the bands of :func:`haar_bands`, given H and W."""
    maps, high = bands
    for level in reversed(high):
        across, columns, both = level.unbind(2)
        maps = maps[..., : across.shape[-2], : across.shape[-1]]  # without the padding of the next level
        # Rows by the sign of across, columns by the sign of columns, and both by their product.
        corners = [maps + r * across + c * columns + r * c * both for r in (1, -1) for c in (1, -1)]
        maps = F.pixel_shuffle(torch.stack(corners, 2).flatten(1, 2) / 2, 2)
    return maps[..., : size[0], : size[1]]


def halved(valid: Tensor | None, levels: int = 3) -> list[Tensor | None]:
    """Return for each level the mask ``(B, h, w)`` of the coefficients that a valid position ``(B, H, W)`` contributes to."""
    found: list[Tensor | None] = []
    for _ in range(levels):
        if valid is not None:
            wide = F.pad((valid > 0).float(), (0, valid.shape[-1] % 2, 0, valid.shape[-2] % 2))
            valid = F.max_pool2d(wide[:, None], 2)[:, 0]
        found.append(valid)
    return found


class FrequencyPrompts(nn.Module):
    """Prompts whose similarity to the coefficients of a wavelet transform is a soft mask: some for each level of bands.

    Args:
        channels: C, the width of the teacher's features.
        prompts: T, the number of prompts of a level.
        levels: J, the number of levels of the transform.
    """

    def __init__(self, channels: int, prompts: int, levels: int = 3) -> None:
        super().__init__()
        self.prompts = nn.Parameter(torch.randn(1 + levels, prompts, channels) * 0.01)

    def masks(self, features: Tensor, valid: Tensor | None = None) -> list[Tensor]:
        """Return the masks ``(B, T, h, w)`` of the high bands of each level, which are those of the sum of its three bands."""
        return self._masks(haar_bands(inside(upcast(features), valid), len(self.prompts) - 1), valid)[1:]

    def _masks(self, bands: Bands, valid: Tensor | None) -> list[Tensor]:
        """Return the masks of the low band and of each level of high bands."""
        low, high = bands
        present = halved(valid, len(high))
        read = [(low, present[-1]), *((level.sum(2), mask) for level, mask in zip(high, present, strict=True))]
        return [soft_masks(prompts, *pair) for prompts, pair in zip(self.prompts, read, strict=True)]

    def masked(self, features: Tensor, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the maps restored from bands times the sum of their masks, and the overlap ``(B,)`` of the masks."""
        low, high = haar_bands(inside(features, valid), len(self.prompts) - 1)
        masks = self._masks((low, high), valid)
        kept = [level * own.sum(1)[:, None, None] for level, own in zip(high, masks[1:], strict=True)]
        overlap = torch.stack([mask_overlap(own) for own in masks]).sum(0)
        return haar_maps((low * masks[0].sum(1, keepdim=True), kept), features.shape[-2:]), overlap

    def errors(self, features: Tensor, valid: Tensor | None = None) -> dict[str, Tensor]:
        """Return the errors ``(B,)`` that the prompts learn to reduce: the overlap of the masks and what they miss."""
        low, high = haar_bands(inside(upcast(features), valid), len(self.prompts) - 1)
        masks = self._masks((low, high), valid)
        parts = [(low, masks[0].sum(1))]
        for level, own in zip(high, masks[1:], strict=True):
            parts.append((level.flatten(1, 2), own.sum(1)))
        overlap = torch.stack([mask_overlap(own) for own in masks]).sum(0)
        return {"overlap": overlap, "unmasked": unmasked_share(parts)}


def frequency_imitation(
    student: Tensor,
    teacher: Tensor,
    masks: Sequence[Tensor],
    *,
    valid: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Frequency distillation (FreeKD): absolute errors of masked high bands, added over the levels of a Haar transform.

    .. math:: \sum_j \frac{1}{T \cdot 3C \cdot N_j} \sum_{t,b,c,i} m_{jti} \, |H_{jbci}(s) - H_{jbci}(t)|

    over the J levels, their 3 bands and N positions, as in the authors' code, which leaves the low band out.

    Args:
        student, teacher: features ``(B, C, H, W)``, the same shape.
        masks: m, ``(B, T, h, w)`` in [0, 1] of each level, from fine to coarse; see :class:`FrequencyPrompts`.
        valid: ``(B, H, W)``, > 0 for the positions to include; all by default. The features are 0 elsewhere, and coefficients
            count to which a valid position contributes.
        reduction: over images (those without a valid position are excluded); ``"none"`` gives ``(B,)``.

    Raises:
        DistillError: the shapes differ, or there is no mask.
    """
    same_shape(student, teacher, "frequency_imitation")
    if not masks:
        raise DistillError("frequency_imitation: needs the masks of at least one level")
    difference = inside(upcast(student), valid) - inside(upcast(teacher), valid)
    _, high = haar_bands(difference, len(masks))
    levels = []
    for level, own, present in zip(high, masks, halved(valid, len(masks)), strict=True):
        levels.append(image_means(level.abs().mean((1, 2)) * own.to(level.dtype).mean(1), present))
    items, some = torch.stack(levels).sum(0), images_present(valid)
    return reduce_loss(items, None if some is None else some.to(items.dtype), reduction)
