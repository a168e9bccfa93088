"""Teacher-bounded regression: by hand, its bound, and what it shares with every loss (other arguments than theirs)."""

from __future__ import annotations

import pytest
import torch

from kdgraft import DistillError
from kdgraft.losses import bounded_regression

TRUTH = torch.zeros(4, 4, dtype=torch.float64)
# Squared errors: student 1, 4, 0.25, 1; teacher 4, 1, 0.25, 0.
STUDENT = torch.tensor([[1.0, 0, 0, 0], [1, 1, 1, 1], [0.5, 0, 0, 0], [0, 0, 0, -1]], dtype=torch.float64)
TEACHER = torch.tensor([[2.0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0.5, 0], [0, 0, 0, 0]], dtype=torch.float64)


@pytest.mark.parametrize(
    ("margin", "expected"),
    [
        (0.0, [0, 4, 0, 1]),  # the first is better than its teacher, the third just as good
        (0.1, [0, 4, 0.25, 1]),  # 0.25 + 0.1 > 0.25
        (3.5, [1, 4, 0.25, 1]),  # 1 + 3.5 > 4
    ],
)
def test_by_hand(margin, expected):
    assert bounded_regression(STUDENT, TEACHER, TRUTH, margin=margin, reduction="none").tolist() == expected
    assert bounded_regression(STUDENT, TEACHER, TRUTH, margin=margin).item() == pytest.approx(sum(expected) / 4)
    weight = torch.tensor([1.0, 0.5, 1, 0])
    weighted = sum(w * e for w, e in zip(weight.tolist(), expected, strict=True))
    found = bounded_regression(STUDENT, TEACHER, TRUTH, margin=margin, weight=weight)
    assert found.item() == pytest.approx(weighted / 2.5)


def test_the_gradient_points_to_the_truth_and_never_to_the_teacher():
    student = STUDENT.clone().requires_grad_()
    teacher = TEACHER.clone().requires_grad_()
    bounded_regression(student, teacher, TRUTH, reduction="sum").backward()
    assert torch.equal(student.grad[1], 2 * STUDENT[1]) and torch.equal(student.grad[3], 2 * STUDENT[3])
    assert not student.grad[[0, 2]].any()
    assert teacher.grad is None or not teacher.grad.any()
    small = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda s: bounded_regression(s, torch.zeros(3, 4).double(), torch.ones(3, 4).double()), small
    )


def test_an_infinite_teacher_bounds_nothing_in():
    teacher = torch.full((1, 4), torch.inf)
    student = torch.ones(1, 4, requires_grad=True)
    value = bounded_regression(student, teacher, torch.zeros(1, 4))
    value.backward()
    assert value.item() == 0 and not student.grad.any()


@pytest.mark.parametrize("infinite", ["truth", "both"])
def test_what_is_infinite_for_both_leaves_no_gradient(infinite):
    # A true box without width has an infinite delta; in fp16 both models may overflow.
    student, teacher, truth = torch.zeros(2, 4), torch.ones(2, 4), torch.full((2, 4), 0.5)
    if infinite == "truth":
        truth[0, 2:] = -torch.inf
    else:
        student[0, 1] = teacher[0, 1] = torch.inf
    student.requires_grad_()
    value = bounded_regression(student, teacher, truth, margin=1.0)
    assert value.item() == 0.5  # (0 + 4 · 0.5²) / 2
    value.backward()
    torch.testing.assert_close(student.grad, torch.tensor([[0.0] * 4, [-0.5] * 4]))


def test_a_teacher_that_is_no_number_shows():
    teacher = torch.tensor([[0.0, 0, 0, 0], [torch.nan, 0, 0, 0]])
    items = bounded_regression(torch.ones(2, 4), teacher, torch.zeros(2, 4), reduction="none")
    assert items[0] == 4 and items[1].isnan()
    kept = bounded_regression(torch.ones(2, 4), teacher, torch.zeros(2, 4), weight=torch.tensor([1.0, 0.0]))
    assert kept == 4  # at weight 0 nothing counts


def test_errors():
    with pytest.raises(DistillError, match="margin must be a number >= 0, got -1"):
        bounded_regression(STUDENT, TEACHER, TRUTH, margin=-1)
    with pytest.raises(DistillError, match="targets"):
        bounded_regression(STUDENT, TEACHER, TRUTH[:1])
