"""A teacher at its own input resolution: the pipeline delivers its images, and the student gets the same view reduced.

Chen et al., NeurIPS 2017, section 4.3 (a teacher of 688 pixels for a student of 344); FunMatch, arXiv 2106.05237. Both models
see one view: the content of every image is reduced by exactly the same factor, and the two padded inputs correspond exactly.
The teacher's boxes and feature maps are therefore the student's times the scale.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdgraft.errors import DistillError

Size = tuple[int, int]
_LARGEST = 16


def teacher_scale(spec: Any) -> Fraction:
    """Return the scale of ``teacher=dict(…, scale=…)`` as a ratio of small whole numbers; 1 by default.

    Both inputs are padded to multiples of a divisor and correspond exactly only if the scale is such a ratio. A larger
    denominator needs more padding. The scale is rounded to the nearest ratio within a thousandth, so that 1.333 is 4/3.

    Raises:
        DistillError: the scale is not a number from 1 to 16, or not a ratio with a denominator up to 16.
    """
    value = spec.get("scale", 1) if isinstance(spec, Mapping) else 1
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 1 <= value <= _LARGEST:
        raise DistillError(
            f"teacher: scale must be a number from 1 to {_LARGEST} (the teacher's image size over the student's), got {value!r}"
        )
    ratio = Fraction(value).limit_denominator(_LARGEST)
    if abs(float(ratio) - value) > 1e-3 * value:
        raise DistillError(
            f"teacher: scale={value!r} is no ratio of small whole numbers, which the padding of both inputs needs; "
            f"write scale={ratio}"
        )
    return ratio


@dataclass(frozen=True)
class Resolution:
    """The relation of the student's input to the teacher's.

    Attributes:
        scale: the teacher's size over the student's, > 1.
        divisor, teacher_divisor: the student's and the teacher's padded sizes are multiples of these.
        pad_value: the value of the student's padding, after the normalisation.
    """

    scale: Fraction
    divisor: int = 1
    teacher_divisor: int = 1
    pad_value: float = 0.0

    @classmethod
    def of(cls, scale: Fraction, student: nn.Module, teacher: Any) -> Resolution:
        """Return the relation between the inputs of two models, given their ``data_preprocessor``; others pad to no multiple."""
        divisor, teacher_divisor = (int(getattr(owner, "pad_size_divisor", 1)) for owner in (student, teacher))
        return cls(scale, divisor, teacher_divisor, float(getattr(student, "pad_value", 0)))

    def reduced(self, size: Sequence[int]) -> Size:
        """Return the student's (height, width) of an image, rounded up: the image may cover the last pixel only in part."""
        return math.ceil(size[0] / self.scale), math.ceil(size[1] / self.scale)

    def pad_shape(self, size: Sequence[int]) -> Size:
        """Return the padded size of one image of the student, as its ``data_preprocessor`` computes ``pad_shape``."""
        return _multiple(size[0], self.divisor), _multiple(size[1], self.divisor)

    def padded(self, sizes: Sequence[Sequence[int]]) -> Size:
        """Return the size of the student's padded input, given the sizes of its images.

        It is the smallest size whose sides are multiples of the student's divisor, and times the scale of the teacher's.
        """
        step = self.teacher_divisor * self.scale.denominator
        step = self.divisor * (step // math.gcd(step, self.divisor * self.scale.numerator))
        height, width = (max(side) for side in zip(*sizes, strict=True))
        return _multiple(height, step), _multiple(width, step)

    def enlarged(self, padded: Sequence[int]) -> Size:
        """Return the size of the teacher's padded input: exactly ``scale`` times the student's :meth:`padded` one."""
        return int(padded[0] * self.scale), int(padded[1] * self.scale)

    @torch.no_grad()
    def student_inputs(self, inputs: Tensor, sizes: Sequence[Size]) -> Tensor:
        """Return the student's batch ``(B, C, h, w)``. Each image is reduced without its padding.

        Args:
            inputs: the teacher's batch ``(B, C, H, W)``.
            sizes: (height, width) of each of the teacher's images, which lie at the top left of ``inputs``.
        """
        small = [self.reduced(size) for size in sizes]
        height, width = self.padded(small)
        batch = inputs.new_full((*inputs.shape[:2], height, width), self.pad_value)
        for place, ((h, w), (rows, columns)) in enumerate(zip(sizes, small, strict=True)):
            batch[place, :, :rows, :columns] = reduce_image(inputs[place, :, :h, :w], self.scale)
        return batch

    def teacher_inputs(self, view: Tensor, padded: Size, pad_value: float) -> Tensor:
        """Pad the teacher's view, or cut its padding, so that it corresponds to the student's ``padded`` input."""
        height, width = self.enlarged(padded)
        return F.pad(view, (0, width - view.shape[3], 0, height - view.shape[2]), value=pad_value)


def reduce_image(image: Tensor, scale: Fraction) -> Tensor:
    """Reduce an image ``(C, H, W)`` to ``(C, ⌈H/scale⌉, ⌈W/scale⌉)``: antialiased bilinear, in float32.

    Pixel i of the result is centred at ``(i + 0.5)·scale`` of the image, even if the scale does not divide its size. The border
    of the image is then repeated for the last pixel.
    """
    height, width = (math.ceil(side / scale) for side in image.shape[-2:])
    more = math.ceil(2 * scale)  # enough for one more pixel, as interpolate rounds its output size down
    extended = F.pad(image[None].float(), (0, more, 0, more), mode="replicate")
    small = F.interpolate(
        extended, scale_factor=float(1 / scale), mode="bilinear", antialias=True, recompute_scale_factor=False
    )
    return small[0, :, :height, :width].to(image.dtype)


def nearest_positions(size: int, scale: Fraction) -> Tensor:
    """Return, for each of the ``⌈size/scale⌉`` reduced pixels, the index of the pixel (of ``size``) at its centre."""
    centres = (torch.arange(math.ceil(size / scale), dtype=torch.float64) + 0.5) * float(scale)
    return centres.long().clamp(max=size - 1)


def samples_padded_to(samples: Sequence[Any], padded: Size) -> list[Any]:
    """Return copies of data samples whose metadata describe a padded input of another size."""
    copies = [sample.new() for sample in samples]
    for copy in copies:
        copy.set_metainfo(dict(batch_input_shape=padded, pad_shape=padded))
    return copies


def _multiple(side: int, of: int) -> int:
    return -(-side // of) * of
