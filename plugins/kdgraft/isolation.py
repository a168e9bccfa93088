"""What distillation does beside the host without leaving a trace: random state, train/eval modes."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn


@contextmanager
def isolated_rng() -> Iterator[None]:
    """Runs its body on a copy of the random state of torch (CPU and every initialised GPU), numpy and ``random``.

    What the body draws depends on the seed as usual; what is drawn after it is as if it had never run.
    """
    python_state, numpy_state = random.getstate(), np.random.get_state()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)


@contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Puts every submodule in eval mode for its body and restores each one's own flag after it."""
    flags = [(child, child.training) for child in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for child, training in flags:
            child.training = training
