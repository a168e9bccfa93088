"""Features of any size: losses that do not depend on it stay right, and no finite loss has a gradient that is not."""

from __future__ import annotations

from collections.abc import Callable
from math import inf, nan

import numpy as np
import pytest
import torch
from torch import Tensor

from kdgraft.losses import align_scale, dist_between_classes, dist_within_classes, hint, pearson
from kdgraft.losses.scale import bounded, power_of_two
from support.losses import BY_NAME, MAPS, SAMPLES, Declared

ROWS = BY_NAME["cosine"].inputs(size=1.0)
AT_THE_EDGE = {
    "pearson of one item": Declared(lambda s, t: pearson(s[:1], t[:1], dim=-1), SAMPLES, ()),
    "DIST of one class": Declared(lambda s, t: dist_between_classes(s[:, :1], t[:, :1]), SAMPLES, ()),
    "DIST within one class": Declared(lambda s, t: dist_within_classes(s[:, :1], t[:, :1]), SAMPLES, ()),
    "DIST within of one item": Declared(lambda s, t: dist_within_classes(s[:1], t[:1]), SAMPLES, ()),
    "aligned": Declared(lambda s, t: hint(align_scale(s, t), t), MAPS, ()),
}


def one_of(tensor: Tensor, entry: float) -> Tensor:
    """The tensor with one other entry."""
    changed = tensor.clone()
    changed.view(-1)[0] = entry
    return changed


def assert_told(declared: Declared, change: Callable[[Tensor], Tensor], **settings: Tensor) -> None:
    """A loss that overflows is dropped for what it is; one that looks sound must not carry NaN into the weights."""
    student, teacher = declared.inputs(torch.float32, size=1.0)
    odd, other = change(student), change(teacher)
    for pair in ((odd, teacher), (student, other), (odd, other), (odd, odd), (student * 0, other), (odd, teacher * 0)):
        value, gradient = declared.figures(*pair, **settings)
        assert gradient.isfinite().all() or not value.isfinite()


@pytest.mark.parametrize("size", [1e10, 1e18, 1e30])
def test_pearson_of_large_features_is_numpys(size: float):
    student, teacher = (x * size for x in ROWS)
    expected = [1 - np.corrcoef(student[:, c], teacher[:, c])[0, 1] for c in range(7)]
    found = pearson(student.float(), teacher.float(), dim=-1, reduction="none")
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4)


@pytest.mark.parametrize("rows", [pytest.param(0, id="none"), pytest.param(1, id="one"), pytest.param(3, id="three")])
def test_pearson_of_few_large_rows_is_finite(rows: int):
    rows_of = Declared(lambda s, t: pearson(s, t, dim=-1), SAMPLES, ())
    value, gradient = rows_of.figures(*(x[:rows].float() * 1e18 for x in ROWS))
    assert value.isfinite()
    assert gradient.isfinite().all()
    assert (rows == 3) == bool(gradient.any())


@pytest.mark.parametrize(
    "change",
    [
        *(pytest.param(lambda x, size=size: x * size, id=f"{size:g}") for size in (1e18, 1e19, 1e30, 1e37, 1e-25)),
        pytest.param(lambda x: x * 0, id="zeros"),
        pytest.param(lambda x: x * 0 + 3.3e18, id="constant"),
        pytest.param(lambda x: x + 1e18, id="offset"),
    ],
)
@pytest.mark.parametrize("name", [*BY_NAME, *AT_THE_EDGE])
def test_no_finite_loss_has_a_gradient_that_is_not(name: str, change: Callable[[Tensor], Tensor]):
    declared = {**BY_NAME, **AT_THE_EDGE}[name]
    for settings in ({}, declared.left_out()):
        assert_told(declared, change, **settings)


@pytest.mark.parametrize("entry", [3e38, -inf, nan])
@pytest.mark.parametrize("name", [*BY_NAME, *AT_THE_EDGE])
def test_one_entry_is_enough(name: str, entry: float):
    assert_told({**BY_NAME, **AT_THE_EDGE}[name], lambda x: one_of(x, entry))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dividing_by_a_power_of_two_rounds_nothing(dtype: torch.dtype):
    powers = torch.tensor([2.0**k for k in range(-126, 128)], dtype=dtype)
    assert torch.equal(power_of_two(powers), powers)
    assert torch.equal(power_of_two(powers * 1.99), powers)
    assert power_of_two(torch.tensor([0, torch.inf, torch.nan], dtype=dtype)).tolist() == [1, 1, 1]
    vectors = torch.tensor([[1e30, -3e29], [0.5, 0.1], [torch.inf, 1.0]], dtype=dtype)
    found = bounded(vectors, 1)
    assert torch.equal(found[1:], vectors[1:])
    assert torch.equal(found[0] * 2.0**99, vectors[0])  # 2^99 = 6.3e29
    assert 1 <= found[0, 0] < 2
