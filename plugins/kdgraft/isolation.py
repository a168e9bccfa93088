"""Isolation of the host from distillation: contexts that restore random states and train/eval modes."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


@contextmanager
def isolated_rng() -> Iterator[None]:
    """Run the body on a copy of the random state of torch (CPU and every initialised GPU), numpy and ``random``.

    Numbers drawn in the body depend on the seed as usual; numbers drawn after it are as if it had never run.
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
def own_random_stream(*turn: int) -> Iterator[None]:
    """Run the body on a random stream of its own, whose seed is derived from the surrounding random state.

    Numbers drawn after the body do not change, and the body does not draw the numbers that the surrounding code will draw. The
    same surrounding state gives the same numbers, so that a resumed run repeats them.

    Args:
        turn: numbers that tell this body from others on the same surrounding state, such as the iteration where nothing else draws.
    """
    gpus = torch.cuda.default_generators if torch.cuda.is_initialized() else ()
    with isolated_rng():
        drawn = int(torch.randint(2**31, (), device="cpu"))
        # A host that draws on GPUs only changes nothing but their offsets from one step to the next.
        seed = (drawn + sum(generator.get_offset() for generator in gpus)) % 2**31
        for number in turn:
            seed = (seed * 1_000_003 + number) % 2**31
        random.seed(seed)
        np.random.seed(seed)
        # torch.manual_seed would also seed GPUs that are initialised later, after this body has ended.
        for generator in (torch.default_generator, *gpus):
            generator.manual_seed(seed)
        yield


class Turns:
    """Counts the calls within each iteration, such as the parts of an accumulated batch; a resumed run counts alike.

    Example:
        >>> from kdgraft.isolation import Turns
        >>> turns = Turns()
        >>> [turns.next(iteration) for iteration in (7, 7, 8)]
        [(7, 0), (7, 1), (8, 0)]
    """

    def __init__(self) -> None:
        self._last = (-1, 0)

    def next(self, iteration: int) -> tuple[int, int]:
        """Return the iteration and the number of calls in it before."""
        before, count = self._last
        self._last = (iteration, count + 1 if iteration == before else 0)
        return self._last


@contextmanager
def loss_mode(module: nn.Module) -> Iterator[None]:
    """Put a frozen model for the body in the mode in which its heads return what its loss reads, without noise or new statistics.

    Modules of torch (dropout, normalisation) and modules without children run in eval mode, all others in training mode; the mode
    of each is restored afterwards.
    """
    flags = [(child, child.training) for child in module.modules()]
    for child, _ in flags:
        child.training = any(True for _ in child.children()) and not type(child).__module__.startswith("torch.")
    try:
        yield
    finally:
        for child, training in flags:
            child.training = training


@contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Put every submodule in eval mode for the body, and restore the mode of each afterwards."""
    flags = [(child, child.training) for child in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for child, training in flags:
            child.training = training
