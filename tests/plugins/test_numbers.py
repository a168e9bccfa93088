"""Terms on regressed numbers in plain PyTorch: bounded and plain regression."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from kdgraft import BoundedRegression, Distiller, DistillError, Ensemble, Peer, Teacher, WiringError
from kdgraft.losses import bounded_regression
from kdgraft.terms import build_terms
from support.tensors import Emit

EXAMPLE = torch.zeros(1, 1)
STUDENT = torch.tensor([[3.0, 0.0], [1.0, 1.0], [0.0, 5.0]])
TEACHER = torch.tensor([[5.0, 0.0], [1.0, 2.0], [0.0, 4.5]])
TRUTH = torch.tensor([[4.0, 0.0], [1.0, 4.0], [1.0, 5.0]])
# Squared distances to the truth: student 1, 9, 1; teacher 1, 4, 1.25. The third student is better than its teacher.


def distil(student: Tensor, teacher: Tensor, **settings: object) -> Distiller:
    term = BoundedRegression(**{"weight": 1.0, **settings})
    return Distiller(Emit(student.clone()), Emit(teacher.clone()), [term], EXAMPLE)


@pytest.mark.parametrize(("margin", "expected"), [(0, 3), (0.2, 10 / 3), (0.3, 11 / 3)])
def test_only_items_that_are_no_better_than_the_teacher_count(margin: float, expected: float):
    distiller = distil(STUDENT, TEACHER, margin=margin)
    loss = distiller(EXAMPLE, targets=TRUTH).loss
    assert loss.item() == pytest.approx(expected)
    loss.backward()
    slope = 2 * (STUDENT - TRUTH) / 3
    slope[0] *= margin > 0  # as far as the teacher
    slope[2] *= margin > 0.25
    torch.testing.assert_close(distiller.student.value.grad, slope)


def test_without_a_bound_it_is_the_squared_distance_to_the_teacher():
    # 4, 1 and 0.25; the truth is not needed.
    for targets in (None, TRUTH, torch.tensor([0, 1, 2])):
        distiller = distil(STUDENT, TEACHER, bounded=False)
        loss = distiller(EXAMPLE, targets=targets).loss
        assert loss.item() == pytest.approx(5.25 / 3)
        loss.backward()
        torch.testing.assert_close(distiller.student.value.grad, 2 * (STUDENT - TEACHER) / 3)


@pytest.mark.parametrize("shape", [(3,), (3, 1), (1, 3, 1)])
def test_one_number_an_item(shape: tuple[int, ...]):
    student, teacher, truth = (x[:, 0].reshape(shape) for x in (STUDENT, TEACHER, TRUTH))
    expected = bounded_regression(*(x.reshape(-1, 1) for x in (student, teacher, truth)))
    for targets in (truth, truth[..., 0]) if shape[-1] == 1 else (truth,):
        torch.testing.assert_close(distil(student, teacher)(EXAMPLE, targets=targets).loss, expected)


def test_whole_numbers_are_targets_too():
    found = distil(STUDENT, TEACHER)(EXAMPLE, targets=TRUTH.long()).loss
    torch.testing.assert_close(found, distil(STUDENT, TEACHER)(EXAMPLE, targets=TRUTH).loss)


def test_half_precision_computes_in_float32():
    student, teacher = (STUDENT * 1000).half(), (TEACHER * 1000).half()
    assert distil(student, teacher, bounded=False)(EXAMPLE).loss.item() == pytest.approx(1e6 * 5.25 / 3, rel=1e-3)
    assert distil(student, teacher)(EXAMPLE, targets=TRUTH * 1000).loss.item() == pytest.approx(3e6, rel=1e-3)


def test_taps_and_sources():
    class Both(nn.Module):
        def __init__(self, value: Tensor) -> None:
            super().__init__()
            self.boxes, self.other = Emit(value.clone()), nn.Linear(1, 2)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"classes": self.other(x), "boxes": self.boxes(x)}

    for tap in ("[boxes]", "boxes"):
        distiller = Distiller(Both(STUDENT), Both(TEACHER), [BoundedRegression(tap=tap, weight=1)], EXAMPLE)
        assert distiller(EXAMPLE, targets=TRUTH).loss.item() == pytest.approx(3)
    sources = dict(a=Teacher(Emit(TEACHER - 1)), b=Teacher(Emit(TEACHER + 1)), both=Ensemble(["a", "b"]))
    terms = [BoundedRegression(weight=1, source="both")]
    mean = Distiller(Emit(STUDENT.clone()), terms=terms, example=EXAMPLE, teachers=sources)
    assert mean(EXAMPLE, targets=TRUTH).loss.item() == pytest.approx(3)
    peers = Distiller(Emit(STUDENT.clone()), Peer(Emit(TEACHER.clone())), [BoundedRegression(weight=1)], EXAMPLE)
    twin = peers(EXAMPLE, targets=TRUTH).losses["distill.bounded_regression_of_teacher.loss"]
    assert twin.item() == pytest.approx(1.25 / 3)  # only the third is worse than the student


def test_what_cannot_be_compared():
    with pytest.raises(WiringError, match=r"student \(output\) \(3, 2\) and teacher .* \(3, 1\) must agree"):
        distil(STUDENT, TEACHER[:, :1])
    with pytest.raises(
        DistillError, match=r"bounded_regression needs the true numbers, and the batch has none; add them"
    ):
        distil(STUDENT, TEACHER)(EXAMPLE)
    with pytest.raises(DistillError, match=r"targets \(2, 2\) do not give a number for each of the outputs \(3, 2\)"):
        distil(STUDENT, TEACHER)(EXAMPLE, targets=TRUTH[:2])
    with pytest.raises(DistillError, match=r"targets \(3,\) do not give a number"):
        distil(STUDENT, TEACHER)(EXAMPLE, targets=TRUTH[:, 0])


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (dict(margin=-1), "BoundedRegression: margin must be a number >= 0"),
        (dict(bounded="no"), "BoundedRegression: bounded must be true or false, got 'no'"),
        (dict(bounded=False, margin=1), "margin is for the bound; leave it out with bounded=False"),
        (dict(head="bbox_head"), "term BoundedRegression takes no argument 'head'"),
        (dict(independent=True), "term BoundedRegression takes no argument 'independent'"),
    ],
)
def test_wrong_settings(spec: dict, message: str):
    with pytest.raises(DistillError) as error:
        build_terms([dict(type="BoundedRegression", **spec)])
    assert message in str(error.value) and "\n" not in str(error.value)
