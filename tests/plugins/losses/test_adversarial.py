"""Adversarial losses and the gradient penalty."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

import golden.dense
from kdgraft import DistillError
from kdgraft.losses import adversarial, critic_loss, gradient_penalty
from support.tensors import gradient

kinds = pytest.mark.parametrize("kind", ["wgan-gp", "lsgan", "hinge"])


def linear(weight: Tensor) -> Callable[[Tensor], Tensor]:
    """D(x) = w·x."""
    return lambda x: x.flatten(1) @ weight


def smooth(weight: Tensor) -> Callable[[Tensor], Tensor]:
    """D(x) = Σ tanh(W x)."""
    return lambda x: (x.flatten(1) @ weight.T).tanh().sum(1)


# --- critic and student


@pytest.mark.parametrize("kind", golden.dense.CRITIC)
def test_authors_figures(kind: str):
    real, fake = golden.dense.scores()
    for value, (expected, slope) in (
        (critic_loss(real, fake.requires_grad_(), kind), golden.dense.CRITIC[kind]),
        (adversarial(fake, kind), golden.dense.ADVERSARIAL[kind]),
    ):
        assert value.item() == pytest.approx(expected, rel=1e-10)
        assert gradient(value, fake).tolist() == list(slope)


def test_by_hand():
    real, fake = torch.tensor([2.0, 0.5]), torch.tensor([-0.5, 1.0])
    # D(s) − D(t)
    assert critic_loss(real, fake, "wgan-gp", reduction="none").tolist() == [-2.5, 0.5]
    # (2 − 1)² + 0.5² and (0.5 − 1)² + 1²
    assert critic_loss(real, fake, "lsgan", reduction="none").tolist() == [1.25, 1.25]
    # max(0, 1 − 2) + max(0, 1 − 0.5) and max(0, 1 − 0.5) + max(0, 1 + 1)
    assert critic_loss(real, fake, "hinge", reduction="none").tolist() == [0.5, 2.5]
    assert critic_loss(real, fake, "hinge").item() == 1.5
    assert critic_loss(real, fake, "hinge", reduction="sum").item() == 3
    assert adversarial(fake, "wgan-gp", reduction="none").tolist() == [0.5, -1]
    assert adversarial(fake, "lsgan", reduction="none").tolist() == [2.25, 0]  # (−0.5 − 1)², (1 − 1)²
    assert adversarial(fake, "hinge", reduction="none").tolist() == [0.5, -1]
    assert adversarial(fake, "lsgan").item() == 1.125
    assert adversarial(fake, "lsgan", reduction="sum").item() == 2.25


def test_wasserstein_is_the_default():
    real, fake = golden.dense.scores()
    assert critic_loss(real, fake).item() == critic_loss(real, fake, "wgan-gp").item()
    assert adversarial(fake).item() == adversarial(fake, "wgan-gp").item()


def test_what_is_told_apart_costs_nothing():
    for kind, real, fake in (("lsgan", 1.0, 0.0), ("hinge", 1.5, -2.0)):
        scores = torch.full((3,), fake, requires_grad=True)
        value = critic_loss(torch.full((3,), real), scores, kind)
        assert value.item() == 0
        assert gradient(value, scores).tolist() == [0, 0, 0]


@kinds
def test_critic_and_student_pull_apart(kind: str):
    # Undecided at 0, where the critic wants real higher and fake lower, and the student fake higher.
    real, fake = torch.zeros(2, requires_grad=True), torch.zeros(2, requires_grad=True)
    assert (gradient(critic_loss(real, fake, kind), real) < 0).all()
    value = critic_loss(real, fake + 0.1, kind)
    assert (gradient(value, fake) > 0).all()
    assert (gradient(adversarial(fake, kind), fake) < 0).all()


def test_unknown_kind():
    real, fake = golden.dense.scores()
    with pytest.raises(DistillError, match="one of wgan-gp, lsgan, hinge, got 'gan'"):
        critic_loss(real, fake, "gan")
    with pytest.raises(DistillError, match="one of wgan-gp, lsgan, hinge, got 'gan'"):
        adversarial(fake, "gan")


def test_shapes_must_be_equal():
    with pytest.raises(DistillError, match=r"critic_loss: student \(4, 1\) and teacher \(4,\)"):
        critic_loss(torch.ones(4), torch.ones(4, 1))
    with pytest.raises(DistillError, match=r"gradient_penalty: student \(1, 2\) and teacher \(3, 2\)"):
        gradient_penalty(linear(torch.ones(2)), torch.ones(3, 2), torch.ones(1, 2), torch.ones(3))


# --- gradient penalty


def test_authors_penalty():
    real, fake, mix, weight = golden.dense.critic()
    value = 10 * gradient_penalty(smooth(weight.requires_grad_()), real, fake, mix)
    slope = gradient(value, weight)
    figures = [value.item(), slope[0, 0].item(), slope.square().sum().item()]
    np.testing.assert_allclose(figures, golden.dense.GRADIENT_PENALTY_10, rtol=1e-9)


def test_penalty_of_a_linear_critic_by_hand():
    # The gradient is w everywhere: (‖w‖ − 1)² = (5 − 1)², with the slope 2 (‖w‖ − 1) w / ‖w‖ = 8 · (0.6, 0.8).
    weight = torch.tensor([3.0, 4.0], dtype=torch.float64, requires_grad=True)
    real, fake, mix = torch.ones(3, 2).double(), torch.zeros(3, 2).double(), torch.tensor([0.0, 0.5, 1.0]).double()
    items = gradient_penalty(linear(weight), real, fake, mix, reduction="none")
    torch.testing.assert_close(items, torch.full((3,), 16.0).double(), rtol=1e-12, atol=0)
    value = gradient_penalty(linear(weight), real, fake, mix)
    torch.testing.assert_close(
        gradient(value, weight), torch.tensor([4.8, 6.4], dtype=torch.float64), rtol=1e-12, atol=0
    )
    value = gradient_penalty(linear(weight), real, fake, mix, reduction="sum")
    assert value.item() == pytest.approx(48, rel=1e-12)


def test_penalty_of_a_slope_of_1_is_0():
    weight = torch.tensor([0.6, -0.8], dtype=torch.float64, requires_grad=True)
    value = gradient_penalty(linear(weight), torch.ones(1, 2).double(), torch.zeros(1, 2).double(), torch.ones(1))
    assert value.item() == pytest.approx(0, abs=1e-20)
    torch.testing.assert_close(gradient(value, weight), torch.zeros_like(weight), rtol=0, atol=1e-10)


def test_mix_is_the_share_of_real_by_hand():
    # D(x) = ½ ‖x‖² has the gradient x: the penalty tells where x was. Real (3, 0), fake (0, 4).
    real, fake = torch.tensor([[3.0, 0.0]]).expand(3, 2), torch.tensor([[0.0, 4.0]]).expand(3, 2)
    items = gradient_penalty(
        lambda x: x.square().sum(1) / 2, real, fake, torch.tensor([1.0, 0.0, 0.5]), reduction="none"
    )
    # Norms 3, 4 and ‖(1.5, 2)‖ = 2.5: 2², 3², 1.5²
    torch.testing.assert_close(items, torch.tensor([4.0, 9.0, 2.25]))


def test_each_sample_has_its_own_penalty():
    real, fake, mix, weight = golden.dense.critic()
    together = gradient_penalty(smooth(weight), real, fake, mix, reduction="none")
    apart = [gradient_penalty(smooth(weight), real[i : i + 1], fake[i : i + 1], mix[i : i + 1]) for i in range(3)]
    torch.testing.assert_close(together, torch.stack(apart))


def test_only_the_critic_learns_from_the_penalty():
    real, fake, mix, weight = golden.dense.critic()
    for x in (real, fake, weight):
        x.requires_grad_()
    value = gradient_penalty(smooth(weight), real, fake, mix)
    slopes = torch.autograd.grad(value, (real, fake, weight), allow_unused=True)
    assert slopes[:2] == (None, None)
    assert slopes[2].any()


def test_penalty_without_gradients_around():
    real, fake, mix, weight = golden.dense.critic()
    expected = gradient_penalty(smooth(weight), real, fake, mix)
    with torch.no_grad():
        torch.testing.assert_close(gradient_penalty(smooth(weight), real, fake, mix), expected)


def test_gradient_of_the_penalty():
    real, fake, mix, weight = golden.dense.critic()
    for reduction in ("mean", "none"):
        loss = lambda w, how=reduction: gradient_penalty(smooth(w), real, fake, mix, reduction=how)  # noqa: E731
        assert torch.autograd.gradcheck(loss, weight.requires_grad_())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_penalty_of_a_flat_critic(dtype: torch.dtype):
    # Norm 0: (0 − 1)², and no direction in which it would grow.
    real, fake, mix, weight = (x.to(dtype) for x in golden.dense.critic())
    weight = torch.zeros_like(weight).to(torch.promote_types(dtype, torch.float32)).requires_grad_()
    value = gradient_penalty(smooth(weight), real, fake, mix)
    assert value.item() == pytest.approx(1, abs=1e-5)
    assert gradient(value, weight).isfinite().all()
    kinked = gradient_penalty(lambda x: x.flatten(1).relu().sum(1) * weight.sum(), -real.abs(), -fake.abs(), mix)
    assert kinked.item() == pytest.approx(1, abs=1e-5)
    assert torch.equal(gradient(kinked, weight), torch.zeros_like(weight))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_penalty_in_low_precision(dtype: torch.dtype):
    real, fake, mix, weight = golden.dense.critic()
    real, fake, mix = real.to(dtype), fake.to(dtype), mix.to(dtype)
    exact = gradient_penalty(smooth(weight), real.double(), fake.double(), mix.double())
    weight = weight.float().requires_grad_()
    value = gradient_penalty(smooth(weight), real, fake, mix)
    assert value.dtype is torch.float32
    torch.testing.assert_close(value.double(), exact, rtol=1e-4, atol=0)
    with torch.autocast("cpu", torch.bfloat16):
        value = gradient_penalty(smooth(weight), real, fake, mix)  # the critic itself is in bfloat16
    assert value.dtype is torch.float32
    torch.testing.assert_close(value.double(), exact, rtol=5e-2, atol=0)
    assert gradient(value, weight).isfinite().all()


def test_mix_takes_the_samples_type():
    real, fake, mix, weight = golden.dense.critic()
    value = gradient_penalty(smooth(weight.float()), real.float(), fake.float(), mix)
    assert value.dtype is torch.float32
    torch.testing.assert_close(value.double(), gradient_penalty(smooth(weight), real, fake, mix), rtol=1e-5, atol=0)


def test_penalty_of_an_empty_batch_is_0_with_a_live_graph():
    weight = golden.dense.critic()[3].requires_grad_()
    value = gradient_penalty(smooth(weight), torch.zeros(0, 2, 2, 2).double(), torch.zeros(0, 2, 2, 2), torch.zeros(0))
    assert value.item() == 0
    assert torch.equal(gradient(value, weight), torch.zeros_like(weight))
