"""Measurement of costs: the times of interleaved steps in one process, and the peak memory of a step."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch

from kdgraft.errors import DistillError


class Interval(NamedTuple):
    """A median and its 95 % interval."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.3f} ({self.low:.3f}–{self.high:.3f})"


def check_device(device: str) -> None:
    """Raise a :class:`DistillError` unless this machine has the device, ``"cpu"`` or ``"cuda"``."""
    if device not in ("cpu", "cuda"):
        raise DistillError(f"device must be 'cpu' or 'cuda', got {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise DistillError("no CUDA device here; use --device cpu")


def interleave(
    steps: Mapping[str, Callable[[], object]], rounds: int, *, warm_up: int = 3, device: str = "cpu"
) -> dict[str, list[float]]:
    """Time every step once a round, in an order that is rotated by one each round.

    Changes of the machine over time (its clock, other programs) then affect all steps alike.

    Args:
        steps: name -> a step.
        rounds: the number of timed rounds.
        warm_up: the number of rounds before these.
        device: with ``"cuda"`` each step is timed until the device has finished.

    Returns:
        Name -> seconds of each round.
    """
    names = list(steps)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(-warm_up, rounds):
        for place in range(len(names)):
            name = names[(place + turn) % len(names)]
            _wait(device)
            start = time.perf_counter()
            steps[name]()
            _wait(device)
            if turn >= 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def median_interval(values: Sequence[float], *, draws: int = 10_000) -> Interval:
    """Return the median and its 95 % interval by the bootstrap (percentiles of medians of resamples; fixed seed)."""
    data = np.asarray(values, dtype=float)
    resampled = np.random.default_rng(0).choice(data, size=(draws, len(data)))
    low, high = np.percentile(np.median(resampled, axis=1), [2.5, 97.5])
    return Interval(float(np.median(data)), float(low), float(high))


def ratio_interval(above: Sequence[float], below: Sequence[float]) -> Interval:
    """Return the median over rounds of the ratio of two steps of the same round, with its 95 % interval."""
    return median_interval([a / b for a, b in zip(above, below, strict=True)])


def peak_memory(step: Callable[[], object], device: str = "cpu") -> int:
    """Return the peak bytes of a step beyond those held before it, by torch's allocator on CUDA and its profiler on a CPU."""
    if device != "cpu":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "5")
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        step()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]  # type: ignore[union-attr]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return int(max(np.cumsum(sizes, dtype=np.int64), default=0))


def _wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()
