"""Terms on class scores: labels, standardised logits and independent classes in plain PyTorch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import golden
from kdgraft import (
    DIST,
    DKD,
    NKD,
    RECIPES,
    Distiller,
    DistillError,
    ForwardKL,
    GeneralizedJSD,
    Itself,
    LogitMatching,
    Peer,
    ReverseKL,
    SkewedKL,
    SoftTargets,
    WiringError,
)
from kdgraft.losses import binary_soft_targets, decoupled, logit_matching, normalized, soft_targets, standardized
from kdgraft.registry import expand_recipe
from kdgraft.terms import build_terms
from support.tensors import Emit

EXAMPLE = torch.zeros(1, 1)
LABELS = torch.tensor([0, 2, -100, 6, 8])


def distil(student: Tensor, teacher: Tensor, *terms: object, **settings: object) -> Distiller:
    return Distiller(Emit(student), Emit(teacher), terms=list(terms), example=EXAMPLE, **settings)


def pair() -> tuple[Tensor, Tensor]:
    student, teacher = golden.logits()
    return student.float(), teacher.float()


# --- labels


@pytest.mark.parametrize(
    ("term", "loss"),
    [
        (lambda: DKD(alpha=2, beta=3, temperature=2), lambda s, t, y: decoupled(s, t, y, 2.0, alpha=2, beta=3)),
        (lambda: NKD(gamma=2, temperature=3), lambda s, t, y: normalized(s, t, y, 3.0, gamma=2)),
    ],
)
def test_items_without_a_label_are_left_out(term, loss):
    student, teacher = pair()
    expected = loss(student[LABELS >= 0], teacher[LABELS >= 0], LABELS[LABELS >= 0])
    student[2], teacher[2] = torch.inf, torch.nan
    distiller = distil(student, teacher, term())
    value = distiller(EXAMPLE, targets=LABELS).loss
    torch.testing.assert_close(value, expected)
    value.backward()
    slope = distiller.student.value.grad
    assert slope.isfinite().all() and not slope[2].any() and slope[[0, 1, 3, 4]].any()


@pytest.mark.parametrize("term", [DKD, NKD])
def test_tokens_and_maps(term):
    student, teacher = (golden.wave((2, 3, 4, 5), f, 0.3, 2.0).float() for f in (0.7, 0.9))
    labels = (torch.arange(2 * 4 * 5) % 4).reshape(2, 4, 5)  # 3 is none of the three classes
    maps = distil(student, teacher, term())(EXAMPLE, targets=labels).loss
    rows = [x.movedim(1, -1).flatten(1, 2) for x in (student, teacher)]
    tokens = distil(*rows, term())(EXAMPLE, targets=labels.flatten(1)).loss
    torch.testing.assert_close(tokens, maps)
    samples = distil(*(x.flatten(0, 1) for x in rows), term())(EXAMPLE, targets=labels.flatten()).loss
    torch.testing.assert_close(samples, maps)


def test_no_label_at_all_is_0_with_a_live_graph():
    distiller = distil(*pair(), DKD(), NKD())
    loss = distiller(EXAMPLE, targets=torch.full((5,), -100)).loss
    loss.backward()
    assert loss.item() == 0 and not distiller.student.value.grad.any()


@pytest.mark.parametrize("targets", [None, torch.zeros(5), torch.zeros(4, dtype=torch.long), "labels"])
@pytest.mark.parametrize("term", [DKD, NKD])
def test_a_batch_without_labels_is_an_error(term, targets):
    distiller = distil(*pair(), term())
    message = rf"^{term.__name__.lower()} needs the class of each item, and the batch has none; pass targets=… .* to the distiller$"
    with pytest.raises(DistillError, match=message):
        distiller(EXAMPLE, targets=targets)


@pytest.mark.parametrize("term", [DKD, NKD])
def test_independent_classes_are_refused_when_wired(term):
    student, teacher = pair()
    with pytest.raises(WiringError, match="these models score each class on its own; use SoftTargets"):
        distil(student, teacher, term(independent=True))
    with pytest.raises(WiringError, match="these models score each class on its own"):
        distil(student[:, :1], teacher[:, :1], term())


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (dict(type="DKD", beta=-1), "DKD: beta must be a number >= 0"),
        (dict(type="DKD", alpha="1"), "DKD: alpha must be a number >= 0"),
        (dict(type="DKD", temperature=0), "temperature must be > 0"),
        (dict(type="DKD", gamma=1), "term DKD takes no argument 'gamma'"),
        (dict(type="NKD", gamma=-1), "NKD: gamma must be a number >= 0"),
        (dict(type="NKD", hard_weight=0.5), "term NKD takes no argument 'hard_weight'"),
        (dict(type="SoftTargets", standardize=1), "SoftTargets: standardize must be true, false, 'paper' or 'code', got 1"),
        (dict(type="SoftTargets", standardize="true"), "standardize must be true, false, 'paper' or 'code', got 'true'"),
        (dict(type="LogitMatching", standardize=True), "term LogitMatching takes no argument 'standardize'"),
    ],
)  # fmt: skip
def test_wrong_settings(spec: dict, message: str):
    with pytest.raises(DistillError) as error:
        build_terms([spec])
    assert message in str(error.value) and "\n" not in str(error.value)


def test_recipes():
    student, teacher = pair()
    for name, expected in (("dkd", decoupled(student, teacher, LABELS)), ("nkd", normalized(student, teacher, LABELS))):
        torch.testing.assert_close(distil(student, teacher, recipe=name)(EXAMPLE, targets=LABELS).loss, expected)
    (term,) = build_terms(expand_recipe(dict(type="dkd", beta=0.5, temperature=1), RECIPES))
    assert (term.alpha, term.beta, term.temperature, term.weight) == (1, 0.5, 1, 1)


def test_a_peer_and_an_ensemble_have_labels_too():
    student, teacher = pair()
    peer = Distiller(Emit(student), Peer(Emit(teacher)), [DKD()], EXAMPLE)
    losses = peer(EXAMPLE, targets=LABELS).losses
    torch.testing.assert_close(losses["distill.dkd.loss"], decoupled(student, teacher, LABELS))
    torch.testing.assert_close(losses["distill.dkd_of_teacher.loss"], decoupled(teacher, student, LABELS))
    own = Distiller(Emit(student), Itself(), [DKD()], EXAMPLE)
    assert own(EXAMPLE, targets=LABELS).loss.item() == pytest.approx(0, abs=1e-6)


# --- standardised logits


@pytest.mark.parametrize(
    "kind",
    [SoftTargets, ForwardKL, ReverseKL, GeneralizedJSD, SkewedKL, DIST, DKD, NKD],
    ids=lambda kind: kind.__name__,
)
@pytest.mark.parametrize("variant", [True, "paper", "code"])
def test_every_term_with_a_temperature_takes_standardised_logits(kind, variant):
    student, teacher = pair()
    named = "code" if variant == "code" else "paper"
    ready = [standardized(x, variant=named) for x in (student, teacher)]
    expected = distil(*ready, kind(temperature=2.0))(EXAMPLE, targets=LABELS).loss
    term = kind(temperature=2.0, standardize=variant)
    found = distil(5 * student - 3, teacher / 7, term)(EXAMPLE, targets=LABELS).loss
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_standardised_maps():
    student, teacher = (golden.wave((2, 3, 4, 5), f, 0.3, 2.0).float() for f in (0.7, 0.9))
    found = distil(student, teacher, SoftTargets(2, standardize=True))(EXAMPLE).loss
    ready = [standardized(x, dim=1) for x in (student, teacher)]
    torch.testing.assert_close(found, soft_targets(*ready, 2.0, dim=1))


def test_independent_classes_have_no_common_mean():
    student, teacher = pair()
    message = "soft_targets: standardize is not defined for independent classes; leave standardize out"
    for one in (dict(independent=True), {}):
        width = 10 if one else 1
        with pytest.raises(WiringError, match=message):
            distil(student[:, :width], teacher[:, :width], SoftTargets(standardize=True, **one))


def test_the_recipe_has_the_weights_of_the_authors_code():
    student, teacher = pair()
    labels = torch.tensor([0, 2, 4, 6, 8])
    distiller = distil(student, teacher, recipe="ls")
    out = distiller(EXAMPLE, targets=labels)
    hard = F.cross_entropy(student, labels)
    ready = [standardized(x) for x in (student, teacher)]
    torch.testing.assert_close(out.total(hard), 0.1 * hard + 9 * soft_targets(*ready, 2.0))
    (term,) = build_terms(expand_recipe(dict(type="ls", temperature=3, name="z"), RECIPES))
    assert (term.temperature, term.name, term.standardize, term.weight, term.host_share) == (3, "z", True, 10, 0.1)


# --- independent classes


def test_independent_classes_are_compared_one_by_one():
    student, teacher = pair()
    out = distil(student, teacher, SoftTargets(2, independent=True), LogitMatching(independent=True))(EXAMPLE)
    # The mean over classes, as in torch's binary cross-entropy.
    torch.testing.assert_close(out.losses["distill.soft_targets.loss"], binary_soft_targets(student, teacher, 2.0))
    torch.testing.assert_close(out.losses["distill.logit_matching.loss"], logit_matching(student, teacher))
    total = distil(student, teacher, SoftTargets(2, independent=True, classes="sum"))(EXAMPLE).loss
    torch.testing.assert_close(total, 10 * binary_soft_targets(student, teacher, 2.0))
    focused = distil(student, teacher, SoftTargets(independent=True, focus=1.0))(EXAMPLE).loss
    torch.testing.assert_close(focused, binary_soft_targets(student, teacher, 1.0, focus=1.0))


def test_the_gradient_is_that_of_binary_cross_entropy():
    student, teacher = pair()
    distiller = distil(student, teacher, SoftTargets(independent=True))
    distiller(EXAMPLE).loss.backward()
    twin = student.clone().requires_grad_()
    F.binary_cross_entropy_with_logits(twin, teacher.sigmoid()).backward()
    torch.testing.assert_close(distiller.student.value.grad, twin.grad)


def test_members_of_an_ensemble_are_averaged_as_independent_classes():
    from kdgraft import Ensemble, Teacher

    student, teacher = pair()
    other = golden.wave((5, 10), 0.3, 0.8, 2.0).float()
    distiller = Distiller(
        Emit(student),
        terms=[SoftTargets(independent=True, source="both")],
        example=EXAMPLE,
        teachers=dict(a=Teacher(Emit(teacher)), b=Teacher(Emit(other)), both=Ensemble(["a", "b"])),
    )
    mean = (teacher.sigmoid() + other.sigmoid()) / 2
    torch.testing.assert_close(distiller(EXAMPLE).loss, binary_soft_targets(student, mean.logit()))


def test_terms_of_one_distribution_refuse_independent_classes():
    student, teacher = pair()
    with pytest.raises(WiringError, match="reverse_kl compares one distribution over all classes"):
        distil(student, teacher, ReverseKL(independent=True))
    with pytest.raises(DistillError, match="soft_targets: independent must be true or false, got 1"):
        distil(student, teacher, SoftTargets(independent=1))
    assert SoftTargets(independent=True).between("peer", "student").where == {"independent": True}
