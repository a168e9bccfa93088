"""Handwritten digits that are hard to read: the embedded classification set of ``kdgraft experiments``.

Each picture shows one of scikit-learn's 1797 digits (8×8 pixels) on a canvas, scaled, turned, sheared, shifted and faint, among
pieces of other digits of the same split and noise. No digit, not even a piece of one, is in two splits. A picture depends on the
split, its number and nothing else, so that every seed of the demo trains on the same pictures.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from kdgraft.errors import DistillError

from ..data.digits import CLASSES, SPLITS, all_digits, sources_of

SIDE = 32
"""The side of a canvas; nets see it at half this resolution, except teachers of a higher one."""
COPIES = {"train": 2, "val": 2, "test": 8}
"""The number of pictures of each digit, each with its own transformation and clutter."""

_PIECES = 2  # the number of pieces of other digits on a canvas
_NOISE = 0.12  # the standard deviation of the noise of a pixel, where ink is 1


@dataclass(frozen=True)
class Pictures:
    """N pictures, square.

    Attributes:
        large: about 0 in the mean and 1 in the standard deviation, ``(N, C, S, S)``; 1 channel and a side of 32 in the embedded set.
        labels: 0 to 9, ``(N,)``.
        source: the digit's index in scikit-learn's set, ``(N,)``; the picture's own number in a real set.
        clean: the digits alone, without pieces of others and noise, as ``large``; ``None`` in a real set.
    """

    large: Tensor
    labels: Tensor
    source: Tensor
    clean: Tensor | None = None

    @cached_property
    def small(self) -> Tensor:
        """The pictures at half the resolution, ``(N, C, S / 2, S / 2)``."""
        return halved(self.large)


def halved(pictures: Tensor) -> Tensor:
    """Return pictures ``(N, C, S, S)`` at half the resolution, as :class:`kdgraft.consistent.Teaching` does it."""
    side = pictures.shape[-1] // 2
    return F.interpolate(pictures, (side, side), mode="bilinear", antialias=True)


@lru_cache(maxsize=len(SPLITS))
def pictures_of(split: str, folder: str = "") -> Pictures:
    """Return the pictures of ``"train"``, ``"val"`` or ``"test"``; the same at every call.

    Args:
        split: the split.
        folder: a real set with ``train/CLASS/*.jpg`` and ``val/CLASS/*.jpg``, of which ``val`` serves for ``"test"`` too.
    """
    return _read(split, folder) if folder else _rendered(split)


def part_of(pictures: Pictures, share: float) -> Pictures:
    """Draw a share of the pictures, the same one of each class and at least one, in the current random state."""
    if share == 1:
        return pictures
    order = torch.randperm(len(pictures.labels))
    rows = [order[pictures.labels[order] == label] for label in pictures.labels.unique()]
    kept = torch.cat([each[: max(round(share * len(each)), 1)] for each in rows])
    return Pictures(pictures.large[kept], pictures.labels[kept], pictures.source[kept])


def _rendered(split: str) -> Pictures:
    rng = np.random.default_rng(SPLITS.index(split))
    images, labels = all_digits()
    own = sources_of(split)
    source = np.tile(own, COPIES[split])
    ink = F.interpolate(torch.from_numpy(images)[:, None], size=(SIDE, SIDE), mode="bicubic").clamp(0, 1)
    count = len(source)
    clean = canvas = _placed(rng, ink[source], size=(20, 28), turn=20, reach=3, opacity=(0.6, 1.0))
    for _ in range(_PIECES):
        pieces = _pieces(rng, ink[rng.choice(own, count)])
        canvas = torch.maximum(canvas, _placed(rng, pieces, size=(16, 26), turn=180, reach=14, opacity=(0.3, 0.7)))
    noise = torch.from_numpy(rng.standard_normal(canvas.shape, dtype=np.float32))
    large = (canvas + _NOISE * noise).clamp(0, 1)
    return Pictures(_normalised(large), torch.from_numpy(labels[source]), torch.from_numpy(source), _normalised(clean))


def _normalised(ink: Tensor) -> Tensor:
    return (ink - 0.2) / 0.25


def _pieces(rng: np.random.Generator, ink: Tensor) -> Tensor:
    """Return digits ``(N, 1, S, S)`` of which only a random square of 7/16 of the side is left, moved to the middle."""
    count, side = len(ink), ink.shape[-1]
    half = side * 7 // 16
    corners = torch.from_numpy(rng.integers(0, side - half + 1, (count, 2)))
    rows, columns = (corner[:, None] + torch.arange(half) for corner in corners.T)
    start = (side - half) // 2
    found = torch.zeros_like(ink)
    found[:, 0, start : start + half, start : start + half] = ink[
        torch.arange(count)[:, None, None], 0, rows[:, :, None], columns[:, None, :]
    ]
    return found


def _read(split: str, folder: str) -> Pictures:
    """Read a real set: colour pictures, cut to squares, of 64×64 pixels."""
    root = Path(folder) / ("train" if split == "train" else "val")
    classes = sorted(path.name for path in root.iterdir() if path.is_dir()) if root.is_dir() else []
    found = [(path, label) for label, name in enumerate(classes) for path in sorted((root / name).glob("*.jpg"))]
    if len(classes) != len(CLASSES) or not found:
        raise DistillError(
            f"{root} must have ten folders with pictures, *.jpg, one for each class; it has {len(classes)}"
        )
    rows = []
    for path, _ in found:
        with Image.open(path) as image:
            rows.append(np.asarray(ImageOps.fit(image.convert("RGB"), (64, 64)), dtype=np.float32))
    large = torch.from_numpy(np.stack(rows)).permute(0, 3, 1, 2) / 255
    return Pictures((large - 0.5) / 0.25, torch.tensor([label for _, label in found]), torch.arange(len(found)))


def _placed(
    rng: np.random.Generator,
    ink: Tensor,
    *,
    size: tuple[float, float],
    turn: float,
    reach: float,
    opacity: tuple[float, float],
) -> Tensor:
    """Put each digit ``(N, 1, S, S)`` at a random place of its own canvas, ``(N, 1, 32, 32)``.

    Args:
        rng: the source of randomness.
        ink: the digits.
        size: the smallest and the largest side of a digit on the canvas, in its pixels.
        turn: the largest angle, in degrees.
        reach: the largest distance between the centres of digit and canvas along each axis, in pixels.
        opacity: the smallest and the largest factor on the ink.
    """
    count = len(ink)
    angle = np.deg2rad(rng.uniform(-turn, turn, count))
    side, shear, stretch = rng.uniform(*size, count), rng.uniform(-0.25, 0.25, count), rng.uniform(0.8, 1.25, count)
    shift = rng.uniform(-reach, reach, (count, 2)) * 2 / SIDE
    # grid_sample wants the map from the canvas to the digit, both with coordinates from -1 to 1.
    turned = np.stack([np.cos(angle), -np.sin(angle), np.sin(angle), np.cos(angle)], axis=1).reshape(-1, 2, 2)
    sheared = np.stack([stretch, shear, np.zeros(count), 1 / stretch], axis=1).reshape(-1, 2, 2)
    matrix = (SIDE / side)[:, None, None] * sheared @ turned
    offset = -np.einsum("nij,nj->ni", matrix, shift)
    theta = torch.from_numpy(np.concatenate([matrix, offset[..., None]], axis=2).astype(np.float32))
    grid = F.affine_grid(theta, [count, 1, SIDE, SIDE], align_corners=False)
    factor = torch.from_numpy(rng.uniform(*opacity, (count, 1, 1, 1)).astype(np.float32))
    return F.grid_sample(ink, grid, align_corners=False) * factor
