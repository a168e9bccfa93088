"""A generalist and its specialists, as a task of a plan: ``specialists.py:task`` with options."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from kdgraft.errors import DistillError
from kdgraft.plain import Task
from kdgraft.sources.teacher import load_strictly, read_checkpoint
from kdgraft.specialists import SpecialistData, combine_specialists, confusable_classes, specialist_of
from kdgraft_bench.core import nets
from kdgraft_bench.core.batches import Accuracies
from kdgraft_bench.core.data import Pictures, pictures_of
from kdgraft_bench.core.training import BATCH, parts_of, training

RATE = 2e-3


def task(
    net: str,
    width: int,
    *,
    steps: int,
    split: str = "test",
    data: str = "",
    count: int = 3,
    size: int = 3,
    start: str | None = None,
) -> Task:
    """Return the training of all specialists of a generalist; what it evaluates is the distribution on which all agree.

    Args:
        net, width: the nets.
        steps: the number of batches of each specialist; a multiple of :data:`~kdgraft_bench.core.training.PARTS`, or less.
        split: the split of the metric ``accuracy``, ``"test"`` or ``"val"``; the metric ``val`` is always of the latter.
        data: the folder of a real set; the embedded one if empty.
        count: the number of specialists.
        size: the classes of each, besides the dustbin.
        start: the generalist's weights; a panel that is not to be trained is built without.
    """
    if net != "conv":
        raise DistillError(f"specialists are convolutional nets, net = 'conv', got {net!r}")
    train = pictures_of("train", data)
    panel = Panel(nets.conv(width, channels=train.large.shape[1]), count, size)
    if start is not None:
        load_strictly(panel.generalist, read_checkpoint(start), start, "generalist")
        panel.begin(train)
    tested = Accuracies({"val": pictures_of("val", data), "accuracy": pictures_of(split, data)}, large=False)
    return training(panel, PanelBatches(panel, train, parts_of(steps)[1]), panel_loss, steps, RATE, tested)


class Panel(nn.Module):
    """A frozen generalist and its specialists, in training each on its own pictures, in evaluation together (Hinton et al. 2015).

    Args:
        generalist: a classifier.
        count: the number of specialists.
        size: the classes of each, besides the dustbin.
    """

    groups: Tensor
    oversampling: Tensor

    def __init__(self, generalist: nn.Module, count: int, size: int) -> None:
        super().__init__()
        self.generalist = generalist.requires_grad_(False)
        self.specialists = nn.ModuleList(specialist_of(generalist, range(size)) for _ in range(count))
        self.register_buffer("groups", torch.arange(size).repeat(count, 1))
        self.register_buffer("oversampling", torch.ones(count))

    def begin(self, pictures: Pictures) -> None:
        """Find the classes that the generalist confuses on these pictures, and start the specialists from it."""
        self.generalist.eval()
        with torch.no_grad():
            said = [self.generalist(part).softmax(1) for part in pictures.small.split(512)]
        groups = confusable_classes(said, *self.groups.shape)
        self.groups.copy_(torch.tensor(groups))
        self.specialists = nn.ModuleList(specialist_of(self.generalist, own) for own in groups)
        self.oversampling.copy_(torch.tensor([each.oversampling for each in self.data(pictures)]))

    def data(self, pictures: Pictures) -> list[SpecialistData]:
        """Return the training set of each specialist."""
        whole = TensorDataset(pictures.small, pictures.labels)
        return [SpecialistData(whole, pictures.labels, own) for own in self.groups.tolist()]

    def train(self, mode: bool = True) -> Panel:
        """Set the mode of the specialists; the generalist stays in evaluation."""
        super().train(mode)
        self.generalist.eval()
        return self

    def forward(self, pictures: Tensor) -> Any:
        """Return each specialist's logits of its own part of the pictures in training, else log-probabilities of all classes."""
        if self.training:
            parts = pictures.tensor_split(len(self.specialists))
            return [net(part) for net, part in zip(self.specialists, parts, strict=True)]
        said = [net(pictures) for net in self.specialists]
        for logits, ratio in zip(said, self.oversampling, strict=True):
            logits[:, -1] += ratio.log()  # as correct_dustbin does it to the bias
        return combine_specialists(self.generalist(pictures), said, self.groups.tolist(), dim=1)


class PanelBatches:
    """Batches in which every specialist has a part of its own.

    Args:
        panel: the specialists.
        pictures: the training set.
        steps: the number of batches.
    """

    def __init__(self, panel: Panel, pictures: Pictures, steps: int) -> None:
        self.sets, self.steps = panel.data(pictures), steps

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        streams = [_endless(each) for each in self.sets]
        for _ in range(self.steps):
            pictures, targets = zip(*(next(stream) for stream in streams), strict=True)
            smallest = min(map(len, targets))  # the parts are equal
            yield torch.cat([p[:smallest] for p in pictures]), torch.cat([t[:smallest] for t in targets])


def _endless(data: SpecialistData) -> Iterator[tuple[Tensor, Tensor]]:
    while True:
        yield from DataLoader(data, min(BATCH, len(data)), shuffle=True, drop_last=True)


def panel_loss(said: list[Tensor], targets: Tensor) -> Tensor:
    """Return the mean cross-entropy of the specialists."""
    parts = targets.tensor_split(len(said))
    return torch.stack([F.cross_entropy(*each) for each in zip(said, parts, strict=True)]).mean()
