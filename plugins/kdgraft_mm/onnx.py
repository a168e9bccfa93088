"""Export of a detector's or segmentor's tensor part to ONNX."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from mmengine.model import revert_sync_batchnorm
from torch import Tensor, nn

from kdgraft.errors import DistillError
from kdgraft.onnx import Exported, Freedom, export_onnx

from .checkpoints import student_in
from .configs import model_of, scope_of
from .evaluation import built_model

STRIDE = 32
"""The number of pixels by which the checked sizes differ, of which most models need a multiple."""
LEFT_OUT = {
    "mmdet": "resizing, normalisation and padding of images (see the properties); decoding of boxes, NMS",
    "mmseg": "resizing, normalisation and padding of images (see the properties); resizing of the scores to the image, argmax",
}


class TensorPart(nn.Module):
    """A model's forward of tensors: backbone, neck and head, without preprocessing and postprocessing.

    Args:
        model: a detector or segmentor.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Any:
        """Return the outputs of the head for preprocessed images ``(B, 3, H, W)``."""
        return self.model(images, mode="tensor")


def export_student_onnx(
    checkpoint: str | Path,
    out: str | Path,
    *,
    size: Sequence[int] | None = None,
    peer: str | None = None,
    trusted: bool = False,
    force: bool = False,
) -> Exported:
    """Write the tensor part of the plain student, or of a peer, as ONNX: ``kdgraft export --onnx``.

    Args:
        checkpoint, peer, trusted, force: see :func:`~kdgraft_mm.checkpoints.export_student`.
        out: the file, such as ``student.onnx``.
        size: (height, width) of the images, after padding; others work too where the model allows it.

    Raises:
        DistillError: as there; or ``size`` is missing, or the model has no forward of tensors alone, as those with proposals or with
            queries of a transformer.
    """
    if size is None:
        raise DistillError("give --size HEIGHT WIDTH: the size of the images after padding")
    config, weights, meta = student_in(checkpoint, peer=peer, trusted=trusted)
    settings = model_of(config)
    scope = scope_of(config)
    model = built_model(config, weights, str(checkpoint), str(checkpoint))
    part = TensorPart(revert_sync_batchnorm(model)).eval()
    images = _images(2, *size)
    name = str(settings["type"])
    try:
        with torch.no_grad():
            part(images)
    except Exception as error:  # whatever a model raises that needs more than images
        raise DistillError(
            f"{name} has no forward of images alone ({type(error).__name__}: {' '.join(str(error).split())[:120]}); export it "
            "with the host's own tools"
        ) from error
    height, width = size
    other = _images(3, height + STRIDE, width + 2 * STRIDE)
    return export_onnx(
        part,
        {"images": images},
        out,
        freedoms=[
            Freedom("batch, height and width", {"images": (0, 2, 3)}, [{"images": other}]),
            Freedom("batch", {"images": (0,)}, [{"images": _images(3, height, width)}]),
        ],
        name_of=lambda where: ".".join(["scores" if scope == "mmseg" else "head", *map(str, where)]),
        about=_about(settings, meta, name),
        left_out=LEFT_OUT[scope],
        force=force,
    )


def _images(*shape: int) -> Tensor:
    """Return images ``(B, 3, H, W)`` with normal values, which are the same each time."""
    batch, height, width = shape
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(0))


def _about(settings: Mapping[str, Any], meta: Mapping[str, Any], name: str) -> dict[str, str]:
    """Return properties for the users of the file: how images are prepared, and the classes."""
    told = dict(settings.get("data_preprocessor") or {})
    known = {key: told[key] for key in ("mean", "std", "bgr_to_rgb", "pad_size_divisor") if told.get(key) is not None}
    data = meta.get("dataset_meta") or {}
    classes = data.get("classes") or data.get("CLASSES") if isinstance(data, Mapping) else None
    return {
        "model": name,
        "preprocessing": json.dumps(known),
        **({"classes": json.dumps(list(classes))} if classes else {}),
    }
