"""GOLD: shared entries of two vocabularies by divergence, the others by their sorted probabilities."""

from __future__ import annotations

import math

import pytest
import torch

import golden.text
from kdgraft import DistillError
from kdgraft.losses import generalized_jsd, gold, universal_logits


@pytest.mark.parametrize("beta", golden.text.GOLD)
def test_figures_of_trl(beta):
    student, teacher = golden.text.vocabularies()
    value = gold(student.requires_grad_(), teacher, golden.text.shared(), beta=beta)
    assert golden.text.figure(value, student)[::2] == pytest.approx(golden.text.GOLD[beta][::2], rel=1e-12)
    (slope,) = torch.autograd.grad(gold(student, teacher, golden.text.shared(), beta=beta), student)
    assert slope[0, 0, -1].item() == pytest.approx(golden.text.GOLD[beta][1], rel=1e-12)


def test_by_hand():
    # Student ½ ¼ ¼, teacher ¼ ½ ⅛ ⅛; entry 0 of the student is entry 1 of the teacher, ½ each: no divergence. The others, sorted:
    # ¼ ¼ 0 and ¼ ⅛ ⅛, distance ¼; one of the teacher's four entries is shared: ¾ · ¼.
    student = torch.tensor([[0.5, 0.25, 0.25]]).log()
    teacher = torch.tensor([[0.25, 0.5, 0.125, 0.125]]).log()
    shared = torch.tensor([[0, 1]])
    assert gold(student, teacher, shared).item() == pytest.approx(0.75 * 0.25)
    # Half the teacher's mass by its share: KL ¼ log(¼ / ½) on the shared entry, and ¼ ¼ 0 to ⅛ 1/16 1/16: 3/8.
    half = torch.tensor([0.5])
    value = gold(student, teacher, shared, teacher_share=half, beta=0.0, shared_weight=0.5)
    assert value.item() == pytest.approx(0.5 * 0.25 * math.log(0.5) + 0.5 * (0.125 + 0.1875 + 0.0625))


def test_nothing_and_everything_shared():
    student, teacher = golden.text.vocabularies()
    none = torch.zeros(0, 2, dtype=torch.long)
    torch.testing.assert_close(gold(student, teacher, none), universal_logits(student, teacher))
    every = torch.arange(7)[:, None].expand(7, 2)
    same = gold(student, teacher[..., :7], every)
    torch.testing.assert_close(
        same, generalized_jsd(student, teacher[..., :7], 0.5), rtol=1e-5, atol=0
    )  # but for the floor


def test_entries_may_be_in_another_order():
    student, teacher = golden.text.vocabularies()
    expected = gold(student, teacher, golden.text.shared())
    order = torch.randperm(10, generator=torch.Generator().manual_seed(0))
    moved = golden.text.shared().clone()
    moved[:, 1] = order.argsort()[moved[:, 1]]
    torch.testing.assert_close(gold(student, teacher[..., order], moved), expected)
    torch.testing.assert_close(gold(student, teacher, golden.text.shared().flip(0)), expected)


def test_settings_are_checked():
    student, teacher = golden.text.vocabularies()
    with pytest.raises(DistillError, match=r"shared must be \(M, 2\), got \(4,\)"):
        gold(student, teacher, torch.arange(4))
    with pytest.raises(DistillError, match="beta must be"):
        gold(student, teacher, golden.text.shared(), beta=1.5)
    with pytest.raises(DistillError, match="shared_weight must be"):
        gold(student, teacher, golden.text.shared(), shared_weight=-0.1)
