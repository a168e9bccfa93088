"""Timing and memory tools."""

from __future__ import annotations

import time

import pytest
import torch

from kdgraft_bench.timing import interleave, median_interval, peak_memory, ratio_interval


def test_interleaving_runs_every_step_once_a_round_and_turns_the_order():
    order: list[str] = []
    steps = {name: (lambda name=name: order.append(name)) for name in "abc"}
    seconds = interleave(steps, 3, warm_up=1)
    assert order[:3] == ["c", "a", "b"]  # the warm-up round, turn -1
    assert order[3:] == ["a", "b", "c", "b", "c", "a", "c", "a", "b"]
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3, "c": 3}


def test_interleaving_times_the_step_itself():
    seconds = interleave({"short": lambda: None, "long": lambda: time.sleep(0.02)}, 3, warm_up=0)
    assert min(seconds["long"]) >= 0.02
    assert max(seconds["short"]) < 0.02


def test_median_interval_brackets_the_median_and_shrinks_to_it():
    spread = median_interval([1.0, 2.0, 3.0, 4.0, 100.0])
    assert spread.median == 3.0
    assert 1.0 <= spread.low < 3.0 < spread.high <= 100.0
    assert median_interval([2.0] * 30) == (2.0, 2.0, 2.0)


def test_ratio_is_taken_within_each_round():
    # A machine that slows down fourfold half-way changes no ratio.
    below = [1.0, 1.1, 4.0, 4.4]
    assert ratio_interval([1.5 * value for value in below], below).median == pytest.approx(1.5)


def test_peak_memory_counts_what_lives_at_once():
    one_mib = 2**18  # float32

    def step() -> None:
        first = torch.empty(one_mib)
        del first
        second, third = torch.empty(one_mib), torch.empty(2 * one_mib)
        del second, third

    assert peak_memory(step) == 3 * 2**20
