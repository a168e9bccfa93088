"""Attention scores and attention distributions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.special import rel_entr, softmax

import golden.text
from kdgraft.losses import attention_distributions, attention_scores, soft_targets
from support.tensors import gradient

TOKENS = golden.text.tokens()
KEYS = TOKENS[:, None, None]  # broadcasts to (B, H, Q, K)
QUERIES = TOKENS[:, None]  # broadcasts to (B, H, Q)
CAUSAL = torch.ones(5, 5, dtype=torch.bool).tril()
both = pytest.mark.parametrize("loss", [attention_scores, attention_distributions])


# --- scores


def test_scores_authors_figures():
    student, teacher = golden.text.scores()
    value = attention_scores(student.requires_grad_(), teacher)
    np.testing.assert_allclose(golden.text.figure(value, student), golden.text.ATTENTION_SCORES, rtol=1e-10)


def test_scores_authors_figures_of_a_padded_batch():
    # Theirs divides by all 2·3·5·5 entries, the padded ones counted as 0.
    student, teacher = golden.text.scores()
    value = attention_scores(student.requires_grad_(), teacher, weight=KEYS, reduction="sum") / student.numel()
    np.testing.assert_allclose(golden.text.figure(value, student), golden.text.ATTENTION_SCORES_PADDED, rtol=1e-10)
    # Ours divides by those that count: 8 of 10 keys.
    expected = golden.text.ATTENTION_SCORES_PADDED[0] / 0.8
    assert attention_scores(student, teacher, weight=KEYS).item() == pytest.approx(expected, rel=1e-10)


def test_scores_by_hand():
    # Differences 1, −2, 3 and 0: 1 + 4 + 9 + 0 over 4; without the last key 1 + 9 over 2.
    student = torch.tensor([[[[1.0, -2.0], [3.0, 0.0]]]])
    teacher = torch.zeros_like(student)
    assert attention_scores(student, teacher).item() == 3.5
    assert attention_scores(student, teacher, weight=torch.tensor([1, 0])).item() == 5
    assert attention_scores(student, teacher, reduction="none").tolist() == [[[[1, 4], [9, 0]]]]


def test_scores_symmetry_and_scale():
    student, teacher = golden.text.scores()
    value = attention_scores(student, teacher)
    torch.testing.assert_close(attention_scores(teacher, student), value)
    torch.testing.assert_close(attention_scores(3 * student, 3 * teacher), 9 * value)


# --- distributions


def test_distributions_figures():
    # Theirs is the mean over sequences of the mean over a sequence's rows: each row weighs 1 / its sequence's tokens.
    student, teacher = golden.text.scores()
    weight = QUERIES / TOKENS.sum(1)[:, None, None]
    value = attention_distributions(student.requires_grad_(), teacher, valid=KEYS, weight=weight)
    np.testing.assert_allclose(golden.text.figure(value, student), golden.text.ATTENTION_DISTRIBUTIONS, rtol=1e-6)


def test_distributions_by_hand():
    # First query: teacher ¾ and ¼ (ln 3 and 0), student ½ and ½: ¾ ln 1.5 − ¼ ln 2 = 0.130812.
    # Second: equal up to a shift.
    student = torch.tensor([[[[0.0, 0.0], [1.0, 3.0]]]])
    teacher = torch.tensor([[[[math.log(3), 0.0], [5.0, 7.0]]]])
    items = attention_distributions(student, teacher, reduction="none")
    assert items.flatten().tolist() == pytest.approx([0.130812, 0], abs=1e-6)
    assert attention_distributions(student, teacher).item() == pytest.approx(0.065406, abs=1e-6)
    value = attention_distributions(student, teacher, weight=torch.tensor([1.0, 0.0]))
    assert value.item() == pytest.approx(0.130812, abs=1e-6)
    # A third key that no query may attend to.
    wider = [torch.cat([x, torch.full((1, 1, 2, 1), 9.0)], -1) for x in (student, teacher)]
    value = attention_distributions(*wider, valid=torch.tensor([1, 1, 0]))
    assert value.item() == pytest.approx(0.065406, abs=1e-6)


def test_distributions_scipy():
    student, teacher = golden.text.scores()
    p, q = (softmax(x.numpy(), axis=-1) for x in (teacher, student))
    items = attention_distributions(student, teacher, reduction="none")
    np.testing.assert_allclose(items, rel_entr(p, q).sum(-1), rtol=1e-10)
    torch.testing.assert_close(items, soft_targets(student, teacher, 1.0, dim=-1, reduction="none"))


def test_distributions_gradient_is_the_difference_of_probabilities():
    student, teacher = golden.text.scores()
    value = attention_distributions(student.requires_grad_(), teacher, valid=CAUSAL, reduction="sum")
    p, q = (x.detach().masked_fill(~CAUSAL, -math.inf).softmax(-1) for x in (teacher, student))
    torch.testing.assert_close(gradient(value, student), q - p)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float64])
def test_distributions_over_valid_keys_are_those_of_the_cropped_rows(dtype: torch.dtype):
    student, teacher = golden.text.scores()
    items = attention_distributions(student, teacher, valid=KEYS.to(dtype), reduction="none")
    for s, t, tokens, row in zip(student, teacher, TOKENS, items, strict=True):
        expected = attention_distributions(s[..., tokens], t[..., tokens], reduction="none")
        torch.testing.assert_close(row, expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_distributions_with_extra_padding(dtype: torch.dtype):
    student, teacher = (x.to(dtype) for x in golden.text.scores())
    expected = attention_distributions(student, teacher, valid=KEYS, weight=QUERIES)
    padded = [torch.nn.functional.pad(x, (0, 3, 0, 3), value=7.0) for x in (student, teacher)]
    tokens = torch.nn.functional.pad(TOKENS, (0, 3))
    value = attention_distributions(*padded, valid=tokens[:, None, None], weight=tokens[:, None])
    torch.testing.assert_close(value, expected)


def test_distributions_of_a_query_without_a_key_are_0():
    student, teacher = golden.text.scores()
    valid = torch.ones(2, 1, 5, 5, dtype=torch.bool)
    valid[0, :, 1] = False
    items = attention_distributions(student.requires_grad_(), teacher.requires_grad_(), valid=valid, reduction="none")
    assert items[0, :, 1].tolist() == [0] * 3
    for scores in (student, teacher):
        (slope,) = torch.autograd.grad(items.sum(), scores, retain_graph=True)
        assert slope.isfinite().all()
        assert not slope[0, :, 1].any()


def test_distributions_extreme_scores_stay_finite():
    # The student is sure of the wrong key: KL = 2·10⁴, log q = −2·10⁴; and next to a masked key.
    for valid in (None, torch.tensor([1, 1, 0])):
        student = torch.tensor([[1e4, -1e4, 0.0]], requires_grad=True)
        value = attention_distributions(student, -student.detach(), valid=valid)
        assert value.item() == 2e4
        assert gradient(value, student).tolist() == [[1, -1, 0]]
    # Beyond what float32 can add up to a masked entry.
    student = torch.tensor([[1e35, -1e35, math.nan]], requires_grad=True)
    value = attention_distributions(student, -student.detach(), valid=torch.tensor([1, 1, 0]))
    assert value.item() == pytest.approx(2e35)
    assert gradient(value, student).tolist() == [[1, -1, 0]]


def test_distributions_rows_may_shift():
    student, teacher = golden.text.scores()
    expected = attention_distributions(student, teacher, valid=CAUSAL)
    for shift in (100, -1e5):
        shifted = attention_distributions(student + shift, teacher - 7, valid=CAUSAL)
        torch.testing.assert_close(shifted, expected)


# --- both


@both
@pytest.mark.parametrize("shape", [(0, 3, 5, 5), (2, 3, 0, 5), (2, 3, 5, 0)])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_nothing_is_0_with_a_live_graph(loss, shape: tuple[int, ...], reduction: str):
    student = torch.zeros(shape, requires_grad=True)
    value = loss(student, torch.zeros(shape), reduction=reduction)
    assert value.item() == 0
    assert gradient(value, student).shape == shape
