"""CRD: embeddings are told from remembered ones; what the memory holds."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import golden.dense
from kdgraft import CRD, Distiller, DistillError
from kdgraft.losses import crd
from support.samples import IMAGES, Pointwise
from support.tensors import gradient

# HobbitLong/RepDistiller@b84f547c5db6a35318d4671d7d5c4de74c822403: crd/memory.py and crd/criterion.py, ContrastMemory and
# ContrastLoss of the student's part, in float64 on golden.dense.embeddings() with the memory's rows as unit vectors: sample i has
# row i, and all nine rows are negatives. By temperature: value, gradient at the student's first number, sum of the squared
# gradients; and the mean that the code found in this first batch, Z / n. It adds 1e-7 to probabilities, hence the tolerance.
AUTHORS = {
    0.5: ((3.5627055188565016, -0.029086049386955935, 0.07616562170722736), 1.680195498711196),
    0.07: ((11.938897510848394, -0.11168391094161922, 4.7568444154681195), 29142.35738981409),
}


@pytest.mark.parametrize("temperature", AUTHORS)
def test_authors_figures(temperature: float):
    student, _, memory = golden.dense.embeddings()
    expected, mean = AUTHORS[temperature]
    value = crd(student.requires_grad_(), memory[:7], memory, temperature=temperature, mean=mean)
    slope = gradient(value, student)
    assert [value.item(), slope[0, 0].item(), slope.square().sum().item()] == pytest.approx(expected, rel=1e-5)


def test_one_sample_by_hand():
    # At τ = 1 and μ = 1, with one negative of cosine 0 and the positive of cosine 1: h = e / (e + 1) and 1 / (1 + 1).
    anchor, negative = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 5.0]])
    expected = math.log(1 + 1 / math.e) + math.log(2)
    settings = dict(temperature=1.0, mean=1.0)
    assert crd(anchor, anchor, negative, **settings).item() == pytest.approx(expected)
    # Of two negatives one is left out.
    two, others = torch.cat([negative, anchor]), torch.tensor([[True, False]])
    assert crd(anchor, anchor, two, others=others, **settings).item() == pytest.approx(expected)


def test_the_default_mean_is_that_over_random_vectors():
    generator = torch.Generator().manual_seed(0)
    anchors, noise = (F.normalize(torch.randn(n, 128, generator=generator), dim=1) for n in (16, 20000))
    mean = (anchors @ noise.T / 0.07).exp().mean().item()
    assert math.exp(1 / (2 * 128 * 0.07**2)) == pytest.approx(mean, rel=0.03)


@pytest.mark.parametrize("left", [torch.zeros(0, 6), None])
def test_without_negatives_nothing_is_told_apart(left: torch.Tensor | None):
    student = torch.ones(2, 6, requires_grad=True)
    others = None if left is not None else torch.zeros(2, 3, dtype=torch.bool)
    value = crd(student, torch.ones(2, 6), torch.ones(3, 6) if left is None else left, others=others)
    assert value.item() == 0
    assert torch.equal(gradient(value, student), torch.zeros(2, 6))


def test_mistakes_of_the_loss():
    ones = torch.ones(2, 6)
    for shapes in ((ones, ones[:1], ones), (ones, ones, ones[:, :3])):
        with pytest.raises(DistillError, match=r"crd: student \(2, 6\) .* must have the same shape"):
            crd(*shapes)


# --- the term


def distiller(**settings: Any) -> Distiller:
    torch.manual_seed(0)
    recipe = dict(type="crd", tap="mix", width=5, temperature=0.5, weight=1.0, **settings)
    return Distiller(Pointwise(4), Pointwise(6), recipe=recipe, example=IMAGES[0])


def embedded(model: Distiller, images: torch.Tensor) -> list[torch.Tensor]:
    term = model.terms["crd"]
    nets = (model.student, term.student_head), (model.teacher.model, term.teacher_head)
    with torch.no_grad():
        return [F.normalize(head(net(images).mean((2, 3))), dim=1) for net, head in nets]


def test_what_is_compared_and_what_learns():
    model = distiller()
    assert model(IMAGES[0]).loss == 0
    model(IMAGES[1])
    (s0, t0), (s1, t1), (s2, t2) = (embedded(model, images) for images in IMAGES)
    expected = crd(s2, t2, torch.cat([t0, t1]), temperature=0.5) + crd(t2, s2, torch.cat([s0, s1]), temperature=0.5)
    loss = model(IMAGES[2]).loss
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in model.terms.parameters())
    assert all(p.grad is None for p in model.teacher.model.parameters())
    # Of the two parts the student learns from its own: the teacher's part is told from remembered embeddings.
    own = distiller()
    own.student.load_state_dict(model.student.state_dict())
    own.terms["crd"].load_state_dict(model.terms["crd"].state_dict())
    vectors = own.terms["crd"].student_head(own.student(IMAGES[2]).mean((2, 3)))
    crd(vectors, t2, torch.cat([t0, t1]), temperature=0.5).backward()
    torch.testing.assert_close(model.student.mix.weight.grad, own.student.mix.weight.grad)


def test_without_indices_the_newest_replace_the_oldest():
    model = distiller(memory=6)
    for images in IMAGES[:2]:
        model(images)
    (s0, t0), (s1, t1) = (embedded(model, images) for images in IMAGES[:2])
    term = model.terms["crd"]
    torch.testing.assert_close(term.student_memory, torch.cat([s1[2:], s0[2:], s1[:2]]))
    torch.testing.assert_close(term.teacher_memory, torch.cat([t1[2:], t0[2:], t1[:2]]))


def test_a_known_sample_keeps_its_row_and_is_not_its_own_negative():
    model = distiller(memory=9, momentum=0.25)
    term = model.terms["crd"]
    model(IMAGES[0], indices=[3, 4, 5, 6])
    (s0, _), (s1, t1) = (embedded(model, images) for images in IMAGES[:2])
    remembered = term.teacher_memory.clone()
    found = model(IMAGES[1], indices=torch.tensor([6, 7, 6, 5])).loss
    # Rows 0 to 3 hold 3, 4, 5, 6; the third sample comes second in the batch under the same name.
    others = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 0, 1]])
    part = crd(s1, t1, remembered[:4], temperature=0.5, others=others)
    torch.testing.assert_close(found - part, crd(t1, s1, s0, temperature=0.5, others=others))
    expected = [s0[0], s0[1], 0.25 * s0[2] + 0.75 * s1[3], 0.25 * s0[3] + 0.75 * s1[0], s1[1]]
    torch.testing.assert_close(term.student_memory[:5], F.normalize(torch.stack(expected), dim=1))
    assert not term.student_memory[5:].any()


def test_a_full_memory_forgets_the_name_of_what_it_drops():
    model = distiller(memory=3)
    term = model.terms["crd"]
    model(IMAGES[0], indices=["a", "b", "c", "d"])
    assert term._places == {"d": 0, "b": 1, "c": 2}
    (s0, _), (s1, _) = (embedded(model, images) for images in IMAGES[:2])
    model(IMAGES[1], indices=["a", "c", "d", "e"])  # a replaces b; d stays at 0; e replaces c
    assert term._places == {"d": 0, "a": 1, "e": 2}
    expected = torch.stack([F.normalize(s0[3] + s1[2], dim=0), s1[0], s1[3]])
    torch.testing.assert_close(term.student_memory, expected)


def test_samples_of_the_same_class_are_no_negatives():
    model = distiller()
    model(IMAGES[0], targets=torch.tensor([0, 1, 2, -100]))
    (s0, t0), (s1, t1) = (embedded(model, images) for images in IMAGES[:2])
    found = model(IMAGES[1], targets=torch.tensor([1, 1, 3, -100])).loss
    others = torch.tensor([[1, 0, 1, 1], [1, 0, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1]])
    parts = [crd(*pair, temperature=0.5, others=others) for pair in ((s1, t1, t0), (t1, s1, s0))]
    torch.testing.assert_close(found, sum(parts))


def test_negatives_are_drawn_anew_and_a_resumed_run_draws_the_same():
    model = distiller(negatives=3)
    for images in IMAGES:
        model(images, indices=range(4))
    state = copy.deepcopy(model.state_dict())
    drawn = [model(IMAGES[0]).loss.item() for _ in range(4)]
    assert len(set(drawn)) > 1
    other = distiller(negatives=3)
    other.load_state_dict(state)
    assert [other(IMAGES[0]).loss.item() for _ in range(4)] == drawn
    assert other.terms["crd"]._places == {0: 0, 1: 1, 2: 2, 3: 3}


def test_an_infinite_embedding_is_not_remembered():
    model = distiller()
    images = IMAGES[0].clone()
    images[1] = math.inf
    model(images)
    assert model.terms["crd"]._stored == 3
    assert model.terms["crd"].student_memory.isfinite().all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(width=0), "CRD: width must be a whole number >= 1"),
        (dict(memory=1.5), "CRD: memory must be a whole number >= 1"),
        (dict(momentum=2), r"CRD: momentum must be in \[0, 1\]"),
        (dict(temperature=0), "temperature must be > 0"),
        (dict(pool="flat"), "CRD: pool must be one of mean, first, got 'flat'"),
        (dict(tap=["mix", "mix"]), "takes one tap of one tensor, got 2"),
    ],
)
def test_mistakes(settings: dict[str, Any], message: str):
    with pytest.raises(DistillError, match=message):
        Distiller(Pointwise(4), Pointwise(6), [CRD(**{"tap": "mix", **settings})], IMAGES[0])
