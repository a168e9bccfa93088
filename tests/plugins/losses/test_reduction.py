"""What every loss shares: reductions, precision, degenerate inputs, wrong shapes. A new loss joins ``CASES``."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kdgraft import LOSSES, DistillError
from kdgraft.losses import (
    Ratio,
    attention_distributions,
    attention_scores,
    binary_soft_targets,
    cosine,
    focused_entropy,
    generalized_jsd,
    hint,
    localization,
    logit_matching,
    mixed_targets,
    patient,
    reduce_loss,
    reverse_kl,
    skewed_kl,
    soft_targets,
    universal_logits,
    upcast,
    weighted_binary_soft_targets,
    weighted_ratio,
    weighted_soft_targets,
)

Loss = Callable[..., Tensor]

# name -> (loss, shape of its inputs, shape of its items)
CASES: dict[str, tuple[Loss, tuple[int, ...], tuple[int, ...]]] = {
    "soft_targets": (soft_targets, (5, 7), (5,)),
    "binary_soft_targets": (binary_soft_targets, (5, 7), (5, 7)),
    "logit_matching": (logit_matching, (5, 7), (5,)),
    "hint": (hint, (2, 3, 4, 5), (2, 4, 5)),
    "localization": (localization, (5, 4, 9), (5, 4)),
    "reverse_kl": (reverse_kl, (5, 7), (5,)),
    "generalized_jsd": (generalized_jsd, (5, 7), (5,)),
    "skewed_kl": (skewed_kl, (5, 7), (5,)),
    "universal_logits": (universal_logits, (5, 7), (5,)),
    "attention_scores": (attention_scores, (2, 3, 4, 5), (2, 3, 4, 5)),
    "attention_distributions": (attention_distributions, (2, 3, 4, 5), (2, 3, 4)),
    "cosine": (cosine, (5, 7), (5,)),
    "patient": (patient, (5, 7), (5,)),
    "focused_entropy": (focused_entropy, (5, 7), (5, 7)),
    "weighted_soft_targets": (weighted_soft_targets, (5, 7), (5,)),
    "weighted_binary_soft_targets": (weighted_binary_soft_targets, (5, 7), (5, 7)),
}
# Of other arguments than (student, teacher, weight); each has these tests in its own file.
ELSEWHERE = {
    "adversarial",
    "bounded_regression",
    "channel_wise",
    "class_prototypes",
    "critic_loss",
    "dist_between_classes",
    "dist_within_classes",
    "focal_attention",
    "focal_features",
    "masked_generation",
    "memory_relations",
    "pairwise_affinity",
    "pearson",
    "pixel_relations",
    "token_relations",
}
every_loss = pytest.mark.parametrize("name", CASES)


def inputs(shape: tuple[int, ...], dtype: torch.dtype = torch.float64, scale: float = 3.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(sum(shape))
    student, teacher = (scale * torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    return student.to(dtype), teacher.to(dtype)


def test_every_registered_loss_is_tested_here():
    own = {name for name in LOSSES if LOSSES.get(name).__module__.startswith("kdgraft.losses")}
    assert own == set(CASES) | ELSEWHERE


# --- the reductions themselves


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


# --- what every loss does with them

# Their least value is the teacher's entropy, and their weights move its place.
CROSS_ENTROPIES = ("weighted_soft_targets", "weighted_binary_soft_targets")


@pytest.mark.parametrize("name", [name for name in CASES if name not in CROSS_ENTROPIES])
def test_identical_inputs_cost_nothing(name: str):
    loss, shape, _ = CASES[name]
    student, _ = inputs(shape)
    student.requires_grad_()
    value = loss(student, student.detach().clone())
    (gradient,) = torch.autograd.grad(value, student)
    torch.testing.assert_close(value, torch.zeros_like(value), rtol=0, atol=1e-14)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-14)


@every_loss
def test_positive_and_finite_for_different_inputs(name: str):
    loss, shape, items = CASES[name]
    values = loss(*inputs(shape), reduction="none")
    assert values.shape == items
    assert (values > 0).all()


@every_loss
def test_a_weight_of_2_is_a_repetition(name: str):
    loss, shape, items = CASES[name]
    student, teacher = inputs(shape)
    weight = torch.ones(items, dtype=torch.float64)
    weight[0] = 2
    twice = [torch.cat([tensor[:1], tensor]) for tensor in (student, teacher)]
    torch.testing.assert_close(loss(student, teacher, weight=weight), loss(*twice))


@every_loss
def test_reductions_agree(name: str):
    loss, shape, items = CASES[name]
    student, teacher = inputs(shape)
    weight = torch.linspace(0, 2, steps=torch.Size(items).numel(), dtype=torch.float64).reshape(items)
    plain = loss(student, teacher, reduction="none")
    torch.testing.assert_close(loss(student, teacher), plain.sum() / plain.numel())
    torch.testing.assert_close(loss(student, teacher, weight=weight, reduction="none"), plain * weight)
    torch.testing.assert_close(loss(student, teacher, weight=weight, reduction="sum"), (plain * weight).sum())
    torch.testing.assert_close(loss(student, teacher, weight=weight), (plain * weight).sum() / weight.sum())


@every_loss
def test_nothing_to_learn_from_is_0_with_a_live_graph(name: str):
    loss, shape, items = CASES[name]
    empty = torch.zeros((0, *shape[1:]), requires_grad=True)
    student = inputs(shape, torch.float32)[0].requires_grad_()
    for tensor, value in (
        (empty, loss(empty, empty.detach())),
        (empty, loss(empty, empty.detach(), reduction="sum")),
        (student, loss(student, inputs(shape, torch.float32)[1], weight=torch.zeros(items))),
    ):
        assert value.item() == 0
        (gradient,) = torch.autograd.grad(value, tensor)
        assert torch.equal(gradient, torch.zeros_like(tensor))


@every_loss
def test_infinite_items_at_weight_0_are_ignored(name: str):
    loss, shape, items = CASES[name]
    student, teacher = inputs(shape)
    weight = torch.ones(items, dtype=torch.float64)
    weight[-1] = 0
    expected = loss(student[:-1], teacher[:-1])
    student[-1] = torch.inf
    torch.testing.assert_close(loss(student, teacher, weight=weight), expected)


@every_loss
def test_gradient(name: str):
    loss, shape, items = CASES[name]
    student, teacher = inputs(shape)
    weight = torch.linspace(0, 2, steps=torch.Size(items).numel(), dtype=torch.float64).reshape(items)
    student.requires_grad_()
    for settings in ({}, {"weight": weight}, {"reduction": "none"}, {"weight": weight, "reduction": "sum"}):
        assert torch.autograd.gradcheck(lambda s, k=settings: loss(s, teacher, **k), student)


@every_loss
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_inputs_compute_in_float32(name: str, dtype: torch.dtype):
    loss, shape, _ = CASES[name]
    # Up to about 700: their squares do not fit float16, and their exponentials fit nothing.
    student, teacher = inputs(shape, dtype, scale=200.0)
    value = loss(student.requires_grad_(), teacher)
    exact = loss(student.double(), teacher.double())
    assert value.dtype is torch.float32
    torch.testing.assert_close(value.double(), exact, rtol=1e-5, atol=0)
    (gradient,) = torch.autograd.grad(value, student)
    assert gradient.dtype is dtype
    assert gradient.isfinite().all()


@every_loss
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_under_autocast(name: str, dtype: torch.dtype):
    loss, shape, _ = CASES[name]
    student, teacher = inputs(shape, dtype)
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(student, teacher)
    assert value.dtype is torch.float32
    torch.testing.assert_close(value.double(), loss(student.double(), teacher.double()), rtol=1e-5, atol=0)


@every_loss
def test_shapes_must_be_equal_not_only_broadcast(name: str):
    loss, shape, _ = CASES[name]
    student, teacher = inputs(shape)
    with pytest.raises(DistillError) as error:
        loss(student, teacher[:1])
    assert str(tuple(shape)) in str(error.value)
    assert str((1, *shape[1:])) in str(error.value)


@pytest.mark.parametrize("name", ["soft_targets", "binary_soft_targets", "localization"])
@pytest.mark.parametrize("temperature", [0, -1.0, float("nan")])
def test_temperature_must_be_positive(name: str, temperature: float):
    loss, shape, _ = CASES[name]
    with pytest.raises(DistillError, match="temperature must be > 0"):
        loss(*inputs(shape), temperature)


def test_mixed_targets_wants_equal_shapes_too():
    with pytest.raises(DistillError, match=r"student \(2, 3\) and teacher \(2, 4\)"):
        mixed_targets(torch.zeros(2, 3), torch.zeros(2, 4), torch.zeros(2, dtype=torch.long))
