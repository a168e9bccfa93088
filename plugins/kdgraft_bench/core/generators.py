"""Generators that take a digit out of its clutter, as a task of a plan: ``generators.py:task`` with options."""

from __future__ import annotations

from collections import OrderedDict

import torch.nn.functional as F
from torch import Tensor, nn

from kdgraft.errors import DistillError
from kdgraft.plain import Task
from kdgraft_bench.core.batches import Batches
from kdgraft_bench.core.data import pictures_of
from kdgraft_bench.core.reading import Legibility, clean
from kdgraft_bench.core.training import BATCH, parts_of, training

RATE = 5e-3
BLOCKS = ("block1", "block2", "block3")
"""The taps of a generator."""


def task(net: str, width: int, *, steps: int, split: str = "test", data: str = "") -> Task:
    """Return the training of one generator on the L1 distance to the clean digits; its accuracy is that of a net which reads them.

    Args:
        net: ``"generator"``.
        width: its channels.
        steps: the number of batches; a multiple of :data:`~kdgraft_bench.core.training.PARTS`, or less.
        split: the split of the metric ``accuracy``, ``"test"`` or ``"val"``; the metric ``val`` is always of the latter.
        data: must be empty, as only the embedded set has clean digits.
    """
    if data or net != "generator":
        raise DistillError(f"the generators' task has net = 'generator' and no real set, got {net!r} and {data!r}")
    train = pictures_of("train")
    batches = Batches(train.small, clean(train), BATCH, parts_of(steps)[1])
    judge = Legibility({"val": pictures_of("val"), "accuracy": pictures_of(split)})
    return training(generator(width), batches, F.l1_loss, steps, RATE, judge)


def generator(width: int) -> nn.Sequential:
    """Return a generator of pictures from pictures, ``(N, 1, S, S)``: a stem, three residual blocks and a last convolution."""
    blocks = [(name, Block(width)) for name in BLOCKS]
    first, last = nn.Conv2d(1, width, 3, 1, 1), nn.Conv2d(width, 1, 3, 1, 1)
    return nn.Sequential(OrderedDict([("first", first), *blocks, ("last", last)]))


class Block(nn.Module):
    """A residual block of two 3×3 convolutions, the first with steps of two pixels between its weights."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(width, width, 3, 1, 2, dilation=2, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, 1, 1, bias=False),
            nn.BatchNorm2d(width),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return the sum of the input and what the layers make of it."""
        return F.relu(x + self.layers(x))
