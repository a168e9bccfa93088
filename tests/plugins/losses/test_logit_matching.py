"""Logit matching."""

from __future__ import annotations

import pytest
import torch

import golden
from kdgraft.losses import logit_matching


def test_authors_figure():
    # The authors' mean over items and classes has no ½.
    assert logit_matching(*golden.logits()).item() == pytest.approx(golden.LOGITS_MSE / 2, rel=1e-10)


def test_by_hand():
    student, teacher = torch.tensor([[1.0, 2.0, 6.0]]), torch.tensor([[0.0, 4.0, 3.0]])
    # Differences 1, −2, 3: ½ (1 + 4 + 9) / 3 = 7 / 3
    assert logit_matching(student, teacher).item() == pytest.approx(7 / 3)
    # Their mean is 2/3; less it: 1/3, −8/3, 7/3: ½ (1 + 64 + 49) / 9 / 3 = 19 / 9
    assert logit_matching(student, teacher, center=True).item() == pytest.approx(19 / 9)


def test_centred_logits_may_shift_others_not():
    student, teacher = golden.logits()
    torch.testing.assert_close(
        logit_matching(student + 5, teacher, center=True), logit_matching(student, teacher, center=True)
    )
    # A constant difference of 5 alone costs ½ · 25.
    assert logit_matching(teacher + 5, teacher).item() == pytest.approx(12.5)


def test_symmetric():
    student, teacher = golden.logits()
    torch.testing.assert_close(logit_matching(student, teacher), logit_matching(teacher, student))


def test_gradient_is_the_difference_over_classes_and_items():
    student, teacher = golden.logits()
    student.requires_grad_()
    (slope,) = torch.autograd.grad(logit_matching(student, teacher), student)
    torch.testing.assert_close(slope, (student.detach() - teacher) / 50)


def test_dense_maps():
    student, teacher = golden.features()
    items = logit_matching(student, teacher, dim=1, reduction="none")
    assert items.shape == (2, 5, 4)
    expected = 0.5 * sum((student[1, c, 3, 2].item() - teacher[1, c, 3, 2].item()) ** 2 for c in range(6)) / 6
    assert items[1, 3, 2].item() == pytest.approx(expected, rel=1e-12)
