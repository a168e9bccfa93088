"""Pearson imitation: correlation of channels, whatever their scale."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

import golden
from kdgraft.losses import pearson


def maps(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    return tuple(torch.randn(2, 3, 4, 5, generator=generator, dtype=dtype) for _ in range(2))  # type: ignore[return-value]


def test_by_hand():
    # Channel 0: (1, 2, 3) and (2, 4, 6) agree; channel 1: (1, 2, 3) and (3, 2, 1) are opposed; channel 2: r = 1/2.
    student = torch.tensor([[1.0, 2, 3], [1, 2, 3], [1, 2, 3]]).T
    teacher = torch.tensor([[2.0, 4, 6], [3, 2, 1], [1, 3, 2]]).T
    torch.testing.assert_close(pearson(student, teacher, dim=-1, reduction="none"), torch.tensor([0.0, 2.0, 0.5]))
    torch.testing.assert_close(pearson(student, teacher, dim=-1), torch.tensor(2.5 / 3))


def test_is_half_the_squared_difference_of_standardised_channels():
    student, teacher = maps()

    def standardised(x: Tensor) -> Tensor:
        x = x.transpose(0, 1).flatten(1)
        return (x - x.mean(1, keepdim=True)) / x.std(1, unbiased=False, keepdim=True)

    expected = (standardised(student) - standardised(teacher)).square().mean() / 2
    torch.testing.assert_close(pearson(student, teacher), expected)


def test_scale_and_offset_do_not_matter():
    student, teacher = maps()
    scale, offset = torch.tensor([3.0, 0.2, 70.0])[:, None, None], torch.tensor([1.0, -5.0, 9.0])[:, None, None]
    torch.testing.assert_close(pearson(student * scale + offset, teacher), pearson(student, teacher))
    torch.testing.assert_close(pearson(student, teacher * scale + offset), pearson(student, teacher))
    torch.testing.assert_close(pearson(student, student), torch.zeros((), dtype=torch.float64), atol=1e-12, rtol=0)
    torch.testing.assert_close(pearson(-student, student), torch.tensor(2.0, dtype=torch.float64))


@pytest.mark.parametrize("junk", [1e30, torch.inf, torch.nan])
def test_positions_at_weight_zero_take_no_part(junk: float):
    student, teacher = maps()
    weight = torch.ones(2, 4, 5)
    weight[1, 2:] = 0
    cut = [torch.cat([x[0].flatten(1), x[1, :, :2].flatten(1)], 1).T for x in (student, teacher)]
    expected = pearson(*cut, dim=-1)
    for x in (student, teacher):
        x[1, :, 2:] = junk
    value = pearson(student.requires_grad_(), teacher, weight=weight)
    torch.testing.assert_close(value, expected)
    value.backward()
    assert student.grad is not None
    assert student.grad.isfinite().all()
    assert not student.grad[1, :, 2:].any()


@pytest.mark.parametrize("constant", ["student", "teacher", "both"])
def test_constants_correlate_with_nothing(constant: str):
    student, teacher = maps(torch.float32)
    for name, x in (("student", student), ("teacher", teacher)):
        if constant in (name, "both"):
            x[:, 1] = 0.1
    student.requires_grad_()
    items = pearson(student, teacher, reduction="none")
    assert items[1] == 1
    items.sum().backward()
    assert student.grad is not None
    assert student.grad.isfinite().all()
    assert not student.grad[:, 1].any()


def test_nothing_that_counts_is_zero():
    student, teacher = (x[:1] for x in maps())
    value = pearson(student.requires_grad_(), teacher, weight=torch.zeros(1, 4, 5))
    value.backward()
    assert value == 0
    assert student.grad is not None
    assert not student.grad.any()
    assert pearson(student[..., :1, :1], teacher[..., :1, :1]) == 1  # one position has no correlation


def test_authors_figures():
    student, teacher = golden.features()
    value = pearson(student.requires_grad_(), teacher) * 39 / 40  # of 40 positions
    (slope,) = torch.autograd.grad(value, student)
    figures = [value.item(), slope[0, 0, 0, 0].item(), slope.square().sum().item()]
    np.testing.assert_allclose(figures, golden.PEARSON, rtol=1e-5)
