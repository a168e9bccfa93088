"""What happens beside the host leaves no trace in its random state and modes."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import nn

from kdgraft.isolation import eval_mode, isolated_rng, own_random_stream
from support.tensors import draw


def seed() -> None:
    torch.manual_seed(5)
    np.random.seed(5)
    random.seed(5)


def test_what_is_drawn_afterwards_is_as_if_nothing_had_been():
    seed()
    expected = draw()
    seed()
    with isolated_rng():
        inside = draw()
        nn.Linear(100, 100)
    assert draw() == expected
    assert inside == expected  # and the body starts from the seed as well


def test_also_after_an_exception():
    seed()
    expected = draw()
    seed()
    with pytest.raises(RuntimeError), isolated_rng():
        nn.Linear(2, 2)(torch.rand(1, 3))
    assert draw() == expected


def test_a_stream_of_its_own_takes_nothing_of_the_surrounding_one():
    seed()
    expected = draw()
    found = []
    for _ in range(2):
        seed()
        with own_random_stream():
            found.append(draw())
        assert draw() == expected
    assert found[0] == found[1]  # the same surroundings, the same numbers
    assert all(own != other for own, other in zip(found[0], expected, strict=True))
    with own_random_stream():
        assert all(own != other for own, other in zip(draw(), found[0], strict=True))  # others later on


def test_a_stream_of_its_own_seeds_no_gpu_that_is_not_in_use(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", asked.append)
    with own_random_stream():
        pass
    assert not asked or torch.cuda.is_initialized()


def test_eval_mode_restores_each_module_s_own_flag():
    module = nn.Sequential(nn.Dropout(), nn.Sequential(nn.BatchNorm1d(2), nn.Dropout()))
    module[1][0].eval()  # a frozen normalisation
    before = [child.training for child in module.modules()]
    assert before == [True, True, True, False, True]
    with eval_mode(module):
        assert not any(child.training for child in module.modules())
    assert [child.training for child in module.modules()] == before
    with pytest.raises(KeyError), eval_mode(module):
        raise KeyError
    assert [child.training for child in module.modules()] == before
