"""Regions: weights over the positions of a feature map.

A region works in the coordinates of the network's *padded* input: a feature map of ``(H, W)`` positions covers the padded height
and width, by which boxes are therefore scaled. (Scaling by the unpadded size, a known defect elsewhere, shifts every box.) For
sequences it uses the mask of the tokens that count.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..batch import Batch
from ..errors import WiringError
from ..registry import REGIONS


class Region:
    """Base of regions: weights ``(B, H, W)`` for a map ``(B, C, H, W)``, or ``None`` for 1 everywhere.

    ``needs`` names the fields of :class:`Batch` that the region requires; this is checked when the term is built.

    Example:
        >>> class LeftHalf(Region):
        ...     def __call__(self, batch, feature, scale=1.0):
        ...         weights = torch.zeros(len(feature), *feature.shape[2:])
        ...         weights[..., : feature.shape[-1] // 2] = 1
        ...         return weights
        >>> LeftHalf()(Batch(), images).mean()
        tensor(0.5000)
    """

    needs: frozenset[str] = frozenset()

    def __call__(self, batch: Batch, feature: Tensor, scale: float = 1.0) -> Tensor | None:
        """Return the weights on the grid of ``feature``, whose model sees the images at ``scale`` times the student's size."""
        raise NotImplementedError


@REGIONS.register("all")
class All(Region):
    """Every position that counts, with equal weight.

    For sequences these are the tokens that are not padding; for maps the positions whose centre is a pixel that the host counts
    (neither padding nor ignored) or, if the host counts all pixels, lies in the image.
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
    """Return 1 for tokens that count, else 0, in the layout of ``feature``; ``None`` for one vector ``(B, C)`` per sequence.

    Args:
        tokens: ``(B, L)``, true for tokens that count.
        feature: states ``(B, L, C)``, flattened states ``(B·L, C)`` of all sequences, or vectors ``(B, C)``.

    Raises:
        WiringError: ``feature`` has another layout, in which the padding is unknown.
    """
    if feature.ndim == 2 and len(feature) == len(tokens):
        return None
    if feature.ndim > 3 or feature.shape[:-1] not in (tokens.shape, (tokens.numel(),)):
        raise WiringError(
            f"a tensor {tuple(feature.shape)} does not lie on the {tuple(tokens.shape)} tokens of the batch, so that its padding "
            "cannot be excluded; tap states (B, L, C) of tokens"
        )
    return tokens.reshape(feature.shape[:-1]).to(torch.float32)


def on_grid(pixels: Tensor, size: Sequence[int]) -> Tensor:
    """Resample labels or masks ``(B, H, W)`` to a grid ``size``: each position takes the value of the pixel at its centre."""
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
    """Return ``(B, H, W)``, 1 where a position's centre lies inside the image, else 0; ``None`` if no image is padded."""
    if all(tuple(size) == tuple(padded_size) for size in image_sizes):
        return None
    height, width = feature.shape[-2:]
    sizes = torch.as_tensor(image_sizes, dtype=torch.float32, device=feature.device)
    y = (torch.arange(height, device=feature.device) + 0.5) * (padded_size[0] / height)
    x = (torch.arange(width, device=feature.device) + 0.5) * (padded_size[1] / width)
    inside = (y < sizes[:, :1])[:, :, None] & (x < sizes[:, 1:])[:, None, :]
    return inside.to(torch.float32)
