"""MiniLLM: figures of the authors' code, and the gradient of the reverse KL of whole texts, summed over all texts there are."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

import golden.text
from kdgraft import DistillError
from kdgraft.losses import minillm, reverse_kl
from kdgraft.losses.minillm import future_reward, importance, policy_loss

MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]], dtype=torch.bool)
TEXTS = MASK.nonzero()[:, 0]


def written():
    """The authors' inputs: logits (7, 9) of both models, with gradient for the student's, and the tokens that were drawn."""
    student, teacher = (x[MASK].float() for x in golden.text.logits())
    return student.requires_grad_(), teacher, golden.text.drawn()[MASK]


def logs(logits, tokens):
    return logits.log_softmax(-1).gather(-1, tokens[:, None])[:, 0]


def figures(value, student):
    (slope,) = torch.autograd.grad(value, student, retain_graph=True)
    return value.item(), slope[0, 0].item(), slope.square().sum().item()


def test_weights_and_rewards_of_the_authors():
    student, teacher, tokens = written()
    s, t = (logs(x.detach(), tokens) for x in (student, teacher))
    assert importance(s, t, 0.2).tolist() == pytest.approx(golden.text.MINILLM_WEIGHTS, rel=1e-5)
    assert future_reward(t - s, TEXTS).tolist() == pytest.approx(golden.text.MINILLM_REWARDS, rel=1e-5, abs=1e-6)


def test_both_parts_of_the_authors():
    student, teacher, tokens = written()
    weight, reward = torch.tensor(golden.text.MINILLM_WEIGHTS), torch.tensor(golden.text.MINILLM_REWARDS)
    policy = policy_loss(logs(student, tokens), reward, weight, 0.2).mean()
    assert figures(policy, student) == pytest.approx(golden.text.MINILLM_POLICY, rel=1e-5)
    # The authors' single step has no weight.
    assert figures(reverse_kl(student, teacher), student) == pytest.approx(golden.text.MINILLM_SINGLE, rel=1e-5)
    whole = minillm(student, teacher, tokens, TEXTS, 0.2).mean()
    expected = policy + (weight * reverse_kl(student, teacher, reduction="none")).mean()
    assert figures(whole, student) == pytest.approx(figures(expected, student), rel=1e-5)


def policies():
    """Logits of student and teacher over 3 words after each of the texts of 0, 1 and 2 words."""
    generator = torch.Generator().manual_seed(3)
    student, teacher = (torch.randn(13, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    return student.requires_grad_(), teacher


def steps(text):
    """The rows of the policies from which the words of a text are drawn."""
    return torch.tensor([(0, 1, 4)[n] + sum(3 ** (n - 1 - i) * text[i] for i in range(n)) for n in range(len(text))])


def expected_gradient(length, mix, **settings):
    """The gradient of the loss, summed over all texts times the probability with which each is drawn."""
    student, teacher = policies()
    total = torch.zeros_like(student)
    for text in itertools.product(range(3), repeat=length):
        rows, words = steps(text), torch.tensor(text)
        q, p = (logs(x[rows], words).exp() for x in (student.detach(), teacher))
        loss = minillm(student[rows], teacher[rows], words, torch.zeros_like(words), mix, clip=None, **settings).sum()
        total += ((1 - mix) * q + mix * p).prod() * torch.autograd.grad(loss, student)[0]
    return total


def gradient_of_whole_texts(length):
    """The gradient of KL(q ‖ p) of whole texts."""
    student, teacher = policies()
    divergence = torch.zeros((), dtype=torch.float64)
    for text in itertools.product(range(3), repeat=length):
        q, p = (logs(x[steps(text)], torch.tensor(text)).sum() for x in (student, teacher))
        divergence = divergence + q.exp() * (q - p)
    return torch.autograd.grad(divergence, student)[0]


@pytest.mark.parametrize("length", [1, 2, 3])
def test_the_mean_gradient_is_that_of_the_reverse_kl_of_whole_texts(length):
    torch.testing.assert_close(expected_gradient(length, 0.0, length_norm=False), gradient_of_whole_texts(length))


def test_weights_undo_the_mixture():
    # Of one word the weight is exact; of longer texts it stands for the product over the words before.
    torch.testing.assert_close(expected_gradient(1, 0.4), gradient_of_whole_texts(1))


def test_without_what_follows_it_is_another_gradient():
    single = expected_gradient(3, 0.0, long_term=False)
    assert (single - gradient_of_whole_texts(3)).abs().max() > 1e-3


def test_rewards_by_hand():
    ratios, texts = torch.tensor([9.0, 1.0, 3.0, 5.0, 7.0, 2.0]), torch.tensor([0, 0, 0, 2, 2, 3])
    assert future_reward(ratios, texts).tolist() == [2.0, 3.0, 0.0, 7.0, 0.0, 0.0]
    assert future_reward(ratios, texts, length_norm=False).tolist() == [4.0, 3.0, 0.0, 7.0, 0.0, 0.0]
    assert future_reward(ratios[:0], texts[:0]).shape == (0,)


def test_weights_by_hand_and_at_the_edges():
    q, p = torch.tensor([0.5, 0.1, 0.5]).log(), torch.tensor([0.5, 0.9, 0.1]).log()
    expected = [1.0, 0.1 / (0.25 * 0.9 + 0.75 * 0.1), 0.5 / (0.25 * 0.1 + 0.75 * 0.5)]
    assert importance(q, p, 0.25).tolist() == pytest.approx(expected)
    assert importance(q, p, 0.0).tolist() == [1, 1, 1]
    never = torch.tensor([-math.inf])
    assert importance(never, p[:1], 0.25).item() == 0
    assert importance(q[:1], never, 0.25).item() == pytest.approx(1 / 0.75)


def test_clipping_takes_the_pessimistic_side():
    weight, reward = torch.tensor([1.25, 0.5, 1.25, 0.5]), torch.tensor([1.0, 1.0, -1.0, -1.0])
    log = torch.zeros(4, requires_grad=True)
    value = policy_loss(log, reward, weight, 0.2)
    assert value.tolist() == pytest.approx([-1.2, -0.5, 1.25, 0.8])
    assert torch.autograd.grad(value.sum(), log)[0].tolist() == pytest.approx([0.0, -0.5, 1.25, 0.0])
    assert policy_loss(log, reward, weight, None).tolist() == pytest.approx([-1.25, -0.5, 1.25, 0.5])


def test_equal_models_have_nothing_to_learn():
    student, _, tokens = written()
    items = minillm(student, student.detach(), tokens, TEXTS, 0.2)
    torch.testing.assert_close(items, torch.zeros(7), atol=1e-6, rtol=0)
    torch.testing.assert_close(torch.autograd.grad(items.sum(), student)[0], torch.zeros(7, 9), atol=1e-6, rtol=0)


def test_nothing_impossible_and_half_precision_are_finite():
    student, teacher, tokens = written()
    nothing = minillm(student[:0], teacher[:0], tokens[:0], TEXTS[:0], 0.2)
    assert nothing.shape == (0,) and nothing.sum().requires_grad
    teacher[:, 0] = student.data[:, 1] = -math.inf
    items = minillm(student, teacher, tokens, TEXTS, 0.2)
    assert items.isfinite().all() and torch.autograd.grad(items.sum(), student)[0].isfinite().all()
    student, teacher, tokens = written()
    half = minillm(student.bfloat16(), teacher.bfloat16(), tokens, TEXTS, 0.2)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, minillm(student, teacher, tokens, TEXTS, 0.2), rtol=0.1, atol=0.1)


def test_settings_are_checked():
    student, teacher, tokens = written()
    with pytest.raises(DistillError, match="mix must be below 1"):
        minillm(student, teacher, tokens, TEXTS, 1.0)
    with pytest.raises(DistillError, match="clip must be a number > 0, got 0"):
        minillm(student, teacher, tokens, TEXTS, clip=0)
    with pytest.raises(DistillError, match=r"tokens and texts must be \(7,\), got \(7,\) and \(1,\)"):
        minillm(student, teacher, tokens, TEXTS[:1])
