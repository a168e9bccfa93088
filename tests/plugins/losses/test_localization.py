"""Localization distillation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import golden
from kdgraft import DistillError
from kdgraft.losses import localization


def test_authors_figures():
    student, teacher, _ = golden.edges()
    np.testing.assert_allclose(localization(student, teacher, reduction="none"), golden.LD_NONE, rtol=1e-10)
    assert localization(student, teacher).item() == pytest.approx(golden.LD_MEAN, rel=1e-10)
    assert localization(student, teacher, reduction="sum").item() == pytest.approx(golden.LD_SUM, rel=1e-10)
    assert 0.25 * localization(student, teacher).item() == pytest.approx(golden.LD_MEAN_025, rel=1e-10)


@pytest.mark.parametrize(
    ("divisor", "expected"),
    [(6, golden.LD_WEIGHTED_MEAN_025), (4, golden.LD_WEIGHTED_AVG4_025), (16, golden.LD_WEIGHTED_AVG16_025)],
)
def test_authors_figures_with_edge_weights(divisor: int, expected: float):
    student, teacher, weight = golden.edges()
    total = localization(student, teacher, weight=weight, reduction="sum")
    assert 0.25 * total.item() / divisor == pytest.approx(expected, rel=1e-10)


def test_authors_gradient():
    student, teacher, weight = golden.edges()
    student.requires_grad_()
    loss = 0.25 * localization(student, teacher, weight=weight, reduction="sum") / 4
    (slope,) = torch.autograd.grad(loss, student)
    assert slope[0, 0].item() == pytest.approx(golden.LD_WEIGHTED_AVG4_025_GRAD_00, rel=1e-10)
    assert slope.square().sum().item() == pytest.approx(golden.LD_WEIGHTED_AVG4_025_GRAD_SQ, rel=1e-10)


def test_authors_figure_on_classes():
    student, teacher = golden.logits()
    loss = 10 * localization(student, teacher, temperature=2, reduction="sum") / 5
    assert loss.item() == pytest.approx(golden.CLASS_KD_T2_W10, rel=1e-10)


def test_by_hand():
    # Teacher ¾, student ½ over two bins at T = 10 (logits 10 ln 3 and 0): KL = 0.130812, T² = 100.
    student, teacher = torch.zeros(1, 4, 2), torch.tensor([10 * math.log(3), 0.0]).expand(1, 4, 2)
    assert localization(student, teacher, variant="paper").item() == pytest.approx(13.0812, abs=1e-4)
    assert localization(student, teacher, variant="code").item() == pytest.approx(6.5406, abs=1e-4)


def test_the_paper_sums_over_the_17_bins():
    student, teacher, _ = golden.edges()
    assert localization(student, teacher, variant="paper").item() == pytest.approx(17 * golden.LD_MEAN, rel=1e-10)


def test_an_edge_may_shift_its_logits():
    student, teacher, _ = golden.edges()
    torch.testing.assert_close(localization(student + 7, teacher - 3), localization(student, teacher))


def test_unknown_variant():
    student, teacher, _ = golden.edges()
    with pytest.raises(DistillError, match="variant must be 'code' or 'paper', got 'authors'"):
        localization(student, teacher, variant="authors")
