"""Features of any size: losses that do not depend on it stay right, and no finite loss has a gradient that is not."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from kdgraft.losses import (
    adversarial,
    align_scale,
    attention_distributions,
    attention_scores,
    bounded_regression,
    channel_wise,
    class_prototypes,
    cosine,
    critic_loss,
    dist_between_classes,
    dist_within_classes,
    focal_attention,
    focal_features,
    hint,
    logit_matching,
    masked_generation,
    memory_relations,
    pairwise_affinity,
    patient,
    pearson,
    pixel_relations,
    reverse_kl,
    soft_targets,
    token_relations,
    universal_logits,
)
from kdgraft.losses.focal_global import GlobalRelation
from kdgraft.losses.masked_generation import FeatureGenerator
from kdgraft.losses.scale import bounded, power_of_two

VALID = (torch.arange(40) % 3 > 0).reshape(2, 5, 4)


def drawn(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


MAPS = (drawn((2, 6, 5, 4), 1), drawn((2, 6, 5, 4), 2))
ROWS = (drawn((7, 6), 3), drawn((7, 6), 4))
LABELS = (torch.arange(40) % 4).reshape(2, 5, 4)

Loss = Callable[[Tensor, Tensor], Tensor]
SCALE_FREE: dict[str, tuple[Loss, tuple[Tensor, Tensor]]] = {
    "pearson": (pearson, MAPS),
    "pearson of weighted positions": (lambda s, t: pearson(s, t, weight=VALID.float()), MAPS),
    "cosine": (cosine, ROWS),
    "patient": (patient, ROWS),
    "affinity": (lambda s, t: pairwise_affinity(s, t, patch=1), MAPS),
    "affinity of patches": (lambda s, t: pairwise_affinity(s, t, patch=2, valid=VALID), MAPS),
    "affinity of largest": (lambda s, t: pairwise_affinity(s, t, patch=2, pool="max"), MAPS),
    "class prototypes": (lambda s, t: class_prototypes(s, t, LABELS), MAPS),
    "pixel relations": (lambda s, t: pixel_relations(s[None], t[None]), ROWS),
    "memory relations": (lambda s, t: memory_relations(s, t, t.flip(0)), ROWS),
}
OTHERS: dict[str, tuple[Loss, tuple[Tensor, Tensor]]] = {
    "hint": (hint, MAPS),
    "channel wise": (lambda s, t: channel_wise(s, t, valid=VALID), MAPS),
    "focal features": (lambda s, t: focal_features(s, t, torch.ones(2, 5, 4)), MAPS),
    "focal attention": (lambda s, t: focal_attention(s, t, valid=VALID.float()), MAPS),
    "global relation": (lambda s, t: GlobalRelation(6)(s, t), MAPS),
    "masked generation": (lambda s, t: masked_generation(s, t, FeatureGenerator(6), VALID), MAPS),
    "aligned": (lambda s, t: hint(align_scale(s, t), t), MAPS),
    "attention scores": (attention_scores, MAPS),
    "attention distributions": (attention_distributions, MAPS),
    "pearson of one item": (lambda s, t: pearson(s[:1], t[:1], dim=-1), ROWS),
    "DIST between classes": (dist_between_classes, ROWS),
    "DIST within classes": (dist_within_classes, ROWS),
    "DIST of one class": (lambda s, t: dist_between_classes(s[:, :1], t[:, :1]), ROWS),
    "DIST within one class": (lambda s, t: dist_within_classes(s[:, :1], t[:, :1]), ROWS),
    "DIST within of one item": (lambda s, t: dist_within_classes(s[:1], t[:1]), ROWS),
    "soft targets": (soft_targets, ROWS),
    "reverse KL": (reverse_kl, ROWS),
    "universal logits": (universal_logits, ROWS),
    "logit matching": (logit_matching, ROWS),
    "token relations": (lambda s, t: token_relations(s[None], t[None], 2), ROWS),
    "bounded regression": (lambda s, t: bounded_regression(s, t, t.flip(0)), ROWS),
    "adversarial": (lambda s, t: adversarial(s[:, 0], "lsgan"), ROWS),
    "critic": (lambda s, t: critic_loss(t[:, 0], s[:, 0], "lsgan"), ROWS),
}


def figure(loss: Loss, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """The value, and the gradient of the student."""
    student = student.clone().requires_grad_()
    value = loss(student, teacher)
    (gradient,) = torch.autograd.grad(value, student, allow_unused=True)
    return value.detach(), torch.zeros_like(student) if gradient is None else gradient


@pytest.mark.parametrize("sizes", [(1e10, 1e10), (1e18, 1e18), (1e30, 1e30), (1e30, 1.0), (1.0, 1e30)], ids=str)
@pytest.mark.parametrize("name", SCALE_FREE)
def test_size_does_not_matter_where_the_loss_is_of_directions(name: str, sizes: tuple[float, float]):
    loss, (student, teacher) = SCALE_FREE[name]
    value, gradient = figure(loss, student, teacher)
    found, slope = figure(loss, student.float() * sizes[0], teacher.float() * sizes[1])
    torch.testing.assert_close(found.double(), value, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(slope.double() * sizes[0], gradient, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("size", [1e10, 1e18, 1e30])
def test_pearson_of_large_features_is_numpys(size: float):
    student, teacher = (x * size for x in ROWS)
    expected = [1 - np.corrcoef(student[:, c], teacher[:, c])[0, 1] for c in range(6)]
    found = pearson(student.float(), teacher.float(), dim=-1, reduction="none")
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4)


@pytest.mark.parametrize("rows", [pytest.param(0, id="none"), pytest.param(1, id="one"), pytest.param(3, id="three")])
def test_pearson_of_few_large_rows_is_finite(rows: int):
    value, gradient = figure(lambda s, t: pearson(s, t, dim=-1), *(x[:rows].float() * 1e18 for x in ROWS))
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
@pytest.mark.parametrize("which", ["both", "student", "teacher", "alike"])
@pytest.mark.parametrize("name", [*SCALE_FREE, *OTHERS])
def test_no_finite_loss_has_a_gradient_that_is_not(name: str, which: str, change: Callable[[Tensor], Tensor]):
    loss, (student, teacher) = {**SCALE_FREE, **OTHERS}[name]
    student, teacher = student.float(), teacher.float()
    if which in ("both", "student", "alike"):
        student = change(student)
    if which in ("both", "teacher"):
        teacher = change(teacher)
    value, gradient = figure(loss, student, student if which == "alike" else teacher)
    # A loss that overflows is dropped for what it is; one that looks sound must not carry NaN into the weights.
    assert gradient.isfinite().all() or not value.isfinite()


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
