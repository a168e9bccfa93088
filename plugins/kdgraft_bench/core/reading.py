"""A net that reads clean digits, to judge pictures by it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdgraft.errors import DistillError
from kdgraft.fit import fit
from kdgraft.isolation import isolated_rng

from . import nets
from .batches import Batches
from .data import Pictures, halved, pictures_of

WIDTH, STEPS, BATCH, RATE = 16, 500, 64, 1e-2


def clean(pictures: Pictures) -> Tensor:
    """Return the digits alone, at the resolution of nets, ``(N, 1, S / 2, S / 2)``."""
    if pictures.clean is None:
        raise DistillError("only the embedded set has clean digits")
    return halved(pictures.clean)


@lru_cache(maxsize=1)
def reader() -> nn.Module:
    """Return a net that reads clean digits, the same at every call."""
    train = pictures_of("train")
    with isolated_rng(), torch.enable_grad():
        torch.manual_seed(0)
        net = nets.conv(WIDTH)
        batches = Batches(clean(train), train.labels, BATCH, STEPS)
        fit(net, batches, F.cross_entropy, epochs=1, lr=RATE, schedule="cosine", warmup=STEPS // 10, progress=False)
    return net.eval()


class Legibility:
    """Computes the share of a generator's digits that the reader reads as what they are.

    Args:
        sets: name of the metric -> the pictures.
    """

    def __init__(self, sets: Mapping[str, Pictures]) -> None:
        self.sets = sets

    def __call__(self, model: nn.Module) -> dict[str, float]:
        net = reader()
        return {name: _read(net, model, each).item() for name, each in self.sets.items()}


def _read(net: nn.Module, model: nn.Module, pictures: Pictures) -> Tensor:
    device = next(model.parameters()).device
    found = [net(model(part.to(device)).cpu()).argmax(1) for part in pictures.small.split(512)]
    return (torch.cat(found) == pictures.labels).float().mean()
