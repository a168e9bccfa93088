"""What holds for every loss: a new one joins by its line in ``tests/support/losses.py``."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable

import pytest
import torch

from kdgraft import DistillError, losses
from support import loss_ranks
from support.losses import ANYTHING, BY_NAME, FINITE, TOKENS, Declared
from support.processes import found_by_two


def every(condition: Callable[[Declared], object] = lambda declared: True) -> pytest.MarkDecorator:
    """Every declared loss for which the condition holds, as the argument ``declared``."""
    found = [pytest.param(declared, id=name) for name, declared in BY_NAME.items() if condition(declared)]
    return pytest.mark.parametrize("declared", found)


def test_every_loss_is_declared():
    functions = {name: getattr(losses, name) for name in losses.__all__}
    own = {name for name, loss in functions.items() if "reduction" in inspect.signature(loss).parameters}
    assert own - {"reduce_loss", "SoftTargetsLoss", "gradient_penalty", "mixed_targets"} <= {
        name.split(" ")[0] for name in BY_NAME
    }


# --- values


@every(lambda declared: declared.equal)
def test_equal_inputs_cost_nothing(declared: Declared):
    student, _ = declared.inputs()
    for settings in ({}, declared.left_out()):
        value, slope = declared.figures(student, student.clone(), **settings)
        torch.testing.assert_close(value, torch.zeros_like(value), rtol=0, atol=1e-13)
        torch.testing.assert_close(slope, torch.zeros_like(slope), rtol=0, atol=1e-13)


@every()
def test_items_of_different_inputs(declared: Declared):
    items = declared.loss(*declared.inputs(), reduction="none")
    assert items.shape == declared.items
    assert items.isfinite().all()
    assert not declared.positive or (items > 0).all()


@every()
def test_reductions_agree(declared: Declared):
    student, teacher = declared.inputs()
    items = declared.loss(student, teacher, reduction="none")
    torch.testing.assert_close(declared.loss(student, teacher), items.sum() / items.numel())
    torch.testing.assert_close(declared.loss(student, teacher, reduction="sum"), items.sum())
    settings = declared.left_out()
    part = declared.loss(student, teacher, reduction="none", **settings)
    torch.testing.assert_close(declared.loss(student, teacher, reduction="sum", **settings), part.sum())
    if declared.leaves_out == "weight" and declared.items == declared.kind.places:
        weight = declared.places()
        torch.testing.assert_close(part, items * weight)
        torch.testing.assert_close(declared.loss(student, teacher, **settings), part.sum() / weight.sum())


@every(lambda declared: declared.leaves_out == "weight")
def test_a_weight_is_a_repetition(declared: Declared):
    student, teacher = declared.inputs()
    weight = torch.ones(declared.kind.places, dtype=torch.float64)
    weight[0] = 3
    repeated = [torch.cat([x[:1], x[:1], x]) for x in (student, teacher)]
    torch.testing.assert_close(declared.loss(student, teacher, weight=weight), declared.loss(*repeated))


@every(lambda declared: not declared.lengths)
@pytest.mark.parametrize("sizes", [(1e10, 1e10), (1e18, 1e18), (1e30, 1e30), (1e30, 1.0), (1.0, 1e30)], ids=str)
def test_lengths_do_not_matter_where_the_loss_is_of_directions(declared: Declared, sizes: tuple[float, float]):
    student, teacher = declared.inputs(size=1.0)
    for settings in ({}, declared.left_out()):
        value, slope = declared.figures(student, teacher, **settings)
        large = declared.figures(student.float() * sizes[0], teacher.float() * sizes[1], **settings)
        torch.testing.assert_close(large[0].double(), value, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(large[1].double() * sizes[0], slope, rtol=1e-3, atol=1e-5)


def test_two_processes_are_one(tmp_path):
    ranks = found_by_two("loss_ranks", tmp_path)
    assert loss_ranks.SHARED
    for name, declared in loss_ranks.SHARED.items():
        value, slope = loss_ranks.figures(declared, slice(None))
        for found in ranks:
            torch.testing.assert_close(found[name][0], value)
        # Each process has the loss of both; the mean over processes, which DDP takes, is the gradient of one.
        torch.testing.assert_close(torch.cat([found[name][1] for found in ranks]) / 2, slope)


# --- places that are left out


@every(lambda declared: declared.leaves_out)
def test_what_is_left_out_does_not_matter(declared: Declared):
    student, teacher = declared.inputs()
    settings = declared.left_out()
    outside = declared.kind.spread(settings[declared.leaves_out] == 0)
    value, slope = declared.figures(student, teacher, **settings)
    assert not slope.masked_select(outside).any()
    assert slope.any()
    for junk in ANYTHING:
        filled = declared.figures(*(x.masked_fill(outside, junk) for x in (student, teacher)), **settings)
        same = dict(rtol=0, atol=0, msg=lambda m, junk=junk: f"{junk}: {m}")
        torch.testing.assert_close(filled[0], value, **same)
        if declared.cuts or junk in FINITE:
            torch.testing.assert_close(filled[1], slope, **same)


@every(lambda declared: declared.leaves_out)
def test_a_sample_that_is_left_out_is_not_there(declared: Declared):
    student, teacher = declared.inputs()
    places = declared.places()
    places[-1] = 0
    for reduction in ("sum",) if declared.counts_all else ("sum", "mean"):
        found = declared.loss(student, teacher, reduction=reduction, **declared.left_out(places))
        fewer = declared.left_out(places[:-1])
        torch.testing.assert_close(found, declared.loss(student[:-1], teacher[:-1], reduction=reduction, **fewer))


@every()
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_nothing_is_0_with_a_live_graph(declared: Declared, reduction: str):
    student, teacher = (x.float() for x in declared.inputs())
    samples, length = (slice(0, 0),), (slice(None), slice(0, 0))
    for none in (samples, length) if len(declared.kind.places) == 2 and declared.kind.channels else (samples,):
        value, slope = declared.figures(student[none], teacher[none], reduction=reduction)
        assert value.item() == 0 and slope.shape == student[none].shape
    if declared.leaves_out:
        nothing = declared.left_out(torch.zeros_like(declared.places()))
        assert not declared.loss(student, teacher, reduction="none", **nothing).any()
        filled = [[torch.full_like(x, junk) for x in (student, teacher)] for junk in ANYTHING]
        for given in ((student, teacher), *filled[: None if declared.cuts else len(FINITE)]):
            value, slope = declared.figures(*given, reduction=reduction, **nothing)
            assert value.item() == 0
            assert torch.equal(slope, torch.zeros_like(student))


@every()
def test_zeros_and_constants_stay_finite(declared: Declared):
    student, teacher = declared.inputs(torch.float32)
    half = student.clone()
    half[: len(half) // 2 + 1] = 0
    for given in (half, torch.zeros_like(student), torch.full_like(student, 2.0)):
        value, slope = declared.figures(given, teacher)
        assert value.isfinite() and slope.isfinite().all()


# --- gradient and precision


@every()
@pytest.mark.parametrize("along", ["random", pytest.param("every", marks=pytest.mark.slow)])
def test_gradient(declared: Declared, along: str):
    """That of every item is the numerical one, along random directions or each axis; that of the other reductions follows from it."""
    student, teacher = declared.inputs(size=1.0)
    student.requires_grad_(), teacher.requires_grad_(declared.compares and declared.teacher_learns)
    asked = [x for x in (student, teacher) if x.requires_grad]
    for settings in ({}, declared.left_out()) if declared.leaves_out else ({},):
        loss = lambda s, t, reduction="none", k=settings: declared.loss(s, t, reduction=reduction, **k)  # noqa: E731
        assert torch.autograd.gradcheck(loss, (student, teacher), fast_mode=along == "random")
        total = loss(student, teacher).sum()
        slopes = torch.autograd.grad(total, asked, retain_graph=True)
        for reduction in ("sum", "mean"):
            value = loss(student, teacher, reduction)
            for found, slope in zip(torch.autograd.grad(value, asked), slopes, strict=True):
                torch.testing.assert_close(found, slope * (value / total), rtol=1e-9, atol=1e-14)


@every()
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("near", [False, True])
def test_low_precision_computes_in_float32(declared: Declared, dtype: torch.dtype, autocast: bool, near: bool):
    # Up to about 700: their squares do not fit float16, and their exponentials fit nothing. Or near each other, so that
    # products in half precision would be noise.
    student, teacher = declared.inputs(size=6.0 if near else 200.0)
    if near and student.shape == teacher.shape:
        student = teacher + 0.1 * student
    student, teacher, settings = student.to(dtype), teacher.to(dtype), declared.left_out()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        value, slope = declared.figures(student, teacher, **settings)
    assert value.dtype is torch.float32
    exact = declared.loss(student.double(), teacher.double(), **settings)
    torch.testing.assert_close(value.double(), exact, rtol=1e-4 if near else 1e-5, atol=1e-6 if near else 0)
    assert slope.dtype is dtype
    assert slope.isfinite().all()


# --- mistakes


@every(lambda declared: declared.compares)
def test_shapes_must_be_equal_not_only_broadcast(declared: Declared):
    student, teacher = declared.inputs()
    with pytest.raises(DistillError, match=r"^[\w ()]+: student .* must (have the same|lie on one grid)") as error:
        declared.loss(student, teacher[:1])
    if declared.kind is not TOKENS:  # which shows the shapes of their relations
        assert str(tuple(student.shape)) in str(error.value)
        assert str((1, *teacher.shape[1:])) in str(error.value)


@every(lambda declared: declared.takes("temperature"))
@pytest.mark.parametrize("temperature", [0, -1.0, math.nan, True])
def test_temperature_must_be_positive(declared: Declared, temperature: float):
    with pytest.raises(DistillError, match="temperature must be > 0"):
        declared.loss(*declared.inputs(), temperature=temperature)
