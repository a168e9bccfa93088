"""The teacher's view of the student's batch: the same pixels with the teacher's normalisation and channel order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from kdgraft.pixels import Conversion, Normalisation, Order


class TeacherView:
    """Converts the student's preprocessed batch into the teacher's.

    Both preprocessors see the same raw pixels, so the conversion is affine per channel, with a swap of channels where only one
    of them converts BGR to RGB. Padding, which hosts fill after the normalisation, gets the teacher's fill value.

    Args:
        student: the student's ``data_preprocessor``.
        teacher: the teacher's, or its normalisation alone, of a teacher that is no model of the host; its padding is then 0.

    Raises:
        WiringError: the two normalise different numbers of channels.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module | Normalisation) -> None:
        owners = ("the student's data_preprocessor", "the teacher's")
        self._convert = Conversion(_normalisation(student), _normalisation(teacher), owners)
        self.pad_value = float(getattr(teacher, "pad_value", 0))
        same_pad = float(getattr(student, "pad_value", 0)) == self.pad_value
        self.identity = self._convert.identity and same_pad

    def __call__(self, inputs: Tensor, image_sizes: Sequence[tuple[int, int]]) -> Tensor:
        """Return the teacher's batch ``(B, C, H, W)``, which is the same tensor where the two normalisations agree."""
        if self.identity:
            return inputs
        view = inputs.clone() if self._convert.identity else self._convert(inputs)
        for image, (height, width) in zip(view, image_sizes, strict=True):
            image[:, height:] = self.pad_value
            image[:, :, width:] = self.pad_value
        return view


def channels_of(preprocessor: nn.Module) -> int:
    """Return the number of channels of a model's images."""
    return len(_normalisation(preprocessor).mean)


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


def _normalisation(preprocessor: Any) -> Normalisation:
    """Return the normalisation of a ``data_preprocessor``, whose raw images are BGR, as the hosts load them."""
    if isinstance(preprocessor, Normalisation):
        return preprocessor
    swap = bool(getattr(preprocessor, "_channel_conversion", getattr(preprocessor, "channel_conversion", False)))
    order: Order = "rgb" if swap else "bgr"
    if not getattr(preprocessor, "_enable_normalize", hasattr(preprocessor, "mean")):
        return Normalisation((0.0,) * 3, (1.0,) * 3, order)
    mean, std = (tuple(values.detach().flatten().tolist()) for values in (preprocessor.mean, preprocessor.std))
    return Normalisation(mean, std, order)
