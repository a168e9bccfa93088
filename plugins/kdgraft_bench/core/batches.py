"""Batches of pictures, and accuracies on them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from .data import Pictures


class Batches:
    """A fixed number of batches in a random order, in which every picture comes once before any comes twice.

    Args:
        pictures: the pictures, ``(N, C, H, W)``.
        labels: their classes, ``(N,)``.
        size: the pictures of a batch, at most N.
        steps: the number of batches.
    """

    def __init__(self, pictures: Tensor, labels: Tensor, size: int, steps: int) -> None:
        self.pictures, self.labels, self.size, self.steps = pictures, labels, min(size, len(labels)), steps

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.empty(0, dtype=torch.long)
        for _ in range(self.steps):
            if len(order) < self.size:
                order = torch.randperm(len(self.labels))
            chosen, order = order[: self.size], order[self.size :]
            yield self.pictures[chosen], self.labels[chosen]


class Accuracies:
    """Computes the accuracy of a net on several sets.

    Args:
        sets: name of the metric -> the pictures.
        large: the net sees them at full resolution.
    """

    def __init__(self, sets: Mapping[str, Pictures], large: bool) -> None:
        self.sets = {name: (each.large if large else each.small, each.labels) for name, each in sets.items()}

    def __call__(self, model: nn.Module) -> dict[str, float]:
        found, device = {}, next(model.parameters()).device
        for name, (pictures, labels) in self.sets.items():
            right = [model(part.to(device)).argmax(1).cpu() for part in pictures.split(512)]
            found[name] = (torch.cat(right) == labels).float().mean().item()
        return found
