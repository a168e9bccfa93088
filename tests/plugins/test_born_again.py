"""Terms of born-again networks, CWTM and DKPP, in plain PyTorch."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import golden
from kdgraft import CWTM, DKPP, RECIPES, Distiller, DistillError, Ensemble, Peer, Teacher, WiringError
from kdgraft.distributed import SharedRandom
from kdgraft.losses import confidence, confidence_weighted, soft_targets
from kdgraft.registry import expand_recipe
from kdgraft.terms import build_terms
from support.tensors import Emit

EXAMPLE = torch.zeros(1, 1)
LABELS = torch.tensor([0, 2, -100, 6, 8])
KEPT = LABELS >= 0


def distil(student: Tensor, teacher: Tensor, *terms: object, **settings: object) -> Distiller:
    return Distiller(Emit(student), Emit(teacher), terms=list(terms), example=EXAMPLE, **settings)


def pair() -> tuple[Tensor, Tensor]:
    student, teacher = golden.logits()
    return student.float(), teacher.float()


# --- CWTM


def test_confidences_are_shares_of_the_batch():
    # The teacher is sure by 1/2 and 2/3, which are 3/7 and 4/7 of the batch; the student gives the true classes 1/2 and 1/4.
    teacher = torch.tensor([[1.0, 1.0, 2.0], [4.0, 1.0, 1.0]]).log()
    student = torch.tensor([[2.0, 1.0, 1.0], [1.0, 1.0, 2.0]]).log()
    out = distil(student, teacher, CWTM())(EXAMPLE, targets=torch.tensor([0, 1]))
    assert out.loss.item() == pytest.approx((3 * math.log(2) + 4 * math.log(4)) / 7)
    assert out.total(torch.tensor(99.0)).item() == pytest.approx(out.loss.item())


def test_items_without_a_label_are_left_out():
    student, teacher = pair()
    expected = confidence_weighted(student[KEPT], teacher[KEPT], LABELS[KEPT], reduction="sum")
    expected = expected / confidence(teacher[KEPT]).sum()
    student[2], teacher[2] = torch.inf, torch.nan
    distiller = distil(student, teacher, CWTM())
    value = distiller(EXAMPLE, targets=LABELS).loss
    torch.testing.assert_close(value, expected)
    value.backward()
    assert distiller.student.value.grad.isfinite().all() and not distiller.student.value.grad[2].any()


def test_the_hosts_own_loss_keeps_its_share():
    student, teacher = pair()
    whole = distil(student, teacher, CWTM())(EXAMPLE, targets=LABELS)
    mixed = distil(student, teacher, CWTM(hard_weight=0.25))(EXAMPLE, targets=LABELS)
    assert (whole.host_share, mixed.host_share) == (0.0, 0.25)
    torch.testing.assert_close(mixed.loss, 0.75 * whole.loss)


def test_maps_are_items():
    student, teacher = (golden.wave((2, 3, 4, 5), f, 0.3, 2.0).float() for f in (0.7, 0.9))
    labels = (torch.arange(2 * 4 * 5) % 4).reshape(2, 4, 5)  # 3 is none of the three classes
    maps = distil(student, teacher, CWTM())(EXAMPLE, targets=labels).loss
    rows = [x.movedim(1, -1).flatten(0, 2) for x in (student, teacher)]
    torch.testing.assert_close(distil(*rows, CWTM())(EXAMPLE, targets=labels.flatten()).loss, maps)


def test_no_label_at_all_is_0_with_a_live_graph():
    distiller = distil(*pair(), CWTM(), DKPP())
    loss = distiller(EXAMPLE, targets=torch.full((5,), -100)).loss
    loss.backward()
    assert loss.item() == 0 and not distiller.student.value.grad.any()
    with pytest.raises(DistillError, match=r"^cwtm needs the class of each item, and the batch has none; pass targets"):
        distil(*pair(), CWTM())(EXAMPLE)


# --- DKPP


def test_the_most_probable_class_keeps_its_probability_and_the_others_are_dealt_out():
    student, teacher = pair()
    distiller = distil(student, teacher, DKPP(temperature=2.0))
    keys = SharedRandom()
    keys.load(distiller.terms["dkpp"].hidden_state()["random"])
    order = keys.of_rows((5, 10), torch.device("cpu"))
    rows = []
    for row, places in zip(teacher.tolist(), order.tolist(), strict=True):
        first = max(range(10), key=row.__getitem__)
        others = sorted((k for k in range(10) if k != first), key=places.__getitem__)
        dealt = iter(row[k] for k in others)
        rows.append([row[first] if k == first else next(dealt) for k in range(10)])
    expected = soft_targets(student, torch.tensor(rows), 2.0)
    torch.testing.assert_close(distiller(EXAMPLE).loss, expected)
    assert not torch.allclose(distiller(EXAMPLE).loss, expected)  # the next step deals anew


def test_with_two_classes_nothing_is_dealt_out():
    student, teacher = (x[:, :2] for x in pair())
    torch.testing.assert_close(distil(student, teacher, DKPP(3.0))(EXAMPLE).loss, soft_targets(student, teacher, 3.0))


def test_only_labelled_items_count_unless_the_term_is_added():
    student, teacher = (x[:, :2] for x in pair())
    for hard_weight, kept, share in ((0.0, KEPT, 0.0), (None, slice(None), 1.0), (0.5, KEPT, 0.5)):
        out = distil(student, teacher, DKPP(hard_weight=hard_weight))(EXAMPLE, targets=LABELS.clamp(max=1))
        assert out.host_share == share
        expected = (1 - (hard_weight or 0)) * soft_targets(student[kept], teacher[kept], 1.0)
        torch.testing.assert_close(out.loss, expected)


def test_the_hosts_random_numbers_are_left_alone_and_a_resumed_run_continues(tmp_path: Path):
    student, teacher = pair()
    torch.manual_seed(0)
    distiller = distil(student, teacher, DKPP())
    before = torch.get_rng_state()
    distiller(EXAMPLE)
    assert torch.equal(torch.get_rng_state(), before)
    torch.save(distiller.state_dict(), tmp_path / "state.pt")
    following = [distiller(EXAMPLE).loss.item() for _ in range(3)]
    torch.manual_seed(1)
    other = distil(student, teacher, DKPP())
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert [other(EXAMPLE).loss.item() for _ in range(3)] == following
    assert len(set(following)) == 3


# --- both


def test_a_peer_and_an_ensemble():
    student, teacher = pair()
    for term in (CWTM, DKPP):
        out = Distiller(Emit(student), Peer(Emit(teacher)), [term()], EXAMPLE)(EXAMPLE, targets=LABELS)
        assert (out.host_share, out.peer_shares) == (0.0, {"teacher": 0.0}) and len(out.losses) == 2
    teachers: dict[str, Any] = dict(a=Teacher(Emit(teacher)), b=Teacher(Emit(student)), both=Ensemble(["a", "b"]))
    both = Distiller(Emit(student), terms=[CWTM(source="both")], example=EXAMPLE, teachers=teachers)
    mean = ((teacher.softmax(1) + student.softmax(1)) / 2)[KEPT].log()
    expected = confidence_weighted(student[KEPT], mean, LABELS[KEPT], reduction="sum") / confidence(mean).sum()
    torch.testing.assert_close(both(EXAMPLE, targets=LABELS).loss, expected)


@pytest.mark.parametrize("term", [CWTM, DKPP])
def test_independent_classes_are_refused(term: type[Any]):
    with pytest.raises(WiringError, match="these models score each class on its own"):
        distil(*pair(), term(independent=True))


@pytest.mark.parametrize("term", [CWTM, DKPP])
def test_under_autocast(term: type[Any]):
    student, teacher = (x.bfloat16() for x in pair())
    torch.manual_seed(0)
    half = distil(student, teacher, term())
    with torch.autocast("cpu", torch.bfloat16):
        loss = half(EXAMPLE, targets=LABELS).loss
    torch.manual_seed(0)
    exact = distil(student.float(), teacher.float(), term())(EXAMPLE, targets=LABELS).loss
    assert loss.dtype is torch.float32
    torch.testing.assert_close(loss, exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (dict(type="CWTM", hard_weight=2), "CWTM: hard_weight must be in [0, 1], got 2"),
        (dict(type="CWTM", temperature=2), "term CWTM takes no argument 'temperature'"),
        (dict(type="DKPP", temperature=0), "temperature must be > 0"),
        (dict(type="DKPP", focus=1), "term DKPP takes no argument 'focus'"),
        (dict(type="DKPP", background_weight=1.5), "term DKPP takes no argument 'background_weight'"),
    ],
)
def test_wrong_settings(spec: dict, message: str):
    with pytest.raises(DistillError) as error:
        build_terms([spec])
    assert message in str(error.value) and "\n" not in str(error.value)


def test_recipes():
    (cwtm,), (dkpp,) = (build_terms(expand_recipe(name, RECIPES)) for name in ("cwtm", "dkpp"))
    assert (type(cwtm), cwtm.weight, cwtm.host_share) == (CWTM, 1, 0)
    assert (type(dkpp), dkpp.weight, dkpp.host_share, dkpp.temperature) == (DKPP, 1, 0, 1)


def test_a_term_trains_the_student_alone():
    torch.manual_seed(0)
    x, labels = torch.randn(16, 4), torch.arange(16) % 3
    model = Distiller(nn.Linear(4, 3), nn.Linear(4, 3), ["CWTM", "DKPP"], x)
    kept = {name: value.clone() for name, value in model.teacher.model.state_dict().items()}
    optimizer = torch.optim.Adam(model.parameters(), 0.05)
    values = []
    for _ in range(60):
        loss = model(x, targets=labels).losses["distill.cwtm.loss"]
        values.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert values[-1] < 0.9 * values[0]
    assert all(torch.equal(kept[name], value) for name, value in model.teacher.model.state_dict().items())
