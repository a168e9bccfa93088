"""The teacher's view of the student's batch: the same pixels with the teacher's normalisation and channel order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kdgraft.errors import WiringError


class TeacherView:
    """Converts the student's preprocessed batch into the teacher's.

    Both preprocessors see the same raw pixels, so the conversion is affine per channel, with a swap of channels where only one
    of them converts BGR to RGB. Padding, which hosts fill after the normalisation, gets the teacher's fill value.

    Args:
        student: the student's ``data_preprocessor``.
        teacher: the teacher's.

    Raises:
        WiringError: the two normalise different numbers of channels.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module) -> None:
        mean_s, std_s, swap_s = _normalisation(student)
        mean_t, std_t, swap_t = _normalisation(teacher)
        if len(mean_s) != len(mean_t):
            raise WiringError(
                f"the student's data_preprocessor normalises {len(mean_s)} channels, the teacher's {len(mean_t)}; "
                "both must read the same images"
            )
        self.swap = swap_s != swap_t
        if self.swap:
            mean_s, std_s = mean_s.flip(0), std_s.flip(0)
        self.scale = std_s / std_t
        self.shift = (mean_s - mean_t) / std_t
        self.pad_value = float(getattr(teacher, "pad_value", 0))
        same_pad = float(getattr(student, "pad_value", 0)) == self.pad_value
        self.same_pixels = not self.swap and bool((self.scale == 1).all() and (self.shift == 0).all())
        self.identity = self.same_pixels and same_pad

    def __call__(self, inputs: Tensor, image_sizes: Sequence[tuple[int, int]]) -> Tensor:
        """Return the teacher's batch ``(B, C, H, W)``, which is the same tensor where the two normalisations agree."""
        if self.identity:
            return inputs
        view = inputs.flip(1) if self.swap else inputs
        if not self.same_pixels:
            if self.scale.device != inputs.device:
                self.scale, self.shift = self.scale.to(inputs.device), self.shift.to(inputs.device)
            scale, shift = self.scale, self.shift
            view = torch.addcmul(shift.view(-1, 1, 1), view.to(scale.dtype), scale.view(-1, 1, 1)).to(inputs.dtype)
        else:
            view = view.clone()
        for image, (height, width) in zip(view, image_sizes, strict=True):
            image[:, height:] = self.pad_value
            image[:, :, width:] = self.pad_value
        return view


def channels_of(preprocessor: nn.Module) -> int:
    """Return the number of channels of a model's images."""
    return len(_normalisation(preprocessor)[0])


def image_sizes(samples: Any) -> list[tuple[int, int]]:
    """Return (height, width) of each image inside the padded batch."""
    return [tuple(sample.metainfo["img_shape"][:2]) for sample in samples]


def sample_ids(samples: Any) -> list[Any] | None:
    """Return each image's id in the data set, or its file, by which a later epoch finds it again; ``None`` if one has neither."""
    for name in ("img_id", "img_path"):
        found = [sample.metainfo.get(name) for sample in samples]
        if None not in found:
            return found
    return None


def _normalisation(preprocessor: Any) -> tuple[Tensor, Tensor, bool]:
    """Return mean and standard deviation (float32, in the order of the normalised channels), and true if channels are swapped."""
    swap = bool(getattr(preprocessor, "_channel_conversion", getattr(preprocessor, "channel_conversion", False)))
    if not getattr(preprocessor, "_enable_normalize", hasattr(preprocessor, "mean")):
        return torch.zeros(3), torch.ones(3), swap
    return preprocessor.mean.detach().flatten().float().cpu(), preprocessor.std.detach().flatten().float().cpu(), swap
