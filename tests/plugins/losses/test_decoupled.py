"""Decoupled distillation (DKD)."""

from __future__ import annotations

import math

import pytest
import torch

import golden
from kdgraft import DistillError
from kdgraft.losses import decoupled, soft_targets
from support.tensors import gradient

LABELS = torch.tensor([0, 2, 4, 6, 8])

# megvii-research/mdistiller@a08d46f10d6102bd6e3f258ca5ac880b020ea259: mdistiller/distillers/DKD.py, dkd_loss on golden.logits() and
# LABELS. (alpha, beta, temperature): value, gradient at student[0, 0], sum of the squared gradients.
AUTHORS = {
    (1.0, 8.0, 4.0): (54.76249355442989, -0.0433442789544706, 19.003169978593263),
    (0.5, 2.0, 1.0): (6.895871913464895, -0.017675501850518197, 0.47174132765113386),
}


@pytest.mark.parametrize("settings", list(AUTHORS), ids=str)
def test_authors_figures(settings: tuple[float, float, float]):
    alpha, beta, temperature = settings
    student, teacher = golden.logits()
    value = decoupled(student.requires_grad_(), teacher, LABELS, temperature, alpha=alpha, beta=beta)
    slope = gradient(value, student)
    assert [value.item(), slope[0, 0].item(), slope.square().sum().item()] == pytest.approx(AUTHORS[settings], rel=1e-9)


def test_three_classes_by_hand():
    # Student (1/2, 1/4, 1/4), teacher (1/4, 1/4, 1/2), true class the first: b = (1/2, 1/2) against (1/4, 3/4), and the others
    # (1/2, 1/2) against (1/3, 2/3).
    student, teacher = torch.tensor([[2.0, 1.0, 1.0]]).log(), torch.tensor([[1.0, 1.0, 2.0]]).log()
    binary = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)
    others = math.log(2 / 3) / 3 + math.log(4 / 3) * 2 / 3
    value = decoupled(student, teacher, torch.tensor([0]), 1.0, alpha=2.0, beta=3.0)
    assert value.item() == pytest.approx(2 * binary + 3 * others, rel=1e-5)


def test_it_is_soft_targets_when_the_others_weigh_what_the_teacher_gives_them():
    # KL = TCKD + (1 − p_t,y) · NCKD, item by item (equation 6).
    student, teacher = golden.logits()
    rest = 1 - (teacher / 4).softmax(-1).gather(-1, LABELS[:, None])[:, 0]
    binary, others = (
        decoupled(student, teacher, LABELS, 4.0, alpha=a, beta=b, reduction="none") for a, b in ((1, 0), (0, 1))
    )
    torch.testing.assert_close(binary + rest * others, soft_targets(student, teacher, 4.0, reduction="none"))


def test_a_common_shift_of_the_logits_and_that_of_the_true_class_alone():
    student, teacher = golden.logits()
    expected = decoupled(student, teacher, LABELS)
    torch.testing.assert_close(decoupled(student + 9, teacher - 7, LABELS), expected)
    moved = student.scatter_add(1, LABELS[:, None], torch.full((5, 1), 3.0, dtype=torch.float64))
    assert decoupled(moved, teacher, LABELS) != expected
    others = (decoupled(x, teacher, LABELS, alpha=0.0) for x in (student, moved))
    torch.testing.assert_close(*others)


@pytest.mark.parametrize("label", [-100, -1, 10, 255])
def test_an_item_without_a_class_is_left_out(label: int):
    student, teacher = golden.logits()
    student[3] = torch.inf
    labels = LABELS.clone()
    labels[3] = label
    kept = [0, 1, 2, 4]
    value = decoupled(student.requires_grad_(), teacher, labels)
    torch.testing.assert_close(value, decoupled(student[kept], teacher[kept], LABELS[kept]))
    slope = gradient(value, student)
    assert not slope[3].any() and slope.isfinite().all()
    nothing = decoupled(student, teacher, torch.full((5,), label))
    assert nothing == 0 and not gradient(nothing, student).any()


def test_classes_that_an_item_does_not_have_change_nothing():
    student, teacher = golden.logits()
    present = torch.ones(5, 10, dtype=torch.bool)
    present[:, 9] = False
    expected = decoupled(student[:, :9], teacher[:, :9], LABELS)
    low = -65504.0
    filled = [x.masked_fill(~present, low) for x in (student, teacher)]
    torch.testing.assert_close(decoupled(*filled, LABELS, present=present), expected)


def test_two_classes_have_no_others_to_compare():
    student, teacher = (x[:, :2] for x in golden.logits())
    labels = LABELS % 2
    assert decoupled(student, teacher, labels, alpha=0.0).item() == 0
    torch.testing.assert_close(decoupled(student, teacher, labels, 3.0), soft_targets(student, teacher, 3.0))


def test_probabilities_that_float32_cannot_hold():
    # The student gives the true class e^-200: the logarithm of 1 − p of the teacher, which is as sure of it, must not be log 0.
    student, teacher = torch.tensor([[-100.0, 100.0, 0.0]]).requires_grad_(), torch.tensor([[100.0, -100.0, 0.0]])
    value = decoupled(student, teacher, torch.tensor([0]), 1.0, beta=0.0)
    assert value.item() == pytest.approx(200, rel=1e-5)
    assert gradient(value, student).isfinite().all()


def test_mistakes():
    student, teacher = golden.logits()
    with pytest.raises(DistillError, match=r"labels \(4,\) must be one for each item of the logits \(5, 10\)"):
        decoupled(student, teacher, LABELS[:4])
    with pytest.raises(DistillError, match="decoupled: beta must be a number >= 0"):
        decoupled(student, teacher, LABELS, beta=-1)
    with pytest.raises(DistillError, match="decoupled: alpha must be a number >= 0"):
        decoupled(student, teacher, LABELS, alpha=math.nan)
