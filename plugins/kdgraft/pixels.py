"""Normalisations of images, and the conversion of normalised images from one to another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from .errors import DistillError, WiringError, check_number, nearest

Order = Literal["rgb", "bgr"]
_SETTINGS = ("mean", "std", "pixel_range", "order")


@dataclass(frozen=True)
class Normalisation:
    """The step from pixels to a model's images: ``(pixel - mean) / std``, channel by channel.

    Attributes:
        mean, std: one number for each channel, for pixels from 0 to 255.
        order: the order of the channels.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    order: Order = "rgb"

    @classmethod
    def of(cls, owner: str, mean: Any, std: Any, pixel_range: Any = 1, order: Any = "rgb") -> Normalisation:
        """Return the normalisation by a mean and a standard deviation in the user's range of pixels.

        Args:
            owner: whose images these are, for messages.
            mean: one number for each channel.
            std: as many.
            pixel_range: the largest pixel in the unit of both: 1, or 255.
            order: ``"rgb"`` or ``"bgr"``.

        Raises:
            DistillError: there is none, or the numbers do not fit the range.
        """
        for name, values in (("mean", mean), ("std", std)):
            if not isinstance(values, Sequence) or isinstance(values, str) or not values:
                raise DistillError(
                    f"{owner} needs its normalisation, mean=… and std=…, one number for each channel (never the student's in "
                    f"silence); got {name}={values!r}"
                )
            for value in values:
                check_number(owner, name, value, above=name == "std")
        if len(mean) != len(std):
            raise DistillError(f"{owner}: mean has {len(mean)} channels and std {len(std)}; give both as many")
        if pixel_range not in (1, 255) or isinstance(pixel_range, bool):
            raise DistillError(f"{owner}: pixel_range must be 1 or 255, got {pixel_range!r}")
        if max(mean) > pixel_range:
            raise DistillError(f"{owner}: mean={list(mean)} is beyond pixels from 0 to 1; say pixel_range=255")
        if pixel_range == 255 and 0 < max(mean) <= 1 and max(std) <= 1:
            raise DistillError(
                f"{owner}: mean={list(mean)} and std={list(std)} are for pixels from 0 to 1; say pixel_range=1"
            )
        if order not in ("rgb", "bgr"):
            raise DistillError(f"{owner}: order must be 'rgb' or 'bgr', got {order!r}")
        unit = 255 / pixel_range
        return cls(tuple(value * unit for value in mean), tuple(value * unit for value in std), order)

    @classmethod
    def read(cls, owner: str, given: Any) -> Normalisation:
        """Return the normalisation of ``dict(mean=…, std=…, pixel_range=…, order=…)``; see :meth:`of`."""
        if not isinstance(given, Mapping):
            raise DistillError(f"{owner} must be dict(mean=[…], std=[…]), got {given!r}")
        for key in given:
            if key not in _SETTINGS:
                raise DistillError(f"{owner} takes no argument {key!r}{nearest(key, _SETTINGS)}")
        return cls.of(owner, **{"mean": None, "std": None, **given})


class Conversion:
    """Converts images of one normalisation into another: affine in each channel, with the channels reversed where the order differs.

    Args:
        given: the normalisation of the images.
        wanted: the normalisation that they get.
        owners: the names of the two models, for messages.

    Raises:
        WiringError: the two have different numbers of channels.
    """

    def __init__(self, given: Normalisation, wanted: Normalisation, owners: tuple[str, str]) -> None:
        if len(given.mean) != len(wanted.mean):
            raise WiringError(
                f"{owners[0]} normalises {len(given.mean)} channels, {owners[1]} {len(wanted.mean)}; both must read the same images"
            )
        self._swap = given.order != wanted.order
        mean, std, mean_wanted, std_wanted = map(torch.tensor, (given.mean, given.std, wanted.mean, wanted.std))
        if self._swap:
            mean, std = mean.flip(0), std.flip(0)
        self._scale, self._shift = std / std_wanted, (mean - mean_wanted) / std_wanted
        self.identity = not self._swap and bool((self._scale == 1).all() and (self._shift == 0).all())
        """True if the two normalisations agree."""

    def __call__(self, images: Tensor) -> Tensor:
        """Return the images ``(B, C, H, W)`` in the wanted normalisation; the same tensor where the two agree."""
        if self.identity:
            return images
        if self._scale.device != images.device:
            self._scale, self._shift = self._scale.to(images.device), self._shift.to(images.device)
        found = (images.flip(1) if self._swap else images).to(self._scale.dtype)
        shifted = torch.addcmul(self._shift.view(-1, 1, 1), found, self._scale.view(-1, 1, 1))
        return shifted.to(images.dtype)
