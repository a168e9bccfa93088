"""Universal logit distillation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

import golden.text
from kdgraft import DistillError
from kdgraft.losses import universal_logits


def gradient(value: Tensor, tensor: Tensor) -> Tensor:
    return torch.autograd.grad(value, tensor)[0]


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
    for student in (torch.zeros(2, 3), torch.tensor([[1e4, -1e4, 0.0], [3e38, -3e38, -3e38]])):
        value = universal_logits(student.requires_grad_(), torch.zeros(2, 5))
        assert value.isfinite()
        assert gradient(value, student).isfinite().all()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_no_token_is_0_with_a_live_graph(reduction: str):
    student = torch.zeros(2, 0, 7, requires_grad=True)
    value = universal_logits(student, torch.zeros(2, 0, 10), reduction=reduction)
    assert value.item() == 0
    assert gradient(value, student).shape == (2, 0, 7)


def test_weights():
    student, teacher = golden.text.vocabularies()
    weight = torch.tensor([[1, 1, 0], [1, 0, 0]])
    keep = weight.bool()
    expected = universal_logits(student[keep], teacher[keep])
    torch.testing.assert_close(universal_logits(student, teacher, weight=weight), expected)


def test_gradient():
    student, teacher = golden.text.vocabularies()
    assert torch.autograd.gradcheck(universal_logits, (student.requires_grad_(), teacher.requires_grad_()))
    assert torch.autograd.gradcheck(universal_logits, (teacher, student))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision(dtype: torch.dtype):
    student, teacher = (x.to(dtype) for x in golden.text.vocabularies())
    with torch.autocast("cpu", torch.bfloat16):
        value = universal_logits(student.requires_grad_(), teacher)
    assert value.dtype is torch.float32
    torch.testing.assert_close(value.double(), universal_logits(student.double(), teacher.double()), rtol=1e-5, atol=0)
    assert gradient(value, student).dtype is dtype


def test_shapes_before_the_vocabulary_must_be_equal():
    student, teacher = golden.text.vocabularies()
    message = r"universal_logits: student \(2, 3, 7\) and teacher \(2, 1, 10\) must have the same shape before"
    with pytest.raises(DistillError, match=message):
        universal_logits(student, teacher[:, :1])
