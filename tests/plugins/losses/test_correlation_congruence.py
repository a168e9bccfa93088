"""CC: a Gaussian kernel between samples."""

from __future__ import annotations

import math

import pytest
import torch

import golden.dense
from kdgraft import CorrelationCongruence, Distiller, DistillError
from kdgraft.losses import correlation_congruence
from support.samples import IMAGES, Pointwise
from support.tensors import gradient

# AberHu/Knowledge-Distillation-Zoo@65470c846c1300d555815da26999cbe2b51fc815: kd_losses/cc.py, CC(0.4, 2), a re-implementation, as
# the authors published no code; in float64 on golden.dense.embeddings(): value, gradient at the student's first number, sum of the
# squared gradients.
FIGURES = (0.061753783979329346, -0.0017118803798613722, 0.00022962412727253046)


def test_figures():
    student, teacher, _ = golden.dense.embeddings()
    value = correlation_congruence(student.requires_grad_(), teacher)
    slope = gradient(value, student)
    assert [value.item(), slope[0, 0].item(), slope.square().sum().item()] == pytest.approx(FIGURES, rel=1e-9)


def test_two_samples_by_hand():
    # Cosines 0 and 1 of the two samples: kernels e^-0.8 · 1 and e^-0.8 · (1 + 0.8 + 0.32), in two of four pairs.
    student, teacher = torch.tensor([[3.0, 0.0], [0.0, 2.0]]), torch.ones(2, 5)
    expected = 2 * (math.exp(-0.8) * 1.12) ** 2 / 4
    assert correlation_congruence(student, teacher).item() == pytest.approx(expected)


def test_lengths_and_rotations_change_nothing():
    student, teacher, _ = golden.dense.embeddings()
    turn = torch.linalg.qr(golden.dense.chirp((6, 6), 0.3, 0.2, 1.0))[0]
    lengths = torch.arange(1.0, 8.0)[:, None]
    found = correlation_congruence(student @ turn * lengths, teacher / lengths)
    torch.testing.assert_close(found, correlation_congruence(student, teacher))


def test_the_term_and_its_settings():
    torch.manual_seed(0)
    student, teacher = Pointwise(4), Pointwise(6)
    both = [net(IMAGES[0]).mean((2, 3)) for net in (student, teacher)]
    for settings in ({}, dict(gamma=1.5, order=4)):
        model = Distiller(student, teacher, recipe=dict(type="cc", tap="mix", **settings), example=IMAGES[0])
        torch.testing.assert_close(model(IMAGES[0]).loss, 100 * correlation_congruence(*both, **settings))


@pytest.mark.parametrize("settings", [dict(gamma=0), dict(order=0), dict(order=1.5), dict(gamma=math.inf)], ids=str)
def test_mistakes(settings):
    for refuses in (
        lambda: CorrelationCongruence("mix", **settings),
        lambda: correlation_congruence(torch.ones(2, 1), torch.ones(2, 1), **settings),
    ):
        with pytest.raises(DistillError, match=f"correlation_congruence: {next(iter(settings))} must be a"):
            refuses()
