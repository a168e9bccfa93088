"""DIST: between classes and within classes."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

import golden
import golden.dense
from kdgraft import DistillError
from kdgraft.losses import dist_between_classes, dist_within_classes

Loss = Callable[..., Tensor]
both = pytest.mark.parametrize("loss", [dist_between_classes, dist_within_classes])
# Of the 2×5×4 pixels.
WEIGHT = (torch.arange(40) % 3).double().reshape(2, 5, 4)


def gradient(value: Tensor, tensor: Tensor) -> Tensor:
    return torch.autograd.grad(value, tensor)[0]


def log(*rows: list[float]) -> Tensor:
    """Logits whose softmax are these probabilities."""
    return torch.tensor(rows, dtype=torch.float64).log()


# --- figures


@pytest.mark.parametrize(
    ("loss", "expected"),
    [(dist_between_classes, golden.dense.DIST_BETWEEN), (dist_within_classes, golden.dense.DIST_WITHIN)],
)
def test_authors_figures(loss: Loss, expected: tuple[float, ...]):
    student, teacher = golden.dense.class_maps()
    value = loss(student.requires_grad_(), teacher, dim=1)
    slope = gradient(value, student)
    figures = [value.item(), slope[0, 0, 0, 0].item(), slope.square().sum().item()]
    np.testing.assert_allclose(figures, expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("loss", "expected"),
    [(dist_between_classes, golden.dense.DIST_BETWEEN_ROWS), (dist_within_classes, golden.dense.DIST_WITHIN_ROWS)],
)
def test_authors_figures_on_rows(loss: Loss, expected: tuple[float, ...]):
    student, teacher = golden.logits()
    value = loss(student.requires_grad_(), teacher)
    slope = gradient(value, student)
    figures = [value.item(), slope[0, 0].item(), slope.square().sum().item()]
    np.testing.assert_allclose(figures, expected, rtol=1e-6)


def test_between_classes_by_hand():
    # Student's (½, 0.3, 0.2) and teacher's (0.2, 0.3, ½), less ⅓, in 30ths: (5, −1, −4) and (−4, −1, 5).
    # (−20 + 1 − 20) / (25 + 1 + 16) = −39 / 42
    value = dist_between_classes(log([0.5, 0.3, 0.2]), log([0.2, 0.3, 0.5]))
    assert value.item() == pytest.approx(1 + 39 / 42)


def test_within_classes_by_hand():
    # Class 0 over three items: (0.1, 0.2, 0.6) and (0.1, 0.5, 0.3), less their means: (−0.2, −0.1, 0.3), (−0.2, 0.2, 0).
    # (0.04 − 0.02) / √(0.14 · 0.08) = 0.188982. Class 1 mirrors it.
    student, teacher = log([0.1, 0.9], [0.2, 0.8], [0.6, 0.4]), log([0.1, 0.9], [0.5, 0.5], [0.3, 0.7])
    items = dist_within_classes(student, teacher, reduction="none")
    assert items.tolist() == [pytest.approx(1 - 0.188982, abs=1e-6)] * 2


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_numpy(temperature: float):
    student, teacher = golden.logits()
    p, q = ((x / temperature).softmax(1).numpy() for x in (student, teacher))
    for loss, rows in (
        (dist_between_classes, zip(p, q, strict=True)),
        (dist_within_classes, zip(p.T, q.T, strict=True)),
    ):
        expected = [temperature**2 * (1 - np.corrcoef(a, b)[0, 1]) for a, b in rows]
        np.testing.assert_allclose(loss(student, teacher, temperature, reduction="none"), expected, rtol=1e-10)


# --- properties


@both
def test_equal_logits_cost_nothing(loss: Loss):
    student, _ = golden.logits()
    value = loss(student.requires_grad_(), student.detach().clone())
    torch.testing.assert_close(value, torch.zeros_like(value), rtol=0, atol=1e-14)
    torch.testing.assert_close(gradient(value, student), torch.zeros_like(student), rtol=0, atol=1e-13)


@both
def test_probabilities_may_change_linearly(loss: Loss):
    student, teacher = golden.logits()
    # 0.3 p + 0.07 sums to 1 over the ten classes, too.
    flatter = (0.3 * teacher.softmax(1) + 0.07).log()
    torch.testing.assert_close(loss(student, flatter), loss(student, teacher))
    value = loss(flatter, teacher)
    torch.testing.assert_close(value, torch.zeros_like(value), rtol=0, atol=1e-14)


@both
def test_anticorrelated_probabilities_cost_2(loss: Loss):
    student, _ = golden.logits()
    # (1 − p) / 9 sums to 1 over the ten classes.
    value = loss(student, ((1 - student.softmax(1)) / 9).log())
    assert value.item() == pytest.approx(2)


@both
def test_symmetric_and_logits_may_shift(loss: Loss):
    student, teacher = golden.logits()
    expected = loss(student, teacher)
    torch.testing.assert_close(loss(teacher, student), expected)
    shift = golden.wave((5, 1), 1.3, 0.2, 30.0)
    torch.testing.assert_close(loss(student + shift, teacher - 2 * shift), expected)


@both
def test_temperature_divides_the_logits_and_multiplies_by_its_square(loss: Loss):
    student, teacher = golden.logits()
    torch.testing.assert_close(loss(3 * student, 3 * teacher, 3.0), 9 * loss(student, teacher))


@both
def test_maps_are_rows_of_pixels(loss: Loss):
    maps = golden.dense.class_maps()
    rows = [x.permute(0, 2, 3, 1).reshape(-1, 6) for x in maps]
    torch.testing.assert_close(loss(*maps, dim=1), loss(*rows))
    torch.testing.assert_close(loss(*maps, dim=1, weight=WEIGHT), loss(*rows, weight=WEIGHT.flatten()))


def test_items():
    maps = golden.dense.class_maps()
    between = dist_between_classes(*maps, dim=1, reduction="none")
    within = dist_within_classes(*maps, dim=1, reduction="none")
    assert (between.shape, within.shape) == ((2, 5, 4), (6,))
    torch.testing.assert_close(dist_between_classes(*maps, dim=1), between.mean())
    torch.testing.assert_close(dist_within_classes(*maps, dim=1), within.mean())
    weighted = dist_between_classes(*maps, dim=1, weight=WEIGHT, reduction="none")
    torch.testing.assert_close(weighted, between * WEIGHT)


@both
def test_a_weight_is_a_repetition(loss: Loss):
    student, teacher = golden.logits()
    weight = torch.tensor([2.0, 1.0, 0.0, 3.0, 1.0])
    repeated = [x.repeat_interleave(weight.long(), 0) for x in (student, teacher)]
    torch.testing.assert_close(loss(student, teacher, weight=weight), loss(*repeated))
    torch.testing.assert_close(
        loss(student, teacher, weight=weight > 0), loss(student[weight > 0], teacher[weight > 0])
    )


@both
@pytest.mark.parametrize("junk", [1e30, math.inf, -math.inf, math.nan])
def test_what_stands_at_weight_0_does_not_matter(loss: Loss, junk: float):
    student, teacher = golden.dense.class_maps()
    expected = loss(student.requires_grad_(), teacher, dim=1, weight=WEIGHT)
    slope = gradient(expected, student)
    outside = (WEIGHT == 0)[:, None]
    student, teacher = (x.detach().masked_fill(outside, junk) for x in (student, teacher))
    value = loss(student.requires_grad_(), teacher, dim=1, weight=WEIGHT)
    torch.testing.assert_close(value, expected, rtol=0, atol=0)
    torch.testing.assert_close(gradient(value, student), slope, rtol=0, atol=0)
    assert not slope.masked_select(outside).any()


def test_within_classes_correlates_over_all_processes():
    student, teacher = golden.dense.class_maps()
    student.requires_grad_()
    expected = dist_within_classes(student, teacher, dim=1, weight=WEIGHT)
    parts, values, barrier = [None, None], [None, None], threading.Barrier(2, timeout=30)

    def process(rank: int) -> None:
        def total(part: Tensor) -> Tensor:
            parts[rank] = part
            barrier.wait()
            summed = parts[0] + parts[1]
            barrier.wait()
            return summed

        own = slice(rank, rank + 1)
        values[rank] = dist_within_classes(student[own], teacher[own], dim=1, weight=WEIGHT[own], total=total)

    threads = [threading.Thread(target=process, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for value in values:
        torch.testing.assert_close(value, expected)
        torch.testing.assert_close(
            torch.autograd.grad(value, student, retain_graph=True)[0],
            torch.autograd.grad(expected, student, retain_graph=True)[0],
        )


# --- degenerate


@both
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_all_weights_0_is_0_with_a_live_graph(loss: Loss, reduction: str):
    student = torch.full((2, 6, 5, 4), math.nan, requires_grad=True)
    value = loss(student, torch.ones(2, 6, 5, 4), dim=1, weight=torch.zeros(2, 5, 4), reduction=reduction)
    assert value.item() == 0
    assert torch.equal(gradient(value, student), torch.zeros_like(student))


@both
def test_no_item_is_0_with_a_live_graph(loss: Loss):
    student = torch.zeros(0, 6, requires_grad=True)
    value = loss(student, torch.zeros(0, 6))
    assert value.item() == 0
    assert gradient(value, student).shape == (0, 6)


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_constant_probabilities_correlate_with_nothing(loss: Loss, dtype: torch.dtype):
    _, teacher = golden.logits()
    student = torch.zeros(5, 10, dtype=dtype, requires_grad=True)
    for s, t in ((student, teacher.to(dtype)), (student, torch.zeros(5, 10, dtype=dtype))):
        value = loss(s, t)
        assert value.item() == 1
        assert torch.equal(gradient(value, s), torch.zeros_like(s))
    student = teacher.to(dtype).requires_grad_()
    value = loss(student, torch.zeros(5, 10, dtype=dtype))
    assert value.item() == 1
    assert torch.equal(gradient(value, student), torch.zeros_like(student))


def test_a_single_item_has_no_correlation_within_classes():
    student, teacher = golden.logits()
    value = dist_within_classes(student[:1].requires_grad_(), teacher[:1])
    assert value.item() == 1
    student = student[:1].detach().requires_grad_()
    only = torch.tensor([0.7])
    assert torch.equal(gradient(dist_within_classes(student, teacher[:1], weight=only), student), 0 * student)


def test_a_class_that_never_occurs_stays_finite():
    student, teacher = golden.logits()
    student[:, 3], teacher[:, 3] = -1e4, -1e4
    for loss in (dist_between_classes, dist_within_classes):
        value = loss(student.requires_grad_(), teacher)
        assert 0 < value < 2
        assert gradient(value, student).isfinite().all()
    # Its probability is constantly 0.
    assert dist_within_classes(student, teacher, reduction="none")[3].item() == 1
    # As good as 0 (about 10⁻²⁰, and the authors add 10⁻⁸): the same, though it varies.
    student, teacher = golden.logits()
    student[:, 3] -= 40
    teacher[:, 3] -= 40
    assert dist_within_classes(student, teacher, reduction="none")[3].item() == 1


# --- gradient, precision, errors


@both
@pytest.mark.parametrize("weight", [None, WEIGHT[:, :2, :2]])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradient(loss: Loss, weight: Tensor | None, reduction: str):
    student, teacher = (x[:, :3, :2, :2].contiguous() for x in golden.dense.class_maps())
    function = lambda s, t: loss(s, t, 2.0, dim=1, weight=weight, reduction=reduction)  # noqa: E731
    assert torch.autograd.gradcheck(function, (student.requires_grad_(), teacher.requires_grad_()))


@both
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("autocast", [False, True])
def test_low_precision(loss: Loss, dtype: torch.dtype, autocast: bool):
    student, teacher = (x.to(dtype) for x in golden.dense.class_maps())
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        value = loss(student.requires_grad_(), teacher, dim=1, weight=WEIGHT)
    assert value.dtype is torch.float32
    exact = loss(student.double(), teacher.double(), dim=1, weight=WEIGHT)
    torch.testing.assert_close(value.double(), exact, rtol=1e-5, atol=0)
    slope = gradient(value, student)
    assert slope.dtype is dtype
    assert slope.isfinite().all()


@both
def test_shapes_must_be_equal(loss: Loss):
    student, teacher = golden.logits()
    with pytest.raises(DistillError, match=r"dist: student \(5, 10\) and teacher \(1, 10\)"):
        loss(student, teacher[:1])


@both
@pytest.mark.parametrize("temperature", [0, -1.0, math.nan, True])
def test_temperature_must_be_positive(loss: Loss, temperature: float):
    with pytest.raises(DistillError, match="temperature must be > 0"):
        loss(*golden.logits(), temperature)
