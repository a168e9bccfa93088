"""A run of ``fit`` on one process, or on two that share its batches."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from kdgraft import Decay, Distiller, Hint, SoftTargets, Views
from kdgraft.fit import fit
from support.processes import WORLD, as_rank

X = torch.sin(torch.arange(40 * 3.0)).reshape(40, 3)
Y = (X.sum(1) > 0).long()
EPOCHS = 3


def net(width: int, seed: int, dropout: float = 0.0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, width), nn.ReLU(), nn.Dropout(dropout), nn.Linear(width, 2))


def accuracy(model: nn.Module) -> dict[str, float]:
    return {"accuracy": (model(X).argmax(1) == Y).float().mean().item()}


def run(batch: int, parts: int, folder: Path | None = None, *, dropout: float = 0.0, **more: Any) -> dict[str, Any]:
    """Trains on batches of a size, so many of which make an update."""
    distiller = Distiller(
        net(4, 0, dropout), net(8, 1), [SoftTargets(2), Hint("0", schedule=Decay(4))], example=Views(X[:1])
    )
    torch.manual_seed(5)
    found = fit(
        distiller,
        DataLoader(TensorDataset(X, Y), batch),
        F.cross_entropy,
        **{"epochs": EPOCHS, **more},
        optimizer=torch.optim.SGD,
        lr=0.2,
        schedule="cosine",
        accumulate=parts,
        clip=0.5,
        evaluate=accuracy,
        best="-loss",
        views=lambda x, y: (Views(x, teacher=x.flip(1)), y),
        folder=folder,
    )
    student: dict[str, Tensor] = {name: value.detach().clone() for name, value in found.model.state_dict().items()}
    return dict(student=student, history=found.history, iterations=distiller.iteration, best=found.best_epoch)


def as_one_of_two(rank: int, folder: str) -> dict[str, Any]:
    """Runs without and with accumulation, and one that stops and goes on, with dropout that differs by process."""
    both, parts = run(10, 1), run(5, 2)
    whole = run(5, 1, dropout=0.3)
    first = run(5, 1, Path(folder), dropout=0.3, stop=1)
    torch.rand(3 + rank)
    return dict(
        both=both, parts=parts, whole=whole, first=first, rest=run(5, 1, Path(folder), dropout=0.3, resume=True)
    )


if __name__ == "__main__":
    assert WORLD == 2 and len(sys.argv) == 4
    as_rank(as_one_of_two)
