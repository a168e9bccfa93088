"""Soft targets, per class softmax and per class sigmoid, and their mixture with the labels."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.special import expit, log_softmax, rel_entr, softmax
from torch import Tensor

import golden
from kdgraft import DistillError
from kdgraft.losses import SoftTargetsLoss, binary_soft_targets, logit_matching, mixed_targets, soft_targets
from support.tensors import gradient

# --- softmax


@pytest.mark.parametrize("temperature", golden.SOFT_TARGETS)
def test_authors_figures(temperature: float):
    student, teacher = golden.logits()
    student.requires_grad_()
    value = soft_targets(student, teacher, temperature)
    slope = gradient(value, student)
    expected = golden.SOFT_TARGETS[temperature]
    np.testing.assert_allclose([value.item(), slope[0, 0].item(), slope.square().sum().item()], expected, rtol=1e-10)


def test_two_classes_by_hand():
    # Teacher probabilities ¾ and ¼ (logits ln 3 and 0), student ½ and ½:
    # KL = ¾ ln(¾ / ½) + ¼ ln(¼ / ½) = ¾ ln 1.5 − ¼ ln 2 = 0.304099 − 0.173287 = 0.130812
    value = soft_targets(torch.zeros(1, 2), torch.tensor([[math.log(3), 0.0]]), 1.0)
    assert value.item() == pytest.approx(0.75 * math.log(1.5) - 0.25 * math.log(2))
    assert value.item() == pytest.approx(0.130812, abs=1e-6)


def test_temperature_softens_and_scales_by_hand():
    # Logits 2·ln 3 at T = 2 are ln 3 again: the same KL, times T² = 4.
    value = soft_targets(torch.zeros(1, 2), torch.tensor([[2 * math.log(3), 0.0]]), 2.0)
    assert value.item() == pytest.approx(4 * 0.130812, abs=4e-6)


@pytest.mark.parametrize("temperature", [0.5, 3.0])
def test_scipy(temperature: float):
    student, teacher = golden.logits()
    p, q = (softmax(x.numpy() / temperature, axis=1) for x in (teacher, student))
    items = soft_targets(student, teacher, temperature, reduction="none")
    np.testing.assert_allclose(items, rel_entr(p, q).sum(1) * temperature**2, rtol=1e-10)


@pytest.mark.parametrize("temperature", [1.0, 4.0, 20.0])
def test_gradient_is_T_times_the_difference_of_probabilities(temperature: float):
    student, teacher = golden.logits()
    student.requires_grad_()
    slope = gradient(soft_targets(student, teacher, temperature, reduction="sum"), student)
    p, q = (softmax(x.detach().numpy() / temperature, axis=1) for x in (teacher, student))
    np.testing.assert_allclose(slope, temperature * (q - p), atol=1e-12)


def test_logits_may_shift():
    student, teacher = golden.logits()
    shift = torch.tensor([[1.0], [-50.0], [3.0], [1000.0], [0.0]], dtype=torch.float64)
    expected = soft_targets(student, teacher)
    torch.testing.assert_close(soft_targets(student + shift, teacher), expected)
    torch.testing.assert_close(soft_targets(student, teacher - shift), expected)


def test_not_symmetric():
    # With the roles exchanged ½ ln(½ / ¾) + ½ ln(½ / ¼) = ½ ln(4 / 3) = 0.143841, not 0.130812.
    student, teacher = torch.zeros(1, 2), torch.tensor([[math.log(3), 0.0]])
    assert soft_targets(teacher, student, 1.0).item() == pytest.approx(0.5 * math.log(4 / 3))


def test_high_temperature_limit_is_logit_matching():
    student, teacher = golden.logits()
    student.requires_grad_()
    hot, limit = soft_targets(student, teacher, 1e4), logit_matching(student, teacher, center=True)
    torch.testing.assert_close(hot, limit, rtol=1e-3, atol=0)
    torch.testing.assert_close(gradient(hot, student), gradient(limit, student), rtol=0, atol=1e-4)


def test_extreme_logits_stay_finite():
    # The student is sure of the wrong class: KL = 2·10⁴ · 1 at T = 1, as log q = −2·10⁴ and p = 1.
    student = torch.tensor([[1e4, -1e4]], requires_grad=True)
    value = soft_targets(student, torch.tensor([[-1e4, 1e4]]), 1.0)
    assert value.item() == 2e4
    assert gradient(value, student).tolist() == [[1, -1]]


def test_dense_maps():
    student, teacher = golden.wave((2, 3, 2, 2), 0.7, 0.1, 2.0), golden.wave((2, 3, 2, 2), 0.3, 0.5, 2.0)
    as_rows = [x.permute(0, 2, 3, 1).reshape(-1, 3) for x in (student, teacher)]
    torch.testing.assert_close(soft_targets(student, teacher, dim=1), soft_targets(*as_rows))
    assert soft_targets(student, teacher, dim=1, reduction="none").shape == (2, 2, 2)


# --- sigmoid


def test_one_sigmoid_by_hand():
    # Teacher ¾ (logit ln 3), student ½: the two-class case above.
    value = binary_soft_targets(torch.zeros(1), torch.tensor([math.log(3)]))
    assert value.item() == pytest.approx(0.130812, abs=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("focus", [0.0, 1.0, 2.0])
def test_sigmoid_scipy(temperature: float, focus: float):
    student, teacher = golden.logits()
    p, q = (expit(x.numpy() / temperature) for x in (teacher, student))
    expected = temperature**2 * np.abs(p - q) ** focus * (rel_entr(p, q) + rel_entr(1 - p, 1 - q))
    items = binary_soft_targets(student, teacher, temperature, focus=focus, reduction="none")
    np.testing.assert_allclose(items, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("focus", [0.0, 1.0])
def test_sigmoid_gradient_has_none_through_the_focus(focus: float):
    student, teacher = golden.logits()
    student.requires_grad_()
    slope = gradient(binary_soft_targets(student, teacher, 2.0, focus=focus, reduction="sum"), student)
    p, q = (expit(x.detach().numpy() / 2) for x in (teacher, student))
    # d/ds of T² KL(σ(t/T) ‖ σ(s/T)) is T (q − p).
    np.testing.assert_allclose(slope, np.abs(p - q) ** focus * 2 * (q - p), atol=1e-12)


def test_sigmoid_is_the_same_for_the_complement_but_not_symmetric():
    student, teacher = golden.logits()
    value = binary_soft_targets(student, teacher)
    torch.testing.assert_close(binary_soft_targets(-student, -teacher), value)
    assert abs(binary_soft_targets(teacher, student) - value) > 0.01


def test_sigmoid_is_softmax_over_the_logit_and_0():
    student, teacher = (x.reshape(-1) for x in golden.logits())
    pairs = [torch.stack([x, torch.zeros_like(x)], 1) for x in (student, teacher)]
    torch.testing.assert_close(binary_soft_targets(student, teacher, 3.0), soft_targets(*pairs, 3.0))


def test_sigmoid_extreme_logits_stay_finite():
    student = torch.tensor([200.0, -200.0], requires_grad=True)
    value = binary_soft_targets(student, torch.tensor([-200.0, 200.0]), reduction="sum")
    # Each: BCE = softplus(200) = 200, the teacher's entropy is 0.
    assert value.item() == 400
    assert gradient(value, student).tolist() == [1, -1]


def test_negative_focus():
    with pytest.raises(DistillError, match="focus must be a number >= 0, got -1"):
        binary_soft_targets(torch.zeros(2), torch.zeros(2), focus=-1)


# --- mixed with the labels

LABELS = torch.tensor([3, 0, 9, 4, 4])


def cross_entropy(logits: Tensor, labels: Tensor) -> np.ndarray:
    return -log_softmax(logits.numpy(), axis=1)[np.arange(len(labels)), labels]


def test_ends_of_the_mixture():
    student, teacher = golden.logits()
    hard = mixed_targets(student, teacher, LABELS, hard_weight=1)
    soft = mixed_targets(student, teacher, LABELS, hard_weight=0, temperature=4)
    assert hard.item() == pytest.approx(cross_entropy(student, LABELS).mean(), rel=1e-12)
    assert soft.item() == pytest.approx(golden.SOFT_TARGETS[4][0], rel=1e-10)


def test_mixture_by_hand():
    # Student ½, teacher ¾: CE(first class) = ln 2, KL = 0.130812 at T = 1; ¼ ln 2 + ¾ · 0.130812 = 0.271396
    value = mixed_targets(
        torch.zeros(1, 2), torch.tensor([[math.log(3), 0.0]]), torch.tensor([0]), temperature=1.0, hard_weight=0.25
    )
    assert value.item() == pytest.approx(0.271396, abs=1e-6)


@pytest.mark.parametrize("ignore_index", [-100, 255])
def test_ignored_items_count_in_neither_part(ignore_index: int):
    student, teacher = golden.logits()
    labels = LABELS.clone()
    labels[[1, 3]] = ignore_index
    keep = [0, 2, 4]
    value = mixed_targets(student, teacher, labels, ignore_index=ignore_index)
    torch.testing.assert_close(value, mixed_targets(student[keep], teacher[keep], LABELS[keep]))


def test_all_ignored_is_0_with_a_live_graph():
    student, teacher = golden.logits()
    student.requires_grad_()
    value = mixed_targets(student, teacher, torch.full((5,), -100))
    assert value.item() == 0
    assert torch.equal(gradient(value, student), torch.zeros_like(student))


@pytest.mark.parametrize("hard_weight", [-0.1, 1.1])
def test_hard_weight_out_of_range(hard_weight: float):
    student, teacher = golden.logits()
    with pytest.raises(DistillError, match=r"hard_weight must be in \[0, 1\]"):
        mixed_targets(student, teacher, LABELS, hard_weight=hard_weight)
    with pytest.raises(DistillError, match=r"hard_weight must be in \[0, 1\]"):
        SoftTargetsLoss(hard_weight=hard_weight)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_mixture_in_half_precision(dtype: torch.dtype):
    student, teacher = (x.to(dtype) for x in golden.logits())
    with torch.autocast("cpu", torch.bfloat16):
        value = mixed_targets(student, teacher, LABELS)
    assert value.dtype is torch.float32
    torch.testing.assert_close(
        value.double(), mixed_targets(student.double(), teacher.double(), LABELS), rtol=1e-5, atol=0
    )


def test_module_holds_the_settings():
    student, teacher = golden.logits()
    loss = SoftTargetsLoss(temperature=20, hard_weight=0.25)
    assert loss(student, teacher).item() == pytest.approx(golden.SOFT_TARGETS[20][0], rel=1e-10)
    expected = 0.25 * cross_entropy(student, LABELS).mean() + 0.75 * golden.SOFT_TARGETS[20][0]
    assert loss(student, teacher, LABELS).item() == pytest.approx(expected, rel=1e-10)
    with pytest.raises(DistillError, match="temperature must be > 0, got 0"):
        SoftTargetsLoss(0)
