"""Small classifiers of settable width: multilayer perceptrons and convolutional nets."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

CLASSES = 10
STAGES = ("stage1", "stage2", "stage3")
"""The taps of a convolutional net, each after the ReLU of its last layer."""


def mlp(width: int, *, pixels: int = 256, dropout: float = 0.0) -> nn.Sequential:
    """Return a perceptron of two hidden layers of ``width`` units, as in Hinton et al. (2015), section 3.

    Args:
        width: the units of each hidden layer.
        pixels: the numbers of a picture.
        dropout: the probability that a hidden unit is left out; that of a pixel is four tenths of it.
    """

    def dropped(probability: float) -> list[nn.Module]:
        return [nn.Dropout(probability)] if probability else []

    return nn.Sequential(
        nn.Flatten(),
        *dropped(0.4 * dropout),
        nn.Linear(pixels, width),
        nn.ReLU(),
        *dropped(dropout),
        nn.Linear(width, width),
        nn.ReLU(),
        *dropped(dropout),
        nn.Linear(width, CLASSES),
    )


def conv(width: int, *, depth: int = 1, channels: int = 1, stem: bool = False) -> nn.Sequential:
    """Return a convolutional net of three stages of ``width``, 2 × and 4 × ``width`` channels, each of which halves the resolution.

    Args:
        width: the channels of the first stage.
        depth: the 3×3 convolutions of a stage.
        channels: the channels of a picture.
        stem: begin with a layer of half the width that halves the resolution, for pictures of twice the usual one.
    """
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    inputs = channels
    if stem:
        layers["stem"] = _layer(inputs, max(width // 2, 1), 2)
        inputs = max(width // 2, 1)
    for place, name in enumerate(STAGES):
        outputs, stage = width * 2**place, list[nn.Module]()
        for turn in range(depth):
            stage.append(_layer(inputs, outputs, 1 if turn else 2))
            inputs = outputs
        layers[name] = nn.Sequential(*stage)
    layers |= {"pool": nn.AdaptiveAvgPool2d(1), "flat": nn.Flatten(), "classes": nn.Linear(inputs, CLASSES)}
    return nn.Sequential(layers)


def _layer(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU())
