"""Regions: weights over the positions of a feature map.

A region sees the batch in the frame of the network's *padded* input: a feature map of ``(H, W)`` positions covers the padded
height and width, so that is what boxes are scaled by. (Scaling by the unpadded size shifts every box; a known defect elsewhere.)
Of sequences it sees which tokens count.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..batch import Batch
from ..errors import WiringError
from ..registry import REGIONS


class Region:
    """Base: weights ``(B, H, W)`` for a map ``(B, C, H, W)``, or ``None`` for 1 everywhere.

    ``needs`` names the fields of :class:`Batch` without which the region means nothing; checked when the term is built.
    """

    needs: frozenset[str] = frozenset()

    def __call__(self, batch: Batch, feature: Tensor, scale: float = 1.0) -> Tensor | None:
        """The weights on the grid of ``feature``, whose model sees the images at ``scale`` times the student's size."""
        raise NotImplementedError


@REGIONS.register("all")
class All(Region):
    """Every position that counts, all alike.

    Of sequences these are the tokens that are no padding; of maps the positions whose centre is a pixel that the host counts
    (neither padding nor labelled to be ignored) or, where the host counts all pixels, lies in the image.
    """

    def __call__(self, batch: Batch, feature: Tensor, scale: float = 1.0) -> Tensor | None:
        if batch.tokens is not None:
            return token_weights(batch.tokens, feature)
        if batch.valid is not None and feature.ndim == 4:
            return on_grid(batch.valid, feature.shape[-2:]).to(torch.float32)
        if feature.ndim != 4 or batch.image_sizes is None or batch.padded_size is None:
            return None
        return valid_positions(batch.image_sizes, batch.padded_size, feature)


def token_weights(tokens: Tensor, feature: Tensor) -> Tensor | None:
    """1 for tokens that count, else 0, in the layout of what was tapped; ``None`` for one vector ``(B, C)`` a sequence.

    Args:
        tokens: ``(B, L)``, true for tokens that count.
        feature: states ``(B, L, C)``, those of all sequences in one list ``(B·L, C)``, or ``(B, C)``.

    Raises:
        WiringError: ``feature`` has another layout, so that nobody knows where its padding is.
    """
    if feature.ndim == 2 and len(feature) == len(tokens):
        return None
    if feature.ndim > 3 or feature.shape[:-1] not in (tokens.shape, (tokens.numel(),)):
        raise WiringError(
            f"a tensor {tuple(feature.shape)} does not lie on the {tuple(tokens.shape)} tokens of the batch, so that its padding "
            "cannot be left out; tap states (B, L, C) of tokens"
        )
    return tokens.reshape(feature.shape[:-1]).to(torch.float32)


def on_grid(pixels: Tensor, size: Sequence[int]) -> Tensor:
    """Labels or masks ``(B, H, W)`` on a smaller or larger grid ``size``: each position takes the pixel at its centre."""
    if pixels.shape[-2:] == tuple(size):
        return pixels
    y, x = (
        ((torch.arange(new, device=pixels.device) + 0.5) * (old / new)).long().clamp(max=old - 1)
        for new, old in zip(size, pixels.shape[-2:], strict=True)
    )
    return pixels[:, y[:, None], x[None, :]]


def valid_positions(
    image_sizes: Sequence[tuple[int, int]], padded_size: tuple[int, int], feature: Tensor
) -> Tensor | None:
    """1 where a position's centre lies inside the image, else 0: ``(B, H, W)``; ``None`` when no image is padded."""
    if all(tuple(size) == tuple(padded_size) for size in image_sizes):
        return None
    height, width = feature.shape[-2:]
    sizes = torch.as_tensor(image_sizes, dtype=torch.float32, device=feature.device)
    y = (torch.arange(height, device=feature.device) + 0.5) * (padded_size[0] / height)
    x = (torch.arange(width, device=feature.device) + 0.5) * (padded_size[1] / width)
    inside = (y < sizes[:, :1])[:, :, None] & (x < sizes[:, 1:])[:, None, :]
    return inside.to(torch.float32)
