"""Plans in plain PyTorch for the tests: small tasks that die where the environment says so, and what became of them."""

from __future__ import annotations

from pathlib import Path

import torch

from kdgraft.plans import carry_out, read_plan

TASKS = """
import os
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from kdgraft.plain import Task

X = torch.sin(torch.arange(64 * 4.0)).reshape(64, 4)
Y = (X.sum(1) > 0).long() + 2 * (X[:, 0] > 0).long()
STEPS = Path(__file__).with_name("steps")


def loss(output, targets):
    done = len(STEPS.read_text()) if STEPS.exists() else 0
    STEPS.write_text("." * (done + 1))
    if done + 1 == int(os.environ.get("DIE_AT", "0")):
        os._exit(9)
    return F.cross_entropy(output, targets)


def task(width):
    model = nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Dropout(0.1), nn.Linear(width, 4))
    return Task(
        model,
        DataLoader(TensorDataset(X, Y), 16, shuffle=True),
        loss,
        epochs=3,
        evaluate=lambda model: {"accuracy": (model(X).argmax(1) == Y).float().mean()},
    )


def large():
    return task(32)


def middle():
    return task(16)


def small(width=4):
    return task(width)


def nothing():
    return None
"""


def plan(folder: Path, text: str, name: str = "plan", out: str = "out") -> Path:
    path = folder / f"{name}.toml"
    path.write_text(f'out = "{folder / out}"\n{text}')
    return path


def said(path: Path, **settings) -> tuple[list[str], dict]:
    lines: list[str] = []
    found = carry_out(read_plan(path), tell=lines.append, **settings)
    return lines, found


def weights(model) -> dict[str, torch.Tensor]:
    return torch.load(model.weights, weights_only=True)
