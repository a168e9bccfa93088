"""Masked generation: the authors' figures, a case by hand, padding, and what is left out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

import golden
import golden.dense
from kdgraft.losses import masked_generation
from kdgraft.losses.masked_generation import FeatureGenerator


def maps(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return tuple(torch.randn(2, 3, 4, 6, generator=generator, dtype=dtype) for _ in range(2))  # type: ignore[return-value]


def filled(channels: int = 3) -> FeatureGenerator:
    module = FeatureGenerator(channels)
    golden.dense.fill(module)
    return module


KEEP = (torch.arange(48) % 3 != 0).reshape(2, 4, 6)


def test_the_authors_figures():
    student, teacher = golden.features()
    keep = (torch.arange(40) % 3 != 0).reshape(2, 5, 4)
    value = masked_generation(student.requires_grad_(), teacher, filled(6), keep)
    (slope,) = torch.autograd.grad(value, student)
    figures = [value.item(), slope[0, 0, 0, 1].item(), slope.square().sum().item()]
    np.testing.assert_allclose(figures, golden.dense.MASKED_GENERATION, rtol=1e-10)


def test_by_hand():
    # A generator that hands on what it is given: 2 where kept and 0 where not, against 3: 1² + 3², for each of two channels.
    student, teacher = torch.full((1, 2, 1, 2), 2.0), torch.full((1, 2, 1, 2), 3.0)
    keep = torch.tensor([[[True, False]]])
    assert masked_generation(student, teacher, lambda x, _: x, keep).item() == 20


def test_what_is_left_out_is_not_seen_but_must_be_generated():
    student, teacher = maps()
    student.requires_grad_()
    module = filled()
    value = masked_generation(student, teacher, module, KEEP)
    value.backward()
    assert student.grad is not None
    assert not student.grad.masked_select(~KEEP[:, None]).any() and student.grad.masked_select(KEEP[:, None]).all()
    changed = teacher.masked_fill(~KEEP[:, None], 9.0)
    assert masked_generation(student, changed, module, KEEP) != value


def test_the_gradient_is_the_numerical_one():
    student, teacher = maps()
    module = filled()
    assert torch.autograd.gradcheck(lambda s: masked_generation(s, teacher, module, KEEP), student.requires_grad_())


@pytest.mark.parametrize("junk", [1e6, torch.inf, torch.nan])
def test_an_image_costs_what_it_costs_without_its_padding(junk: float):
    student, teacher = maps()
    module = filled()
    valid = torch.ones(2, 4, 6)
    valid[1, 3:], valid[1, :, 4:] = 0, 0
    alone = masked_generation(student[1:, :, :3, :4], teacher[1:, :, :3, :4], module, KEEP[1:, :3, :4])
    for x in (student, teacher):
        x.masked_fill_((valid == 0)[:, None], junk)
    items = masked_generation(student.requires_grad_(), teacher, module, KEEP, valid=valid, reduction="none")
    torch.testing.assert_close(items[1], alone)
    items.sum().backward()
    assert student.grad is not None and student.grad.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())


def test_it_can_learn_to_cost_nothing():
    # The identity on maps that are not negative.
    module = FeatureGenerator(2)
    for convolution in (module.enter, module.leave):
        torch.nn.init.dirac_(convolution.weight)
        torch.nn.init.zeros_(convolution.bias)
    features = torch.rand(2, 2, 3, 3)
    assert masked_generation(features, features, module, torch.ones(2, 3, 3, dtype=torch.bool)).item() == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_error_is_computed_in_single(dtype: torch.dtype):
    # Squares of 600 do not fit half precision.
    student, teacher = ((300 * x).to(dtype) for x in maps(torch.float32))
    keep = torch.ones_like(KEEP)
    with torch.autocast("cpu", dtype=dtype):
        value = masked_generation(student, teacher, lambda x, _: x, keep)
    assert value.dtype == torch.float32
    expected = (student.double() - teacher.double()).square().sum() / 2
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=0)
    with torch.autocast("cpu", dtype=dtype):
        learned = masked_generation(student, teacher, filled().float(), keep)
    assert learned.dtype == torch.float32 and learned.isfinite()
