"""Normalized distillation (NKD)."""

from __future__ import annotations

import math

import pytest
import torch

import golden
from kdgraft import DistillError
from kdgraft.losses import normalized
from support.tensors import gradient

LABELS = torch.tensor([0, 2, 4, 6, 8])

# yzd-v/cls_KD@1e5d48f36957ee460d39d7ebc592c6cc7f8f3d66: mmcls/models/dis_losses/nkd.py, NKDLoss on golden.logits() and LABELS.
# (gamma, temperature): value, gradient at student[0, 0], sum of the squared gradients.
AUTHORS = {
    (1.5, 1.0): (7.204525704536032, -0.04341933018000015, 0.2901722572754074),
    (2.0, 3.0): (46.923827222432045, -0.04341933018000015, 1.140393587325926),
}


@pytest.mark.parametrize("settings", list(AUTHORS), ids=str)
def test_authors_figures(settings: tuple[float, float]):
    gamma, temperature = settings
    student, teacher = golden.logits()
    value = normalized(student.requires_grad_(), teacher, LABELS, temperature, gamma=gamma)
    slope = gradient(value, student)
    assert [value.item(), slope[0, 0].item(), slope.square().sum().item()] == pytest.approx(AUTHORS[settings], rel=1e-9)


def test_three_classes_by_hand():
    # Student (1/2, 1/4, 1/4), teacher (1/4, 1/4, 1/2), true class the first; the others (1/2, 1/2) and (1/3, 2/3).
    student, teacher = torch.tensor([[2.0, 1.0, 1.0]]).log(), torch.tensor([[1.0, 1.0, 2.0]]).log()
    value = normalized(student, teacher, torch.tensor([0]), gamma=3.0)
    assert value.item() == pytest.approx(0.25 * math.log(2) + 3 * math.log(2), rel=1e-5)


def test_the_best_student_has_the_teachers_distribution_over_the_others():
    _, teacher = golden.logits()
    student = teacher.clone().requires_grad_()
    slope = gradient(normalized(student, teacher, LABELS, 2.0, gamma=1.0), student)
    rest = slope.scatter(1, LABELS[:, None], 0)
    # The second part has no gradient there; the first pulls all others down in proportion to the student's probabilities.
    p = teacher.softmax(-1)
    expected = p.gather(1, LABELS[:, None]) * p / 5
    torch.testing.assert_close(rest, expected.scatter(1, LABELS[:, None], 0))


def test_items_without_a_class_are_left_out():
    student, teacher = golden.logits()
    labels = torch.tensor([0, -100, 4, 10, 8])
    kept = [0, 2, 4]
    student[1], teacher[3] = torch.nan, torch.inf
    value = normalized(student.requires_grad_(), teacher, labels)
    torch.testing.assert_close(value, normalized(student[kept], teacher[kept], labels[kept]))
    assert gradient(value, student).isfinite().all()


def test_two_classes_have_no_others_to_compare():
    student, teacher = (x[:, :2] for x in golden.logits())
    labels = LABELS % 2
    torch.testing.assert_close(
        normalized(student, teacher, labels), normalized(student, teacher, labels, 5.0, gamma=100.0)
    )


def test_mistakes():
    student, teacher = golden.logits()
    with pytest.raises(DistillError, match=r"labels \(5, 1\) must be one for each item"):
        normalized(student, teacher, LABELS[:, None])
    with pytest.raises(DistillError, match="normalized: gamma must be a number >= 0"):
        normalized(student, teacher, LABELS, gamma=-1)
