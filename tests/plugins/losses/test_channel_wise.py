"""Channel-wise distillation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

import golden.dense
from kdgraft.losses import channel_wise
from support.tensors import gradient

# Of the 2×5×4 positions; every image has both kinds.
VALID = (torch.arange(40) % 3 != 1).reshape(2, 5, 4)


@pytest.mark.parametrize("temperature", golden.dense.CHANNEL_WISE)
def test_authors_figures(temperature: float):
    student, teacher = golden.dense.class_maps()
    value = channel_wise(student.requires_grad_(), teacher, temperature)
    slope = gradient(value, student)
    figures = [value.item(), slope[0, 0, 0, 0].item(), slope.square().sum().item()]
    np.testing.assert_allclose(figures, golden.dense.CHANNEL_WISE[temperature], rtol=1e-10)


def test_two_positions_by_hand():
    # Channel 0: teacher ¾ and ¼ over two positions (ln 3 and 0), student ½ and ½: KL = ¾ ln 1.5 − ¼ ln 2 = 0.130812.
    # Channel 1: both ½ and ½: 0. The mean of the two, 0.065406. Over the channels of a position it would be another figure.
    student = torch.zeros(1, 2, 1, 2)
    teacher = torch.tensor([[[[math.log(3), 0.0]], [[5.0, 5.0]]]])
    assert channel_wise(student, teacher, 1.0, reduction="none").tolist() == [[pytest.approx(0.130812, abs=1e-6), 0]]
    assert channel_wise(student, teacher, 1.0).item() == pytest.approx(0.065406, abs=1e-6)
    assert channel_wise(student, teacher, 1.0, reduction="sum").item() == pytest.approx(0.130812, abs=1e-6)


def test_temperature_softens_and_scales_by_hand():
    # Logits 2·ln 3 at T = 2 are ln 3 again: the same KL, times T² = 4.
    value = channel_wise(torch.zeros(1, 1, 1, 2), torch.tensor([[[[2 * math.log(3), 0.0]]]]), 2.0)
    assert value.item() == pytest.approx(4 * 0.130812, abs=4e-6)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_gradient_is_T_times_the_difference_of_distributions(temperature: float):
    student, teacher = golden.dense.class_maps()
    slope = gradient(channel_wise(student.requires_grad_(), teacher, temperature, reduction="sum"), student)
    p, q = ((x / temperature).flatten(2).softmax(2).view_as(x) for x in (teacher, student))
    torch.testing.assert_close(slope, temperature * (q - p).detach())


@pytest.mark.parametrize("valid", [None, VALID])
def test_a_channel_may_shift_but_a_position_may_not(valid: Tensor | None):
    student, teacher = golden.dense.class_maps()
    shift = golden.dense.wave((2, 6, 1, 1), 1.3, 0.2, 30.0)
    expected = channel_wise(student, teacher, valid=valid)
    torch.testing.assert_close(channel_wise(student + shift - 1e6, teacher, valid=valid), expected)
    torch.testing.assert_close(channel_wise(student, teacher - shift, valid=valid), expected)
    shift = golden.dense.wave((2, 1, 5, 4), 1.3, 0.2, 3.0)
    assert abs(channel_wise(student + shift, teacher, valid=valid) - expected) > 0.1


def test_not_symmetric():
    student, teacher = golden.dense.class_maps()
    assert abs(channel_wise(student, teacher) - channel_wise(teacher, student)) > 0.01


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
def test_only_valid_positions_are_compared(dtype: torch.dtype):
    student, teacher = golden.dense.class_maps()
    cropped = [
        channel_wise(s[:, v][None, :, None], t[:, v][None, :, None], reduction="none")
        for s, t, v in zip(student, teacher, VALID, strict=True)
    ]
    items = channel_wise(student, teacher, valid=VALID.to(dtype), reduction="none")
    torch.testing.assert_close(items, torch.cat(cropped))


def test_a_single_position_and_constant_maps_cost_nothing():
    student, teacher = golden.dense.class_maps()
    valid = torch.zeros(2, 5, 4)
    valid[:, 2, 2] = 1
    constant = torch.full_like(student, 3.0)
    for s, t, v in (
        (student[..., :1, :1], teacher[..., :1, :1], None),
        (student, teacher, valid),
        (constant, constant - 7, None),
    ):
        leaf = s.clone().requires_grad_()
        value = channel_wise(leaf, t, valid=v)
        assert value.item() == pytest.approx(0, abs=1e-14)
        torch.testing.assert_close(gradient(value, leaf), torch.zeros_like(leaf), rtol=0, atol=1e-14)


def test_extreme_maps_stay_finite():
    # The student is sure of the wrong position: KL = 2·10⁴ · 1 at T = 1.
    student = torch.tensor([[[[1e4, -1e4]]]], requires_grad=True)
    value = channel_wise(student, -student.detach(), 1.0)
    assert value.item() == 2e4
    assert gradient(value, student).flatten().tolist() == [1, -1]
    # The same where a position does not count, and beyond what float32 can add up.
    for high, expected in ((1e4, 2e4), (1e35, 2e35)):
        student = torch.tensor([[[[high, -high, math.nan]]]], requires_grad=True)
        value = channel_wise(student, -student.detach(), 1.0, valid=torch.tensor([[[1, 1, 0]]]))
        assert value.item() == pytest.approx(expected)
        assert gradient(value, student).flatten().tolist() == [1, -1, 0]
