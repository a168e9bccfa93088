"""Small models of MMPretrain, for tests that run where it can be imported."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from kdgraft import DistillError
from kdgraft.sources import library_teacher
from kdgraft.sources.mmpretrain import import_mmpretrain

VIT: dict[str, Any] = dict(
    type="VisionTransformer",
    arch=dict(embed_dims=16, num_layers=2, num_heads=2, feedforward_channels=32),
    img_size=32,
    patch_size=8,
)
PIXELS: dict[str, Any] = dict(mean=[100.0, 110.0, 120.0], std=[50.0, 60.0, 70.0], to_rgb=True)
CLASSIFIER: dict[str, Any] = dict(
    type="ImageClassifier",
    backbone=VIT,
    head=dict(type="LinearClsHead", num_classes=3, in_channels=16),
    data_preprocessor=PIXELS,
)
RESNET: dict[str, Any] = dict(type="mmpretrain.ResNet", depth=18, out_indices=(0, 1, 2, 3))


def require() -> None:
    """Skips a test, with the reason, where MMPretrain cannot be imported."""
    try:
        import_mmpretrain("tests")
    except DistillError as error:
        pytest.skip(str(error))


def by_file(path: Path, model: dict[str, Any] = CLASSIFIER) -> tuple[dict[str, Any], Any]:
    """A teacher's dict, whose weights are drawn and written; and the network with these weights."""
    torch.manual_seed(3)
    network = library_teacher(dict(type="mmpretrain", model=model, checkpoint=str(path)), images=None).model.network
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    torch.save({"state_dict": network.state_dict()}, path)
    return dict(type="mmpretrain", model=copy.deepcopy(model), checkpoint=str(path)), network
