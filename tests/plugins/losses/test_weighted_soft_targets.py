"""Class-weighted soft cross-entropy: by hand, and against torch's own. What every loss does is in test_every_loss.py."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from kdgraft import DistillError
from kdgraft.losses import (
    binary_soft_targets,
    soft_targets,
    weighted_binary_soft_targets,
    weighted_soft_targets,
)

generator = torch.Generator().manual_seed(0)
STUDENT, TEACHER = (torch.randn(6, 4, dtype=torch.float64, generator=generator) for _ in range(2))
CHEN = torch.tensor([1.0, 1.0, 1.0, 1.5])


def test_by_hand():
    # p_s = (1/2, 1/4, 1/4), p_t = (1/4, 1/4, 1/2), the last is the background.
    student = torch.tensor([[2.0, 1.0, 1.0]], dtype=torch.float64).log()
    teacher = torch.tensor([[1.0, 1.0, 2.0]], dtype=torch.float64).log()
    found = weighted_soft_targets(student, teacher, class_weight=torch.tensor([1.0, 1.0, 1.5]))
    assert found.item() == pytest.approx(math.log(2) / 4 + math.log(4) / 4 + 1.5 * math.log(4) / 2)


def test_without_weights_it_is_torchs_soft_cross_entropy_and_the_kl_plus_entropy():
    for temperature in (1.0, 3.0):
        p = (TEACHER / temperature).softmax(1)
        expected = F.cross_entropy(STUDENT / temperature, p, reduction="none") * temperature**2
        found = weighted_soft_targets(STUDENT, TEACHER, temperature, reduction="none")
        torch.testing.assert_close(found, expected)
        entropy = weighted_soft_targets(TEACHER, TEACHER, temperature, reduction="none")
        torch.testing.assert_close(found - entropy, soft_targets(STUDENT, TEACHER, temperature, reduction="none"))


def test_the_weighted_minimum_is_where_the_docstring_says():
    student = (TEACHER.softmax(1) * CHEN).log().requires_grad_()
    weighted_soft_targets(student, TEACHER, class_weight=CHEN).backward()
    torch.testing.assert_close(student.grad, torch.zeros_like(student), atol=1e-12, rtol=0)


def test_each_sigmoid_is_a_softmax_over_itself_and_background():
    pairs = [torch.stack([x, torch.zeros_like(x)], -1) for x in (STUDENT, TEACHER)]
    expected = weighted_soft_targets(*pairs, 2.0, class_weight=torch.tensor([1.0, 1.5]), reduction="none")
    found = weighted_binary_soft_targets(STUDENT, TEACHER, 2.0, reduction="none")
    assert found.shape == STUDENT.shape
    torch.testing.assert_close(found * (2.0**2 / 2.0**2), expected)
    plain = weighted_binary_soft_targets(STUDENT, TEACHER, background_weight=1.0)
    entropy = weighted_binary_soft_targets(TEACHER, TEACHER, background_weight=1.0)
    torch.testing.assert_close(plain - entropy, binary_soft_targets(STUDENT, TEACHER))


def test_other_dimensions():
    maps = [x.reshape(2, 3, 4).movedim(-1, 1) for x in (STUDENT, TEACHER)]
    found = weighted_soft_targets(*maps, class_weight=CHEN, dim=1, reduction="none")
    torch.testing.assert_close(
        found.flatten(), weighted_soft_targets(STUDENT, TEACHER, class_weight=CHEN, reduction="none")
    )


def test_a_class_that_both_rule_out_costs_nothing():
    masked = STUDENT.clone()
    masked[:, 0] = -torch.inf
    teacher = TEACHER.clone()
    teacher[:, 0] = -torch.inf
    rest = weighted_soft_targets(STUDENT[:, 1:], TEACHER[:, 1:])
    torch.testing.assert_close(weighted_soft_targets(masked, teacher), rest)


def test_errors():
    with pytest.raises(DistillError, match="class_weight \\(3,\\) must have 4 entries"):
        weighted_soft_targets(STUDENT, TEACHER, class_weight=torch.ones(3))
    for wrong in (0, -1.5):
        with pytest.raises(DistillError, match="background_weight must be a number > 0"):
            weighted_binary_soft_targets(STUDENT, TEACHER, background_weight=wrong)
