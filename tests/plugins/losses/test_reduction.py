"""The reductions that every loss shares."""

from __future__ import annotations

import pytest
import torch

from kdgraft import DistillError
from kdgraft.losses import (
    Ratio,
    mixed_targets,
    reduce_loss,
    upcast,
    weighted_ratio,
)


def test_weighted_mean_by_hand():
    values, weight = torch.tensor([1.0, 2.0, 10.0]), torch.tensor([1.0, 3.0, 0.0])
    # (1·1 + 3·2 + 0·10) / (1 + 3 + 0) = 7 / 4
    assert reduce_loss(values, weight).item() == 1.75
    assert reduce_loss(values, weight, "sum").item() == 7
    assert reduce_loss(values, weight, "none").tolist() == [1, 6, 0]
    assert reduce_loss(values).item() == pytest.approx(13 / 3)
    assert reduce_loss(values, None, "sum").item() == 13
    assert reduce_loss(values, None, "none") is values


def test_weights_broadcast_and_count_where_they_broadcast():
    values = torch.tensor([[1.0, 2.0], [3.0, 5.0]])
    # Row weights 1 and 3: (1 + 2 + 9 + 15) / (1 + 1 + 3 + 3) = 27 / 8
    assert reduce_loss(values, torch.tensor([[1.0], [3.0]])).item() == 27 / 8


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float64])
def test_weights_of_any_type(dtype: torch.dtype):
    weight = torch.tensor([1, 0, 1]).to(dtype)
    values = torch.tensor([1.0, 7.0, 2.0])
    assert reduce_loss(values, weight).item() == 1.5
    assert reduce_loss(values, weight, "none").tolist() == [1, 0, 2]


def test_no_gradient_through_the_denominator():
    values, weight = torch.tensor([1.0, 2.0]), torch.tensor([1.0, 3.0], requires_grad=True)
    ratio = weighted_ratio(values, weight)
    assert ratio.numerator.requires_grad
    assert not ratio.denominator.requires_grad


def test_ratio_adds_its_parts_after_dividing_them():
    # 6/3 + 10/4 + 0/0 = 2 + 2.5 + 0
    ratio = Ratio(torch.tensor([6.0, 10.0, 0.0]), torch.tensor([3.0, 4.0, 0.0]))
    assert ratio.value().item() == 4.5


def test_values_at_weight_0_take_no_part_even_if_infinite():
    values = torch.tensor([2.0, torch.inf, torch.nan], requires_grad=True)
    weight = torch.tensor([1.0, 0.0, 0.0])
    for reduction, expected in (("mean", [1, 0, 0]), ("sum", [1, 0, 0])):
        (gradient,) = torch.autograd.grad(reduce_loss(values, weight, reduction), values)
        assert reduce_loss(values, weight, reduction).item() == 2
        assert gradient.tolist() == expected
    assert reduce_loss(values, weight, "none").tolist() == [2, 0, 0]


def test_unknown_reduction():
    with pytest.raises(DistillError, match="'none', 'sum' or 'mean', got 'batchmean'"):
        reduce_loss(torch.ones(2), None, "batchmean")


def test_upcast():
    assert upcast(torch.ones(1, dtype=torch.float16)).dtype is torch.float32
    assert upcast(torch.ones(1, dtype=torch.bfloat16)).dtype is torch.float32
    double = torch.ones(1, dtype=torch.float64)
    assert upcast(double) is double


def test_mixed_targets_wants_equal_shapes_too():
    with pytest.raises(DistillError, match=r"student \(2, 3\) and teacher \(2, 4\)"):
        mixed_targets(torch.zeros(2, 3), torch.zeros(2, 4), torch.zeros(2, dtype=torch.long))
