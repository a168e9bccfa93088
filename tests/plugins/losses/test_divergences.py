"""Divergences between next-token distributions."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
import torch
from scipy.special import rel_entr, softmax

import golden.text
from kdgraft import DistillError
from kdgraft.losses import generalized_jsd, reverse_kl, skewed_kl, soft_targets
from support.tensors import gradient

EVERY = {
    "reverse_kl": reverse_kl,
    "jsd": generalized_jsd,
    "jsd at 0": partial(generalized_jsd, beta=0),
    "jsd at 1": partial(generalized_jsd, beta=1),
    "skewed_kl": skewed_kl,
    "reverse skewed_kl": partial(skewed_kl, reverse=True),
    "skewed_kl at 0": partial(skewed_kl, alpha=0),
}
BOUNDED = ("jsd", "skewed_kl", "reverse skewed_kl")
every_loss = pytest.mark.parametrize("name", EVERY)

# Teacher ¾ and ¼ (logits ln 3 and 0), student ½ and ½.
STUDENT, TEACHER = torch.zeros(1, 2), torch.tensor([[math.log(3), 0.0]])


def probabilities(temperature: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Of student and teacher."""
    student, teacher = (softmax(x.numpy() / temperature, axis=-1) for x in golden.text.logits())
    return student, teacher


def kl(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    return rel_entr(p, q).sum(-1)


# --- figures


@pytest.mark.parametrize(("beta", "temperature"), golden.text.JSD)
def test_jsd_authors_figures(beta: float, temperature: float):
    student, teacher = golden.text.logits()
    value = generalized_jsd(student.requires_grad_(), teacher, beta, temperature, weight=golden.text.answered())
    figure = golden.text.figure(value, student)
    np.testing.assert_allclose(figure, golden.text.JSD[beta, temperature], rtol=1e-10)


def test_reverse_authors_figures():
    student, teacher = golden.text.logits()
    value = reverse_kl(student.requires_grad_(), teacher, weight=golden.text.answered())
    figure = golden.text.figure(value, student)
    np.testing.assert_allclose(figure, golden.text.REVERSE, rtol=2e-6)
    # The same is TRL's at beta = 1, in float64.
    np.testing.assert_allclose(figure, golden.text.JSD[1.0, 1.0], rtol=1e-10)


@pytest.mark.parametrize("alpha", golden.text.SKEWED_REVERSE)
def test_skewed_authors_figures(alpha: float):
    student, teacher = golden.text.logits()
    student.requires_grad_()
    answered = golden.text.answered()
    value = skewed_kl(student, teacher, alpha, reverse=True, weight=answered)
    np.testing.assert_allclose(golden.text.figure(value, student), golden.text.SKEWED_REVERSE[alpha], rtol=2e-6)
    # Theirs is a cross-entropy forwards: ours plus the teacher's entropy, which has no gradient.
    p = teacher.softmax(-1)[answered]
    entropy = -(p * p.log()).sum(-1).mean()
    value = skewed_kl(student, teacher, alpha, weight=answered) + entropy
    theirs = golden.text.SKEWED_FORWARD_CROSS_ENTROPY[alpha]
    np.testing.assert_allclose(golden.text.figure(value, student), theirs, rtol=2e-6)


def test_by_hand():
    # Reverse: ½ ln(½ / ¾) + ½ ln(½ / ¼) = ½ ln(4 / 3) = 0.143841
    assert reverse_kl(STUDENT, TEACHER).item() == pytest.approx(0.143841, abs=1e-6)
    # JSD at ½: m = (⅝, ⅜); ½ (¾ ln(6/5) + ¼ ln(2/3) + ½ ln(4/5) + ½ ln(4/3)) = ½ (0.035375 + 0.032269) = 0.033822
    assert generalized_jsd(STUDENT, TEACHER).item() == pytest.approx(0.033822, abs=1e-6)
    # JSD at ¼: m = ¼ (¾, ¼) + ¾ (½, ½) = (9/16, 7/16);
    # ¼ (¾ ln(4/3) + ¼ ln(4/7)) + ¾ (½ ln(8/9) + ½ ln(8/7)) = ¼ · 0.075858 + ¾ · 0.007874 = 0.024870
    assert generalized_jsd(STUDENT, TEACHER, 0.25).item() == pytest.approx(0.024870, abs=1e-6)
    # Skewed at ½: the same m; forwards ¾ ln(6/5) + ¼ ln(2/3) = 0.035375, backwards ½ ln(4/5) + ½ ln(4/3) = 0.032269
    assert skewed_kl(STUDENT, TEACHER, 0.5).item() == pytest.approx(0.035375, abs=1e-6)
    assert skewed_kl(STUDENT, TEACHER, 0.5, reverse=True).item() == pytest.approx(0.032269, abs=1e-6)
    # Skewed at ¼, backwards: m = ¼ (½, ½) + ¾ (¾, ¼) = (11/16, 5/16); ½ ln(8/11) + ½ ln(8/5) = ½ ln(64/55) = 0.075775
    assert skewed_kl(STUDENT, TEACHER, 0.25, reverse=True).item() == pytest.approx(0.075775, abs=1e-6)


@every_loss
def test_temperature_divides_the_logits_and_does_not_scale(name: str):
    loss = EVERY[name]
    torch.testing.assert_close(loss(3 * STUDENT, 3 * TEACHER, temperature=3.0), loss(STUDENT, TEACHER))


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_scipy(temperature: float):
    student, teacher = golden.text.logits()
    q, p = probabilities(temperature)
    cases = [(reverse_kl(student, teacher, temperature, reduction="none"), kl(q, p))]
    for share in (0.05, 0.3, 0.8):
        m = share * p + (1 - share) * q
        ours = generalized_jsd(student, teacher, share, temperature, reduction="none")
        cases.append((ours, share * kl(p, m) + (1 - share) * kl(q, m)))
        cases.append((skewed_kl(student, teacher, share, temperature, reduction="none"), kl(p, m)))
        ours = skewed_kl(student, teacher, share, temperature, reverse=True, reduction="none")
        cases.append((ours, kl(q, share * q + (1 - share) * p)))
    for ours, expected in cases:
        np.testing.assert_allclose(ours, expected, rtol=1e-10)


# --- properties


def test_reverse_is_forward_with_the_roles_exchanged():
    student, teacher = golden.text.logits()
    forward = soft_targets(teacher, student, 1.0, dim=-1)
    torch.testing.assert_close(reverse_kl(student, teacher), forward)


def test_jsd_symmetry():
    student, teacher = golden.text.logits()
    torch.testing.assert_close(generalized_jsd(student, teacher), generalized_jsd(teacher, student))
    torch.testing.assert_close(generalized_jsd(student, teacher, 0.2), generalized_jsd(teacher, student, 0.8))
    assert abs(generalized_jsd(student, teacher, 0.2) - generalized_jsd(teacher, student, 0.2)) > 0.001


def test_jsd_is_made_of_skewed_kls():
    student, teacher = golden.text.logits()
    parts = 0.3 * skewed_kl(student, teacher, 0.3) + 0.7 * skewed_kl(student, teacher, 0.7, reverse=True)
    torch.testing.assert_close(generalized_jsd(student, teacher, 0.3), parts)


def test_limits():
    student, teacher = golden.text.logits()
    forward, reverse = soft_targets(student, teacher, 1.0, dim=-1), reverse_kl(student, teacher)
    near = 1e-6
    torch.testing.assert_close(generalized_jsd(student, teacher, near) / near, forward, rtol=1e-3, atol=0)
    torch.testing.assert_close(generalized_jsd(student, teacher, 1 - near) / near, reverse, rtol=1e-3, atol=0)
    torch.testing.assert_close(skewed_kl(student, teacher, near), forward, rtol=1e-3, atol=0)
    # The very ends.
    torch.testing.assert_close(generalized_jsd(student, teacher, 0), forward)
    torch.testing.assert_close(generalized_jsd(student, teacher, 1), reverse)
    torch.testing.assert_close(skewed_kl(student, teacher, 0), forward)
    torch.testing.assert_close(skewed_kl(student, teacher, 0, reverse=True), reverse)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_bounds_which_distributions_without_overlap_reach(share: float):
    # m is share or 1 − share where the two stand: JSD is the entropy of the shares (ln 2 at ½), skewed KL −ln share.
    apart = torch.tensor([[1e4, -1e4]], requires_grad=True)
    entropy = -share * math.log(share) - (1 - share) * math.log(1 - share)
    student, teacher = golden.text.logits()
    for loss, bound in (
        (partial(generalized_jsd, beta=share), entropy),
        (partial(skewed_kl, alpha=share), -math.log(share)),
        (partial(skewed_kl, alpha=share, reverse=True), -math.log(share)),
    ):
        value = loss(apart, -apart.detach())
        assert value.item() == pytest.approx(bound, rel=1e-6)
        assert gradient(value, apart).tolist() == [[0, 0]]
        assert (loss(20 * student, teacher, reduction="none") < bound).all()


@every_loss
def test_logits_may_shift(name: str):
    student, teacher = golden.text.logits()
    expected = EVERY[name](student, teacher)
    torch.testing.assert_close(EVERY[name](student + 1000, teacher - 50), expected)


@every_loss
def test_another_class_dimension(name: str):
    student, teacher = golden.text.logits()
    loss = EVERY[name]
    rows = [x.movedim(-1, 1) for x in (student, teacher)]
    items = loss(student, teacher, reduction="none")
    torch.testing.assert_close(loss(*rows, dim=1, reduction="none"), items)


def test_extreme_logits_stay_finite():
    # The student is sure of the wrong class: KL = 2·10⁴ · 1 in either direction.
    student = torch.tensor([[1e4, -1e4]], requires_grad=True)
    for loss in (reverse_kl, EVERY["jsd at 1"], EVERY["jsd at 0"], EVERY["skewed_kl at 0"]):
        value = loss(student, -student.detach())
        assert value.item() == 2e4
        assert gradient(value, student).isfinite().all()


@every_loss
def test_a_class_that_both_rule_out_adds_nothing(name: str):
    student, teacher = golden.text.logits()
    expected = EVERY[name](student, teacher)
    student, teacher = (torch.cat([x, torch.full_like(x[..., :1], -math.inf)], -1) for x in (student, teacher))
    torch.testing.assert_close(EVERY[name](student, teacher), expected)


@pytest.mark.parametrize("name", EVERY)
def test_gradient_with_a_class_that_both_rule_out(name: str):
    student, teacher = golden.text.logits()
    student.requires_grad_()
    expected = gradient(EVERY[name](student, teacher), student)
    ruled_out = [torch.cat([x, torch.full_like(x[..., :1], -math.inf)], -1) for x in (student, teacher)]
    torch.testing.assert_close(gradient(EVERY[name](*ruled_out), student), expected)


@pytest.mark.parametrize("name", BOUNDED)
def test_a_class_that_one_rules_out_stays_finite(name: str):
    for side in (0, 1):
        logits = list(golden.text.logits())
        logits[side] = logits[side].clone()
        logits[side][..., 2] = -math.inf
        student, teacher = logits
        value = EVERY[name](student.requires_grad_(), teacher)
        assert 0 < value < -math.log(0.1)  # the bound of a skewed KL, above that of the JSD
        assert gradient(value, student).isfinite().all()


# --- messages


@pytest.mark.parametrize("share", [-0.1, 1.5, math.nan, True, "0.5"])
def test_share_out_of_range(share: float):
    with pytest.raises(DistillError, match=r"beta must be in \[0, 1\], got"):
        generalized_jsd(STUDENT, TEACHER, share)
    with pytest.raises(DistillError, match=r"alpha must be in \[0, 1\], got"):
        skewed_kl(STUDENT, TEACHER, share)


def test_alpha_of_1():
    with pytest.raises(DistillError, match="skewed_kl: alpha must be below 1"):
        skewed_kl(STUDENT, TEACHER, 1)
