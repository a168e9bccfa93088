"""Conditional adversarial losses."""

from __future__ import annotations

import math

import pytest
import torch

from kdgraft import DistillError
from kdgraft.losses import conditional_adversarial, conditional_critic_loss

# Two classes: P(class) = (3/4, 1/4) and (1/2, 1/2); P(real) = 4/5 and 1/3.
REAL = torch.tensor([[math.log(3), 0.0, math.log(4), 0.0]])
FAKE = torch.tensor([[5.0, 5.0, 0.0, math.log(2)]])


def test_by_hand():
    labels = torch.tensor([0])
    critic = -math.log(4 / 5) - math.log(2 / 3) - math.log(3 / 4) - math.log(1 / 2)
    assert conditional_critic_loss(REAL, FAKE, labels).item() == pytest.approx(critic, rel=1e-6)
    student = -math.log(1 / 3) - math.log(1 / 2)
    assert conditional_adversarial(FAKE, labels).item() == pytest.approx(student, rel=1e-6)
    assert conditional_adversarial(REAL, torch.tensor([1])).item() == pytest.approx(
        -math.log(4 / 5) - math.log(1 / 4), rel=1e-6
    )


def test_verdict_and_classes_do_not_compete():
    labels = torch.tensor([1])
    moved = FAKE + torch.tensor([[7.0, 7.0, 0.0, 0.0]])
    torch.testing.assert_close(conditional_adversarial(moved, labels), conditional_adversarial(FAKE, labels))


def test_mistakes():
    with pytest.raises(DistillError, match=r"labels \(2,\) must be one for each item of the outputs \(1, 4\)"):
        conditional_adversarial(FAKE, torch.tensor([0, 1]))
    with pytest.raises(DistillError, match=r"conditional_critic_loss: student \(1, 4\) and teacher \(1, 3\)"):
        conditional_critic_loss(REAL[:, :3], FAKE, torch.tensor([0]))
