"""Logit standardization."""

from __future__ import annotations

import pytest
import torch

import golden
from kdgraft import DistillError
from kdgraft.losses import decoupled, soft_targets, standardized
from support.tensors import gradient

# sunshangquan/logit-standardization-KD@f6e5aa5172bad618e801163c3385322eea673754: mdistiller/distillers/KD.py, kd_loss with
# temperature 2, and DKD.py, dkd_loss with 1, 8 and 2 and the labels 0, 2, 4, 6, 8, both with logit_stand, on golden.logits():
# value, gradient at student[0, 0], sum of the squared gradients.
KD = (1.009279313061279, -0.010212124753267122, 0.0023650925736291286)
DKD = (8.74360506252811, -0.0379330019947185, 0.18752270731003007)


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (lambda s, t: soft_targets(s, t, 2.0), KD),
        (lambda s, t: decoupled(s, t, torch.tensor([0, 2, 4, 6, 8]), 2.0), DKD),
    ],
)
def test_authors_figures(loss, expected):
    student, teacher = golden.logits()
    student.requires_grad_()
    value = loss(standardized(student, variant="code"), standardized(teacher, variant="code"))
    slope = gradient(value, student)
    assert [value.item(), slope[0, 0].item(), slope.square().sum().item()] == pytest.approx(expected, rel=1e-9)


def test_three_logits_by_hand():
    # Mean 2, squares 4, 0 and 4: the root of 8/3 by the paper, that of 8/2 in the code.
    logits = torch.tensor([[0.0, 2.0, 4.0]], dtype=torch.float64)
    root = (8 / 3) ** 0.5
    assert standardized(logits)[0].tolist() == pytest.approx([-2 / root, 0, 2 / root], abs=1e-6)
    assert standardized(logits, variant="code")[0].tolist() == pytest.approx([-1, 0, 1], abs=1e-6)


@pytest.mark.parametrize("variant", ["paper", "code"])
@pytest.mark.parametrize("size", [1e-3, 1e3, 1e25])
def test_neither_mean_nor_range_matters(variant, size: float):
    logits = golden.logits()[0]
    expected = standardized(logits, variant=variant)
    found = standardized((size * (logits + 1)).float(), variant=variant)
    torch.testing.assert_close(found.double(), expected, rtol=2e-3, atol=1e-4)


def test_maps_and_absent_classes():
    maps = golden.wave((2, 5, 3, 4), 0.7, 0.1, 3.0)
    rows = standardized(maps.movedim(1, -1))
    torch.testing.assert_close(standardized(maps, dim=1), rows.movedim(-1, 1))
    present = torch.ones_like(maps, dtype=torch.bool)
    present[:, 4] = False
    filled = maps.masked_fill(~present, -65504.0)
    found = standardized(filled, dim=1, present=present)
    torch.testing.assert_close(found[:, :4], standardized(maps[:, :4], dim=1))
    assert (found[:, 4] == -65504).all()


@pytest.mark.parametrize("variant", ["paper", "code"])
@pytest.mark.parametrize("classes", [1, 4])
def test_equal_logits_have_a_score_of_0_and_a_finite_gradient(variant, classes: int):
    logits = torch.full((2, classes), 3.0).requires_grad_()
    found = standardized(logits, variant=variant)
    assert not found.any()
    slope = gradient(found[:, 0].sum(), logits)
    assert slope.isfinite().all() and slope.abs().max() <= 1


def test_half_precision_computes_in_float32():
    logits = (golden.logits()[0] * 100).half()
    found = standardized(logits)
    assert found.dtype is torch.float32
    torch.testing.assert_close(found.double(), standardized(logits.double()), rtol=1e-5, atol=1e-6)


def test_gradient():
    logits = golden.logits()[0].requires_grad_()
    present = torch.arange(10).expand(5, 10) < torch.tensor([[10], [2], [3], [7], [1]])
    for settings in ({}, dict(variant="code"), dict(present=present)):
        assert torch.autograd.gradcheck(lambda x, k=settings: standardized(x, **k), logits)


def test_an_unknown_variant():
    with pytest.raises(DistillError, match="variant must be 'paper' or 'code', got 'fast'"):
        standardized(torch.zeros(1, 2), variant="fast")
