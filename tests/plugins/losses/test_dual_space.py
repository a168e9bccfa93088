"""DSKD: the loss in the student's space, and attention between the tokens of two models."""

from __future__ import annotations

import math

import pytest
import torch

import golden.text
from kdgraft import DistillError
from kdgraft.losses import cross_model_attention, dual_space, generalized_jsd, reverse_kl, soft_targets
from support.tensors import gradient


def test_by_hand():
    # Projection ¾ ¼, student ½ ½, T = 1: KL = ¾ log 1.5 + ¼ log ½; the target is entry 1: −log ¼.
    student, projected = torch.zeros(1, 2), torch.tensor([[math.log(3), 0.0]])
    kl = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert dual_space(student, projected, torch.tensor([1]), 1.0).item() == pytest.approx(kl + math.log(4))
    # Entry 0 is what the projection predicts, so that it teaches; entry 1 is not.
    right, wrong = (dual_space(student, projected, torch.tensor([k]), 1.0, correct_only=True).item() for k in (0, 1))
    assert right == pytest.approx(kl + math.log(4 / 3))
    assert wrong == pytest.approx(math.log(4))


def test_each_part_has_its_own_pupil():
    student, teacher = (x.requires_grad_() for x in golden.text.logits())
    targets = torch.arange(8).view(2, 4)
    value = dual_space(student, teacher, targets)
    expected = soft_targets(student, teacher.detach(), 2.0) / 4
    torch.testing.assert_close(gradient(value, student), gradient(expected, student))
    value = dual_space(student, teacher, targets)
    hard = torch.nn.functional.cross_entropy(teacher.flatten(0, 1), targets.flatten())
    torch.testing.assert_close(gradient(value, teacher), gradient(hard, teacher))


@pytest.mark.parametrize("name", ["reverse_kl", "jsd"])
def test_other_divergences(name):
    student, teacher = golden.text.logits()
    targets = torch.arange(8).view(2, 4)
    other = {"reverse_kl": reverse_kl(student, teacher, 2.0), "jsd": generalized_jsd(student, teacher, 0.5, 2.0)}[name]
    difference = dual_space(student, teacher, targets, divergence=name) - dual_space(student, teacher, targets)
    torch.testing.assert_close(difference, other - soft_targets(student, teacher, 2.0) / 4)
    with pytest.raises(DistillError, match="divergence must be one of forward_kl, reverse_kl"):
        dual_space(student, teacher, targets, divergence="mse")


def test_attention_by_hand():
    # One dimension of 2: scores are q · k / √2.
    root = math.sqrt(2)
    query = torch.tensor([[[root, 0.0], [9.0, 9.0]]])
    key = torch.tensor([[[math.log(3), 0.0], [0.0, 5.0], [7.0, 7.0]]])
    valid = torch.tensor([[True, False]]), torch.tensor([[True, True, False]])
    of_student, of_teacher = cross_model_attention(query, key, *valid)
    torch.testing.assert_close(of_student, torch.tensor([[[0.75, 0.25, 0.0], [0.0, 0.0, 0.0]]]))
    torch.testing.assert_close(of_teacher, torch.tensor([[[1.0, 0.0], [1.0, 0.0], [0.0, 0.0]]]))


def test_attention_to_nothing_is_zero_with_a_gradient():
    query, key = torch.rand(2, 3, 4, requires_grad=True), torch.rand(2, 5, 4)
    some = torch.tensor([[True] * 5, [False] * 5])
    of_student, of_teacher = cross_model_attention(query, key, torch.ones(2, 3, dtype=torch.bool), some)
    assert not of_student[1].any() and not of_teacher[1].any()
    torch.testing.assert_close(of_student[0].sum(-1), torch.ones(3))
    assert gradient((of_student.square().sum() + of_teacher.square().sum()), query).isfinite().all()


def test_attention_computes_in_float32_under_autocast():
    query, key = 9 * torch.rand(1, 3, 4), 9 * torch.rand(1, 5, 4)
    every = torch.ones(1, 3, dtype=torch.bool), torch.ones(1, 5, dtype=torch.bool)
    with torch.autocast("cpu", torch.bfloat16):
        low = cross_model_attention(query.bfloat16(), key.bfloat16(), *every)
    exact = cross_model_attention(query.bfloat16().double(), key.bfloat16().double(), *every)
    for one, other in zip(low, exact, strict=True):
        assert one.dtype is torch.float32
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-6)
