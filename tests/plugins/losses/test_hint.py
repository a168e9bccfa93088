"""Hint."""

from __future__ import annotations

import pytest
import torch

import golden
from kdgraft import DistillError
from kdgraft.adapters import ConvAdapter
from kdgraft.losses import hint


def test_authors_figure():
    assert hint(*golden.features()).item() == pytest.approx(golden.HINT, rel=1e-10)


def test_authors_figure_behind_a_regressor():
    student, teacher, weight, bias = golden.regressor()
    adapter = ConvAdapter(3, 6).double()
    adapter.load_state_dict({"project.weight": weight, "project.bias": bias})
    assert hint(adapter(student, teacher), teacher).item() == pytest.approx(golden.HINT_REGRESSOR, rel=1e-10)


def test_by_hand():
    # One image of 1×2 positions and two channels; student − teacher: (1, −2) and (3, 0) per position.
    student = torch.tensor([[[[1.0, 3.0]], [[-2.0, 0.0]]]])
    teacher = torch.zeros_like(student)
    assert hint(student, teacher, reduction="none").tolist() == [[[2.5, 4.5]]]  # (1 + 4) / 2, (9 + 0) / 2
    assert hint(student, teacher, norm="l1", reduction="none").tolist() == [[[1.5, 1.5]]]
    assert hint(student, teacher).item() == 3.5
    # Weights 3 and 1: (7.5 + 4.5) / 4
    assert hint(student, teacher, weight=torch.tensor([[[3.0, 1.0]]])).item() == 3


def test_vectors():
    student, teacher = golden.logits()
    items = hint(student, teacher, dim=-1, reduction="none")
    assert items.shape == (5,)
    assert hint(student, teacher, dim=-1).item() == pytest.approx(golden.LOGITS_MSE, rel=1e-10)


def test_symmetric():
    student, teacher = golden.features()
    torch.testing.assert_close(hint(student, teacher), hint(teacher, student))


def test_scale():
    student, teacher = golden.features()
    torch.testing.assert_close(hint(3 * student, 3 * teacher), 9 * hint(student, teacher))
    torch.testing.assert_close(hint(3 * student, 3 * teacher, norm="l1"), 3 * hint(student, teacher, norm="l1"))


def test_unknown_norm():
    with pytest.raises(DistillError, match="norm must be 'l2' or 'l1', got 'huber'"):
        hint(*golden.features(), norm="huber")
