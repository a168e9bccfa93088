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
def own_random_stream() -> Iterator[None]:
    """Runs its body on random numbers of its own, drawn from a seed that follows from the surrounding random state.

    Nothing that is drawn after it changes, and it draws none of what its surroundings are about to draw. The same surrounding
    state gives the same numbers, so that a resumed run repeats them.
    """
    gpus = torch.cuda.default_generators if torch.cuda.is_initialized() else ()
    with isolated_rng():
        drawn = int(torch.randint(2**31, (), device="cpu"))
        # Where all that is drawn is drawn on GPUs, only their offsets tell one step from the next.
        seed = (drawn + sum(generator.get_offset() for generator in gpus)) % 2**31
        random.seed(seed)
        np.random.seed(seed)
        # Not torch.manual_seed: it would also seed GPUs that are set up later, when this body is long over.
        for generator in (torch.default_generator, *gpus):
            generator.manual_seed(seed)
        yield


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
