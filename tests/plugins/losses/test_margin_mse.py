"""Margin-MSE."""

from __future__ import annotations

import pytest
import torch

import golden.text
from kdgraft import DistillError
from kdgraft.losses import margin_mse


def test_authors_figures():
    student, teacher = golden.text.candidates()
    figure = golden.text.figure(margin_mse(student.requires_grad_(), teacher), student)
    assert figure == pytest.approx(golden.text.MARGIN, rel=1e-12)


def test_by_hand():
    # Margins 2 and 1 against 5 and −1: ((2 − 5)² + (1 + 1)²) / 2 = 6.5; then 0 against 0.
    student = torch.tensor([[3.0, 1.0, 2.0], [4.0, 4.0, 4.0]])
    teacher = torch.tensor([[5.0, 0.0, 6.0], [9.0, 9.0, 9.0]])
    assert margin_mse(student, teacher, reduction="none").tolist() == [6.5, 0.0]
    assert margin_mse(student, teacher).item() == 3.25


def test_only_margins_within_a_query_matter():
    student, teacher = golden.text.candidates()
    shifts = torch.linspace(-40.0, 40.0, 6, dtype=torch.float64)[:, None]
    value = margin_mse(student, teacher)
    torch.testing.assert_close(margin_mse(student + shifts, teacher - 3 * shifts), value)
    assert margin_mse(teacher + shifts, teacher).item() == pytest.approx(0, abs=1e-20)
    # The first candidate is the relevant one: the order of the others does not matter, and which one is first does.
    three = torch.cat([student, teacher], 1)
    other = three.flip(0)
    swapped = [x[:, [0, 2, 1, 3]] for x in (three, other)]
    torch.testing.assert_close(margin_mse(*swapped), margin_mse(three, other))
    assert margin_mse(three.flip(1), other.flip(1)).item() != pytest.approx(margin_mse(three, other).item())


def test_one_candidate_has_no_margin():
    with pytest.raises(DistillError, match=r"two candidates or more of a query, got \(4, 1\)"):
        margin_mse(torch.zeros(4, 1), torch.zeros(4, 1))
