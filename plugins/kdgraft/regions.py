"""Regions: weights over the positions of a feature map.

A region sees the batch in the frame of the network's *padded* input: a feature map of ``(H, W)`` positions covers the padded
height and width, so that is what boxes are scaled by. (Scaling by the unpadded size shifts every box; a known defect elsewhere.)
Of sequences it sees which tokens count.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from .errors import WiringError
from .registry import REGIONS
from .taps import Tap

T = TypeVar("T")


@dataclass(frozen=True)
class Samples:
    """Which samples a batch holds, for teachers whose outputs are kept.

    Attributes:
        ids: what tells them apart, the same in every epoch.
        inputs: what the teacher is given of the batch, so that other inputs under one id are noticed.
    """

    ids: Sequence[Any]
    inputs: dict[str, Tensor]


@dataclass
class Batch:
    """What regions and terms may know of a batch. Pixels are those of the padded network input.

    Attributes:
        padded_size: (height, width) of the network input, or ``None`` where there is no such thing.
        image_sizes: per image its (height, width) inside the padded input, top left; ``None`` when nothing is padded.
        boxes: per image ``(n, 4)`` as x1, y1, x2, y2; ``None`` when the host has none.
        labels: whatever the host calls labels: per image ``(n,)``, or one tensor; ``(B, H, W)`` classes of pixels.
        valid: ``(B, H, W)``, true for pixels that are neither ignored nor padding; ``None`` when the host has no such thing.
        tokens: ``(B, L)``, true for the tokens of sequences that are not padding; ``None`` when the host has no such thing.
        samples: which samples the batch holds; ``None`` when the host has no such thing.
        extra: anything that only one host's terms look at.
    """

    padded_size: tuple[int, int] | None = None
    image_sizes: Sequence[tuple[int, int]] | None = None
    boxes: Sequence[Tensor] | None = None
    labels: Any = None
    valid: Tensor | None = None
    tokens: Tensor | None = None
    samples: Samples | None = None
    extra: dict[Any, Any] = field(default_factory=dict)

    def once(self, key: tuple[Any, ...], make: Callable[[], T]) -> T:
        """What ``make`` gives, made once a batch for a key; what it reads of a recording puts ``recording.model`` in the key."""
        if key not in self.extra:
            self.extra[key] = make()
        found: T = self.extra[key]
        return found

    def at(self, tap: Tap, feature: Tensor) -> Batch:
        """Return the batch as it looks where ``feature`` was tapped; for hosts whose models hold several sequences.

        Raises:
            WiringError: the host cannot tell which positions of ``feature`` are padding.
        """
        return self


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
    """Every position that is not padding, all alike: of maps those whose centre lies in the image, of sequences all tokens."""

    def __call__(self, batch: Batch, feature: Tensor, scale: float = 1.0) -> Tensor | None:
        if batch.tokens is not None:
            return token_weights(batch.tokens, feature)
        if feature.ndim != 4 or batch.image_sizes is None or batch.padded_size is None:
            return None
        return valid_positions(batch.image_sizes, batch.padded_size, feature)


@REGIONS.register("foreground")
class Foreground(Region):
    """Positions on a ground-truth box; each box weighs 1 in total, so that small objects count as much as large ones.

    Overlapped positions belong to the smallest box; a box that smaller ones hide altogether weighs nothing.
    """

    needs = frozenset({"boxes"})

    def __call__(self, batch: Batch, feature: Tensor, scale: float = 1.0) -> Tensor:
        if feature.ndim != 4 or batch.boxes is None or batch.padded_size is None:
            raise WiringError("region 'foreground' needs a map (B, C, H, W) and a batch with boxes")
        return foreground_weights(batch.boxes, batch.padded_size, feature)


@REGIONS.register("valid")
class Valid(Region):
    """Every position whose centre is a pixel that counts: neither padding nor labelled to be ignored."""

    needs = frozenset({"valid"})

    def __call__(self, batch: Batch, feature: Tensor, scale: float = 1.0) -> Tensor:
        if feature.ndim != 4 or batch.valid is None:
            raise WiringError("region 'valid' needs a map (B, C, H, W) and a batch with valid pixels")
        return on_grid(batch.valid, feature.shape[-2:]).to(torch.float32)


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


BOXES_AT_ONCE = 16
"""How many boxes of an image are compared with all positions at a time, so that memory does not grow with the number of boxes."""


@torch.no_grad()
def foreground_weights(boxes: Sequence[Tensor], padded_size: tuple[int, int], feature: Tensor) -> Tensor:
    """Area-normalised foreground weights.

    A box covers every position that it touches, at least one. Where boxes overlap, the smallest wins. A box spreads a weight
    of 1 evenly over the positions that it won; the background weighs 0.

    Args:
        boxes: per image ``(n, 4)``: x1, y1, x2, y2 in pixels of the padded input.
        padded_size: (height, width) of the padded input.
        feature: the map ``(B, C, H, W)`` whose grid is meant.

    Returns:
        ``(B, H, W)``, float32.
    """
    height, width = feature.shape[-2:]
    device = feature.device
    most = max((len(b) for b in boxes), default=0)
    weights = torch.zeros(len(boxes), height, width, device=device)
    if most == 0:
        return weights
    padded = torch.zeros(len(boxes), most, 4, device=device)
    real = torch.zeros(len(boxes), most, dtype=torch.bool, device=device)
    for image, found in enumerate(boxes):
        padded[image, : len(found)] = found.to(device=device, dtype=torch.float32)
        real[image, : len(found)] = True
    x1, y1, x2, y2 = padded.unbind(-1)
    area = ((x2 - x1).clamp(min=0) * (y2 - y1).clamp(min=0)).masked_fill(~real, torch.inf)
    cover_y = _touched(y1, y2, padded_size[0] / height, height)
    cover_x = _touched(x1, x2, padded_size[1] / width, width)
    cover_y, cover_x = cover_y & real[..., None], cover_x & real[..., None]
    smallest = torch.full_like(weights, torch.inf)
    owner = torch.zeros_like(weights, dtype=torch.long)
    for first in range(0, most, BOXES_AT_ONCE):
        part = slice(first, first + BOXES_AT_ONCE)
        cover = cover_y[:, part, :, None] & cover_x[:, part, None, :]
        size, place = area[:, part, None, None].expand_as(cover).masked_fill(~cover, torch.inf).min(1)
        owner = torch.where(size < smallest, place + first, owner)
        smallest = torch.minimum(smallest, size)
    covered = smallest.isfinite().to(torch.float32)
    counts = torch.zeros(len(boxes), most, device=device).scatter_add_(1, owner.flatten(1), covered.flatten(1))
    return covered / counts.gather(1, owner.flatten(1)).view_as(covered).clamp(min=1)


def _touched(low: Tensor, high: Tensor, stride: float, count: int) -> Tensor:
    """Which of ``count`` cells of ``stride`` pixels the intervals touch: ``(B, n) -> (B, n, count)``, at least one each."""
    first = (low / stride).floor().clamp(0, count - 1)
    last = torch.maximum((high / stride).ceil() - 1, first).clamp(max=count - 1)
    cells = torch.arange(count, device=low.device)
    return (cells >= first[..., None]) & (cells <= last[..., None])
