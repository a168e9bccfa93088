"""Universal logit distillation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import golden.text
from kdgraft.losses import universal_logits
from support.tensors import gradient


def test_authors_figures():
    student, teacher = golden.text.vocabularies()
    figure = golden.text.figure(universal_logits(student.requires_grad_(), teacher), student)
    assert figure[0] == pytest.approx(golden.text.UNIVERSAL[0], rel=1e-6)
    np.testing.assert_allclose(figure[1:], golden.text.UNIVERSAL[1:], rtol=1e-6)


def test_by_hand():
    # Student ¼ and ¾, sorted ¾ ¼ 0; teacher ½ ¼ ¼ (logits ln 2, 0, 0), wherever they stand: ¼ + 0 + ¼ = ½
    student = torch.tensor([[0.0, math.log(3)], [0.0, math.log(3)]])
    teacher = torch.tensor([[math.log(2), 0.0, 0.0], [0.0, 0.0, math.log(2)]])
    assert universal_logits(student, teacher, reduction="none").tolist() == pytest.approx([0.5, 0.5])
    # The other way round the teacher's list is the shorter one.
    assert universal_logits(teacher, student).item() == pytest.approx(0.5)


def test_gradient_by_hand():
    # Student ¼ and ¾, teacher 0.5 0.3 0.2: |¾ − 0.5| + |¼ − 0.3| + 0.2 = 0.5. Of ¾ the slope is +1, of ¼ it is −1:
    # with dp₁/ds = ¾ (−¼, ¼) and dp₀/ds = ¼ (¾, −¾), their difference is (−3/8, 3/8).
    student = torch.tensor([[0.0, math.log(3)]], dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor([[0.3, 0.2, 0.5]], dtype=torch.float64).log()
    value = universal_logits(student, teacher)
    assert value.item() == pytest.approx(0.5)
    assert gradient(value, student)[0].tolist() == pytest.approx([-0.375, 0.375])


def test_either_vocabulary_may_be_in_another_order():
    student, teacher = golden.text.vocabularies()
    items = universal_logits(student, teacher, reduction="none")
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        a, b = torch.randperm(7, generator=generator), torch.randperm(10, generator=generator)
        torch.testing.assert_close(universal_logits(student[..., a], teacher[..., b], reduction="none"), items)


def test_symmetric_and_bounded_by_2():
    student, teacher = golden.text.vocabularies()
    items = universal_logits(student, teacher, reduction="none")
    torch.testing.assert_close(universal_logits(teacher, student, reduction="none"), items)
    assert (items > 0).all()
    assert (items < 2).all()
    # A sure student, a teacher who knows nothing of 1000 words: 1 − 0.001 + 999 · 0.001 = 1.998
    sure = torch.tensor([[1e4, 0.0]])
    assert universal_logits(sure, torch.zeros(1, 1000)).item() == pytest.approx(1.998)


def test_words_that_cannot_come_change_nothing():
    student, teacher = golden.text.vocabularies()
    expected = universal_logits(student, teacher)
    longer = torch.cat([torch.full_like(student[..., :6], -math.inf), student], -1)
    torch.testing.assert_close(universal_logits(longer, teacher), expected)


def test_the_same_distribution_in_another_order_costs_nothing():
    student, _ = golden.text.vocabularies()
    student.requires_grad_()
    value = universal_logits(student, student.detach().flip(-1))
    assert value.item() == pytest.approx(0, abs=1e-14)
    assert gradient(value, student).isfinite().all()


def test_ties_and_extreme_logits_stay_finite():
    # To five times ⅕: three times ⅓, and 1 with two zeros.
    for student, expected in (
        (torch.zeros(2, 3), 3 * (1 / 3 - 1 / 5) + 2 / 5),
        (torch.tensor([[1e4, -1e4, 0.0], [3e38, -3e38, -3e38]]), 4 / 5 + 4 / 5),
    ):
        value = universal_logits(student.requires_grad_(), torch.zeros(2, 5))
        assert value.item() == pytest.approx(expected)
        assert gradient(value, student).isfinite().all()
