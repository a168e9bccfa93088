"""Distributions of which only the largest entries are known: exact with all, a lower bound with fewer, by what they neglect."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from kdgraft import DistillError, ForwardKL, GeneralizedJSD, ReverseKL, SkewedKL, SoftTargets
from kdgraft.pairs import Pairs
from kdgraft.topk import TopK, joined, joined_pairs

CLASSES = 12
TERMS = {
    "forward": ForwardKL,
    "reverse": ReverseKL,
    "jsd": GeneralizedJSD,
    "skewed": SkewedKL,
    "soft": SoftTargets,
}


def logits(seed, rows=6, dtype=torch.float64, scale=2.0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(rows, CLASSES, generator=generator, dtype=dtype)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("name", TERMS)
def test_all_entries_give_the_loss_itself(name, temperature):
    student, teacher = logits(0), logits(1)
    term = TERMS[name](temperature=temperature)
    known = TopK.of(teacher, CLASSES, [1.0, temperature])
    found = term.compare(joined_pairs(student, known, temperature))
    torch.testing.assert_close(found.double(), term.compare(Pairs(student, teacher)).double(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("name", TERMS)
def test_it_grows_with_what_is_known(name, temperature):
    student, teacher = logits(0), logits(1)
    term = TERMS[name](temperature=temperature)
    values = [
        term.compare(joined_pairs(student, TopK.of(teacher, k, [temperature]), temperature))
        for k in range(1, CLASSES + 1)
    ]
    for fewer, more in pairwise(values):
        assert (more - fewer > -1e-5).all()


def test_what_is_neglected_is_the_mass_of_the_rest_times_its_divergence():
    student, teacher, k = logits(0), logits(1), 4
    term = ForwardKL()
    found = term.compare(joined_pairs(student, TopK.of(teacher, k), 1.0)).double()
    order = teacher.argsort(-1, descending=True)
    t, s = (one.gather(-1, order)[:, k:] for one in (teacher.softmax(-1), student.softmax(-1)))
    mass = t.sum(-1)
    rest = (F.kl_div((s / s.sum(-1, keepdim=True)).log(), t / mass[:, None], reduction="none")).sum(-1)
    torch.testing.assert_close(term.compare(Pairs(student, teacher)) - found, mass * rest, rtol=1e-3, atol=1e-5)


def test_by_hand():
    teacher = torch.tensor([[0.5, 0.25, 0.125, 0.125]]).log()
    known = TopK.of(teacher, 2, [1.0])
    assert known.ids.tolist() == [[0, 1]] and known.shape == (1, 4)
    torch.testing.assert_close(known.at(1.0).exp(), torch.tensor([[0.5, 0.25, 0.25]]))
    torch.testing.assert_close(joined(torch.zeros(1, 4), known, 1.0).exp(), torch.tensor([[0.25, 0.25, 0.5]]))
    # 0.5 log 2 + 0.25 log 1 + 0.25 log ½
    loss = ForwardKL().compare(joined_pairs(torch.zeros(1, 4), known, 1.0))
    torch.testing.assert_close(loss, torch.tensor([0.25 * torch.tensor(2.0).log().item()]))


@pytest.mark.parametrize("k", [1, 3])
def test_extreme_distributions_have_finite_gradients(k):
    for teacher in (
        torch.full((2, CLASSES), -1e4),
        torch.zeros(2, CLASSES),
        1e4 * F.one_hot(torch.tensor([0, 3]), CLASSES).float(),
    ):
        student = torch.zeros(2, CLASSES, requires_grad=True)
        for term in (ForwardKL(), ReverseKL(), GeneralizedJSD()):
            loss = term.compare(joined_pairs(student, TopK.of(teacher, k), 1.0)).sum()
            (gradient,) = torch.autograd.grad(loss, student)
            assert torch.isfinite(loss) and torch.isfinite(gradient).all()


def test_rounding_is_taken_back():
    known = TopK.of(logits(1, rows=50, dtype=torch.float32), 5, [1.0, 2.0])
    known.logs, known.norms, known.rests = known.logs.half(), known.norms.half(), known.rests.half()
    for temperature in (1.0, 2.0):
        torch.testing.assert_close(known.at(temperature).exp().sum(-1).float(), torch.ones(50), rtol=2e-3, atol=2e-3)


def test_entries_that_the_student_has_beyond_the_teacher_s_are_left_out():
    student, teacher = logits(0), logits(1)
    wider = torch.cat([student, torch.full((6, 3), 9.0)], -1)
    known = TopK.of(teacher, 4)
    torch.testing.assert_close(joined(wider, known, 1.0), joined(student, known, 1.0))


def test_another_temperature_is_refused():
    with pytest.raises(DistillError, match="known at temperature 1, not at 2"):
        TopK.of(logits(1), 3).at(2.0)


def test_it_is_indexed_as_its_rows_are():
    known = TopK.of(logits(1).view(2, 3, CLASSES), 4)
    assert known.flatten().ids.shape == (6, 4)
    chosen = known[torch.tensor([[True, False, True], [False, False, True]])]
    torch.testing.assert_close(chosen.at(1.0), known.flatten().at(1.0)[[0, 2, 5]])


# --- the largest entries alone, as a server gives them


@pytest.mark.parametrize("k", [1, 5, CLASSES - 1, CLASSES])
def test_the_largest_entries_say_what_is_left(k):
    whole = TopK.of(logits(1), k)
    found = TopK.of_largest(whole.ids, whole.logs, CLASSES)
    torch.testing.assert_close(found.at(1.0).exp(), whole.at(1.0).exp(), rtol=0, atol=2e-6)
    student = logits(0)
    for term in (ForwardKL(), ReverseKL(), SkewedKL()):
        one, other = (term.compare(joined_pairs(student, known, 1.0)) for known in (whole, found))
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_all_entries_say_all_temperatures():
    whole = TopK.of(logits(1), CLASSES, [1.0, 3.0])
    found = TopK.of_largest(whole.ids, whole.logs, CLASSES, [1.0, 3.0])
    torch.testing.assert_close(found.at(3.0), whole.at(3.0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.norms, whole.norms, rtol=1e-5, atol=1e-5)
    with pytest.raises(DistillError, match="say nothing of the others at a temperature other than 1"):
        TopK.of_largest(whole.ids[:, :4], whole.logs[:, :4], CLASSES, [1.0, 3.0])


def test_a_rest_below_rounding_is_bounded_by_the_smallest_known_entry():
    ids = torch.tensor([[0, 1]])
    for smallest, expected in ((1e-3, 1e-6), (1e-9, 4 * 1e-9)):  # 6 classes: four others, each at most the smallest
        known = TopK.of_largest(ids, torch.tensor([[1 - smallest, smallest]], dtype=torch.float64).log(), 6)
        assert float(known.rests.double().exp()) == pytest.approx(expected, rel=1e-3)
    # Rounding may have them exceed 1.
    known = TopK.of_largest(ids, torch.tensor([[1.00001, 1e-3]]).log(), 6)
    assert known.at(1.0).isfinite().all() and float(known.at(1.0).exp().sum()) == pytest.approx(1)
