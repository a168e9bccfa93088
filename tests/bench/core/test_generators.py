"""Generators that clean a digit: their task, and the net that judges them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kdgraft import Distiller, DistillError
from kdgraft_bench.core.data import pictures_of
from kdgraft_bench.core.experiments.generators import CRITIC
from kdgraft_bench.core.generators import BLOCKS, task
from kdgraft_bench.core.reading import Legibility, clean, reader


class Oracle(nn.Module):
    """Returns the clean pictures of the test set in their order, whatever its input."""

    def __init__(self) -> None:
        super().__init__()
        self.unused, self.place = nn.Parameter(torch.zeros(1)), 0

    def forward(self, pictures):
        found = clean(pictures_of("test"))[self.place : self.place + len(pictures)]
        self.place += len(pictures)
        return found


def test_clean_digits_are_read_and_cluttered_ones_less(monkeypatch):
    test = pictures_of("test")
    assert not clean(test).requires_grad and clean(test).shape == test.small.shape
    judge = Legibility({"accuracy": test})
    with torch.no_grad():
        best, raw = judge(Oracle())["accuracy"], judge(nn.Sequential(nn.Conv2d(1, 1, 1)))["accuracy"]
    assert best > 0.85 > raw + 0.1
    assert reader() is reader()


def test_a_generator_learns_the_clean_digit():
    made = task("generator", 3, steps=4)
    pictures, targets = next(iter(made.loader))
    assert made.model(pictures).shape == targets.shape == pictures.shape
    assert not torch.equal(pictures, targets) and made.loss(targets, targets) == 0


def test_the_published_recipe_fits_it():
    torch.manual_seed(0)
    student, teacher = task("generator", 3, steps=4).model, task("generator", 5, steps=4).model
    recipe = dict(type="gan_compression", tap=list(BLOCKS), **CRITIC)
    pictures, targets = next(iter(task("generator", 3, steps=4).loader))
    out = Distiller(student, teacher, recipe=recipe, example=pictures[:2])(pictures, targets=targets)
    out.loss.backward()
    assert sorted(name.split(".")[1] for name in out.losses if name.endswith("loss")) == [
        "adversarial_images",
        "hint",
        "reconstruction",
    ]
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in student.parameters())


def test_a_real_set_has_no_clean_digits():
    with pytest.raises(DistillError, match="no real set, got 'generator' and 'somewhere'"):
        task("generator", 3, steps=4, data="somewhere")
