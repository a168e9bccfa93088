"""Ground truth at the student's resolution, made from samples at the teacher's."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from mmdet.structures import DetDataSample
from mmdet.structures.bbox import BaseBoxes
from mmdet.structures.mask import BitmapMasks, PolygonMasks
from mmengine.structures import InstanceData, PixelData
from torch import Tensor

from kdgraft.errors import WiringError
from kdgraft.wiring import Wiring
from kdgraft_mm.resolution import Resolution, Size, nearest_positions


def same_resolution(wiring: Wiring, term: str) -> None:
    """Raise a :class:`WiringError` if student and teacher see images of different sizes."""
    scale = wiring.teacher_recording.scale
    if scale != 1:
        raise WiringError(
            f"{term}: compares predictions position by position, and with the teacher's scale={scale:g} the two grids "
            "differ; leave scale out, or distil features (FeatureImitation)"
        )


def reduced_sample(sample: DetDataSample, resolution: Resolution, padded: Size, preprocessor: Any) -> DetDataSample:
    """Return a new sample with boxes, masks and sizes divided by the scale; the given sample stays unchanged.

    Args:
        sample: a sample after the host's ``data_preprocessor``, at the teacher's resolution.
        resolution: the relation between the two resolutions.
        padded: (height, width) of the student's padded batch.
        preprocessor: the student's ``data_preprocessor``, which defines the padding of masks.
    """
    scale = float(resolution.scale)
    image = sample.metainfo["img_shape"][:2]
    size = resolution.reduced(image)
    small = sample.new()
    meta: dict[str, Any] = dict(img_shape=size, pad_shape=resolution.pad_shape(size), batch_input_shape=padded)
    if "scale_factor" in sample.metainfo:
        meta["scale_factor"] = tuple(float(factor) / scale for factor in sample.metainfo["scale_factor"])
    small.set_metainfo(meta)
    for key, value in sample.items():
        if isinstance(value, InstanceData):
            setattr(small, key, _instances(value, resolution, image, _padding(preprocessor, "mask", 0, padded)))
        elif isinstance(value, PixelData):
            setattr(small, key, _pixels(value, resolution, image, _padding(preprocessor, "seg", 255, padded)))
    return small


class _Padding(NamedTuple):
    """The padded size of masks or labels, ``None`` if they are not padded, and the value of the padding."""

    size: Size | None
    value: int


def _padding(preprocessor: Any, kind: str, value: int, padded: Size) -> _Padding:
    size = padded if getattr(preprocessor, f"pad_{kind}", False) else None
    return _Padding(size, int(getattr(preprocessor, f"{kind}_pad_value", value)))


def _instances(found: InstanceData, resolution: Resolution, image: Size, padding: _Padding) -> InstanceData:
    small = found.new()
    scale = float(resolution.scale)
    if "bboxes" in found:
        boxes = found.bboxes
        if isinstance(boxes, BaseBoxes):
            small.bboxes = boxes.clone()
            small.bboxes.rescale_((1 / scale, 1 / scale))
        else:
            angle = 4 if boxes.shape[-1] == 5 else boxes.shape[-1]  # the angle of a rotated box does not change
            small.bboxes = torch.cat([boxes[:, :angle] / scale, boxes[:, angle:]], 1)
    if "masks" in found:
        small.masks = reduced_masks(found.masks, resolution, image, padding)
    return small


def reduced_masks(
    masks: BitmapMasks | PolygonMasks, resolution: Resolution, image: Size, padding: _Padding
) -> BitmapMasks | PolygonMasks:
    """Reduce the masks of an image of (height, width) ``image``: bitmaps by their nearest pixels, polygons by division."""
    size = resolution.reduced(image)
    if isinstance(masks, PolygonMasks):
        scale = float(resolution.scale)
        polygons = [[polygon / scale for polygon in polygons] for polygons in masks.masks]
        return PolygonMasks(polygons, *(padding.size or size))
    rows, columns = (nearest_positions(side, resolution.scale).numpy() for side in image)
    small = BitmapMasks(masks.masks[:, rows[:, None], columns[None, :]], *size)
    return small if padding.size is None else small.pad(padding.size, padding.value)


def _pixels(found: PixelData, resolution: Resolution, image: Size, padding: _Padding) -> PixelData:
    rows, columns = (nearest_positions(side, resolution.scale) for side in image)
    height, width = padding.size or resolution.reduced(image)
    fill = (0, width - len(columns), 0, height - len(rows))

    def reduced(labels: Tensor) -> Tensor:
        return F.pad(labels[..., rows[:, None], columns[None, :]], fill, value=padding.value)

    return PixelData(metainfo=found.metainfo, **{key: reduced(value) for key, value in found.items()})
