"""Tensors by name, gradients and random states: what tests of every host compare."""

from __future__ import annotations

import os
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


def gradient(value: Tensor, tensor: Tensor) -> Tensor:
    """The gradient of a scalar at one tensor."""
    return torch.autograd.grad(value, tensor)[0]


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Gradients by parameter name; parameters without one are left out."""
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def distillation(losses: Mapping[str, Tensor]) -> Tensor:
    """The sum of the distillation losses."""
    return torch.stack([v for k, v in losses.items() if k.startswith("distill.") and k.endswith(".loss")]).sum()


def assert_same(left: Mapping[str, Any], right: Mapping[str, Any]) -> None:
    """The same keys, and each tensor equal bit for bit."""
    assert list(left) == list(right)
    different = [key for key in left if not torch.equal(torch.as_tensor(left[key]), torch.as_tensor(right[key]))]
    assert not different


def draw() -> list[float]:
    """The next number of each random generator that training uses."""
    return [torch.rand(()).item(), float(np.random.rand()), random.random()]


def random_states() -> list[Any]:
    """The states of the same generators."""
    name, keys, place, *_ = np.random.get_state()
    return [torch.random.get_rng_state().tolist(), (name, keys.tolist(), place), random.getstate()]


class Emit(nn.Module):
    """Hands on one parameter, whatever its input."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = nn.Parameter(value)

    def forward(self, x: Tensor) -> Tensor:
        return self.value * 1


class Payload:
    """An object that makes a folder when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.trace),)
