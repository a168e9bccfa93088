"""Patient and consistent teaching: the student and its teachers see the same crop and the same mixture of images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import DistillError, check_flag, check_number
from .views import Views

Mode = Literal["consistent", "fixed", "independent"]
Size = int | tuple[int, int]
Box = tuple[int, int, int, int]
"""Top, left, height and width of a crop."""


class Noise(NamedTuple):
    """The random numbers of one view: a crop and a flip for each image, and the share of the image itself in a mixture."""

    boxes: Sequence[Box]
    flips: Sequence[bool]
    share: float


class Teaching:
    r"""Views for ``fit(views=…)`` in which a teacher answers on what the student sees (Beyer et al. 2022, arXiv 2106.05237).

    In consistent teaching both models see the same random crop, and the same mixup with
    :math:`\lambda \tilde x_i + (1 - \lambda) \tilde x_{i-1}`, with one :math:`\lambda` a batch, uniform on [0, 1]; as in the
    authors' code (google-research/big_vision@0127fb6) the larger of both shares is that of the image itself. The other two modes,
    which the paper found to be worse, are there to compare. All random numbers come from torch's generator, so that a resumed run
    repeats them.

    Args:
        mode: ``"consistent"``; ``"fixed"``: the teacher sees the centre of each image, without noise, as if its answers had been
            stored; ``"independent"``: the teacher sees a crop and a mixture of its own.
        crop: the least and the largest area of a crop, as shares of the image's area; ``None`` for whole images.
        ratio: the least and the largest quotient of a crop's width and height.
        flip: turn half of the crops left to right.
        mixup: mix each image with the one before it in the batch.
        size: the size of the student's view, a number or (height, width); that of the images if omitted.
        teacher_size: the size of the teachers' view, such as a higher resolution of the same crop; the student's if omitted.
        classes: number of classes, by which integer targets are mixed as probabilities; needed only for these and with mixup.
        teachers: the names of the sources that get the teacher's view.

    Example:
        >>> distiller = Distiller(student, teacher, recipe="funmatch", example=images)
        >>> views, mixed = Teaching("consistent", classes=5)(images, labels)
        >>> torch.equal(views.student, views.of("teacher")), mixed.shape
        (True, torch.Size([2, 5]))
    """

    def __init__(
        self,
        mode: Mode = "consistent",
        *,
        crop: tuple[float, float] | None = (0.08, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        flip: bool = False,
        mixup: bool = True,
        size: Size | None = None,
        teacher_size: Size | None = None,
        classes: int | None = None,
        teachers: Sequence[str] = ("teacher",),
    ) -> None:
        if mode not in ("consistent", "fixed", "independent"):
            raise DistillError(f"Teaching: mode must be 'consistent', 'fixed' or 'independent', got {mode!r}")
        for name, pair, most in (("crop", crop, 1.0), ("ratio", ratio, math.inf)):
            if pair is not None and not (len(pair) == 2 and 0 < pair[0] <= pair[1] <= most):
                limit = " <= 1" if most == 1 else ""
                raise DistillError(f"Teaching: {name} must be two numbers, 0 < least <= largest{limit}, got {pair!r}")
        check_flag("Teaching", "flip", flip)
        check_flag("Teaching", "mixup", mixup)
        if classes is not None:
            check_number("Teaching", "classes", classes, 2, whole=True)
        if isinstance(teachers, str) or not teachers:
            raise DistillError(f"Teaching: teachers must be a list of names of sources, got {teachers!r}")
        self.mode, self.crop, self.ratio, self.flip, self.mixup = mode, crop, ratio, flip, mixup
        self.size, self.teacher_size = _size("size", size), _size("teacher_size", teacher_size)
        self.classes, self.teachers = classes, tuple(teachers)

    def __call__(self, images: Tensor, targets: Any) -> tuple[Views, Any]:
        """Return the views of a batch and its targets, mixed as the student's images are.

        Args:
            images: ``(B, C, H, W)``, numbers.
            targets: classes ``(B,)``, probabilities or numbers ``(B,)`` or ``(B, D)``, or ``None``.

        Raises:
            DistillError: the images are not of this shape, or the targets cannot be mixed.
        """
        if not isinstance(images, Tensor) or images.ndim != 4 or not images.is_floating_point():
            kind = f"{images.dtype} {tuple(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
            raise DistillError(f"Teaching needs images (B, C, H, W) of floating-point numbers, got {kind}")
        size = self.size or (images.shape[-2], images.shape[-1])
        other = self.teacher_size or size
        noise = self._noise(images)
        student = seen(images, noise, size)
        if self.mode == "consistent":
            teacher = student if other == size else seen(images, noise, other)
        elif self.mode == "independent":
            teacher = seen(images, self._noise(images), other)
        else:
            teacher = seen(images, Noise([_centre(images, other)] * len(images), [False] * len(images), 1.0), other)
        return Views(student, **dict.fromkeys(self.teachers, teacher)), self._targets(targets, noise.share)

    def _noise(self, images: Tensor) -> Noise:
        height, width = images.shape[-2:]
        whole = (0, 0, height, width)
        boxes = [whole if self.crop is None else random_box(height, width, self.crop, self.ratio) for _ in images]
        flips = (torch.rand(len(images)) < 0.5).tolist() if self.flip else [False] * len(images)
        share = float(torch.rand(())) if self.mixup else 1.0
        return Noise(boxes, flips, max(share, 1 - share))

    def _targets(self, targets: Any, share: float) -> Any:
        if not self.mixup or targets is None:
            return targets
        if (
            not isinstance(targets, Tensor)
            or targets.ndim > 2
            or (targets.ndim > 1 and not targets.is_floating_point())
        ):
            kind = tuple(targets.shape) if isinstance(targets, Tensor) else type(targets).__name__
            raise DistillError(
                f"Teaching: mixup needs targets (B,), or (B, D) of numbers, got {kind}; give mixup=False for others"
            )
        if not targets.is_floating_point():
            if self.classes is None:
                raise DistillError("Teaching: mixup mixes classes as probabilities; give their number, classes=…")
            targets = F.one_hot(targets, self.classes).float()
        return mixed(targets, share)


def random_box(height: int, width: int, area: tuple[float, float], ratio: tuple[float, float]) -> Box:
    """Draw the crop of an image as for Inception: its area is uniform, the logarithm of its width by its height as well.

    Args:
        height, width: of the image.
        area: the least and the largest area, as shares of the image's.
        ratio: the least and the largest quotient of width and height.

    Returns:
        The crop, inside the image; the whole image if ten draws do not fit.
    """
    low, high = (math.log(side) for side in ratio)
    for _ in range(10):
        share, shape, down, right = torch.rand(4).tolist()
        surface = height * width * (area[0] + (area[1] - area[0]) * share)
        quotient = math.exp(low + (high - low) * shape)
        tall, wide = max(round(math.sqrt(surface / quotient)), 1), max(round(math.sqrt(surface * quotient)), 1)
        if tall <= height and wide <= width:
            return int(down * (height - tall + 1)), int(right * (width - wide + 1)), tall, wide
    return 0, 0, height, width


def seen(images: Tensor, noise: Noise, size: tuple[int, int]) -> Tensor:
    """Crop, flip, resize (bilinear, antialiased) and mix images.

    Args:
        images: ``(B, C, H, W)``.
        noise: the random numbers.
        size: height and width of the result.

    Returns:
        ``(B, C, *size)``.
    """
    found = []
    for image, (top, left, tall, wide), flip in zip(images, noise.boxes, noise.flips, strict=True):
        part = image[None, :, top : top + tall, left : left + wide]
        part = part.flip(-1) if flip else part
        found.append(part if (tall, wide) == size else F.interpolate(part, size, mode="bilinear", antialias=True))
    return mixed(torch.cat(found), noise.share)


def mixed(values: Tensor, share: float) -> Tensor:
    """Return ``share · values[i] + (1 − share) · values[i − 1]`` for each ``i``."""
    return values if share == 1 else share * values + (1 - share) * values.roll(1, 0)


def _centre(images: Tensor, size: tuple[int, int]) -> Box:
    """Return the largest crop in the middle of images that has the proportions of ``size``."""
    height, width = images.shape[-2:]
    scale = min(height / size[0], width / size[1])
    tall, wide = round(size[0] * scale), round(size[1] * scale)
    return (height - tall) // 2, (width - wide) // 2, tall, wide


def _size(name: str, size: Size | None) -> tuple[int, int] | None:
    if size is None:
        return None
    sides = (size, size) if isinstance(size, int) else tuple(size)
    for side in sides:
        check_number("Teaching", name, side, 1, whole=True)
    if len(sides) != 2:
        raise DistillError(f"Teaching: {name} must be a number or (height, width), got {size!r}")
    return sides[0], sides[1]
