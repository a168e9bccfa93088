"""DIST: between classes and within classes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

import golden
import golden.dense
from kdgraft.losses import dist_between_classes, dist_within_classes
from support.tensors import gradient

Loss = Callable[..., Tensor]
both = pytest.mark.parametrize("loss", [dist_between_classes, dist_within_classes])
# Of the 2×5×4 pixels.
WEIGHT = (torch.arange(40) % 3).double().reshape(2, 5, 4)


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


@both
def test_a_weight_is_a_repetition(loss: Loss):
    student, teacher = golden.logits()
    weight = torch.tensor([2.0, 1.0, 0.0, 3.0, 1.0])
    repeated = [x.repeat_interleave(weight.long(), 0) for x in (student, teacher)]
    torch.testing.assert_close(loss(student, teacher, weight=weight), loss(*repeated))
    torch.testing.assert_close(
        loss(student, teacher, weight=weight > 0), loss(student[weight > 0], teacher[weight > 0])
    )


# --- degenerate


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
