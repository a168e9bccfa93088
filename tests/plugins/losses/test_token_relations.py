"""Token relations."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

import golden.text
from kdgraft import DistillError
from kdgraft.losses import attention_distributions, token_relations
from support.tensors import gradient

TOKENS = golden.text.tokens()
SETTINGS = {"valid": TOKENS[:, None, None], "weight": TOKENS[:, None]}


def rotation(width: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64)).Q


@pytest.mark.parametrize("heads", golden.text.RELATIONS)
def test_figures(heads: int):
    # Theirs is the mean over sequences of the mean over a sequence's rows: each row weighs 1 / its sequence's tokens.
    student, teacher = golden.text.vectors()
    weight = TOKENS[:, None] / TOKENS.sum(1)[:, None, None]
    value = token_relations(student.requires_grad_(), teacher, heads, valid=SETTINGS["valid"], weight=weight)
    np.testing.assert_allclose(golden.text.figure(value, student), golden.text.RELATIONS[heads], rtol=1e-6)


def test_one_head_by_hand():
    # Student of width 1: vectors 0 and 0, all relations 0: ½ and ½. Teacher of width 4, √d = 2: first vector a, second
    # 0, with a·a / 2 = ln 3: first row ln 3 and 0: ¾ and ¼, KL = ¾ ln 1.5 − ¼ ln 2 = 0.130812; second row 0 and 0: 0.
    student, teacher = torch.zeros(1, 2, 1), torch.zeros(1, 2, 4)
    teacher[0, 0, 2] = math.sqrt(2 * math.log(3))
    items = token_relations(student, teacher, 1, reduction="none")
    assert items.shape == (1, 1, 2)
    assert items.flatten().tolist() == pytest.approx([0.130812, 0], abs=1e-6)
    assert token_relations(student, teacher, 1).item() == pytest.approx(0.065406, abs=1e-6)


def test_two_heads_by_hand():
    # The same of two heads of width 2, √d = √2: the first head sees a with a·a / √2 = ln 3, the second nothing.
    student, teacher = torch.zeros(1, 2, 2), torch.zeros(1, 2, 4)
    teacher[0, 0, 1] = math.sqrt(math.sqrt(2) * math.log(3))
    items = token_relations(student, teacher, 2, reduction="none")
    assert items[0].tolist() == [pytest.approx([0.130812, 0], abs=1e-6), [0, 0]]
    # In one head of width 4 the score is ln 3 / √2, which is another figure.
    assert abs(token_relations(student, teacher, 1).item() - 0.065406) > 0.01


def test_direct():
    student, teacher = golden.text.vectors()
    heads = 2
    items = token_relations(student, teacher, heads, reduction="none")
    assert items.shape == (2, heads, 5)
    for head in range(heads):
        s, t = student[..., 4 * head : 4 * head + 4], teacher[..., 6 * head : 6 * head + 6]
        relations = (torch.einsum("bid,bjd->bij", x, x) / math.sqrt(d) for x, d in ((s, 4), (t, 6)))
        torch.testing.assert_close(items[:, head], attention_distributions(*relations, reduction="none"))


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_each_heads_subspace_may_be_rotated(heads: int):
    student, teacher = golden.text.vectors()
    items = token_relations(student, teacher, heads, reduction="none")
    turns = [torch.block_diag(*(rotation(d // heads, head) for head in range(heads))) for d in (8, 12)]
    turned = token_relations(student @ turns[0], teacher @ turns[1], heads, reduction="none")
    torch.testing.assert_close(turned, items)
    # A permutation of the channels across heads is no such rotation.
    if heads > 1:
        mixed = token_relations(student.roll(1, -1), teacher, heads, reduction="none")
        assert (mixed - items).abs().max() > 0.01


def test_a_rotated_copy_costs_nothing_and_a_wider_one_neither():
    _, teacher = golden.text.vectors()
    student = (teacher @ rotation(12, 3)).requires_grad_()
    # 36 more channels of 0 would make the scores smaller by √(12 / 48) = ½, which √2 times the vectors makes up for.
    wider = torch.nn.functional.pad(teacher, (0, 36)) * math.sqrt(2)
    for value in (token_relations(student, teacher, 1), token_relations(wider, teacher, 1)):
        assert value.item() == pytest.approx(0, abs=1e-13)
    slope = gradient(token_relations(student, teacher, 1), student)
    torch.testing.assert_close(slope, torch.zeros_like(student), rtol=0, atol=1e-13)


def test_order_of_the_tokens_and_of_the_heads():
    student, teacher = golden.text.vectors()
    value = token_relations(student, teacher, 2)
    torch.testing.assert_close(token_relations(student.flip(1), teacher.flip(1), 2), value)
    torch.testing.assert_close(token_relations(student.roll(4, -1), teacher.roll(6, -1), 2), value)


def test_sequence_without_a_token():
    student, teacher = golden.text.vectors()
    tokens = TOKENS.clone()
    tokens[1] = False
    student.requires_grad_()
    value = token_relations(student, teacher, 4, valid=tokens[:, None, None], weight=tokens[:, None])
    torch.testing.assert_close(value, token_relations(student[:1], teacher[:1], 4))
    assert not gradient(value, student)[1].any()
    nothing = torch.zeros_like(tokens)
    for settings in ({"valid": nothing[:, None, None]}, {"weight": nothing[:, None]}):
        value = token_relations(student, teacher, 4, **settings)
        assert value.item() == 0
        assert torch.equal(gradient(value, student), torch.zeros_like(student))


def test_zero_vectors_and_a_single_token():
    student, teacher = torch.zeros(2, 5, 8, requires_grad=True), golden.text.vectors()[1].float()
    value = token_relations(student, teacher, 4)
    assert value.item() > 0
    assert torch.equal(gradient(value, student), torch.zeros_like(student))  # every direction is as good
    student = golden.text.vectors()[0][:, :1].requires_grad_()
    value = token_relations(student, teacher[:, :1].double(), 4)
    assert value.item() == 0
    assert torch.equal(gradient(value, student), torch.zeros_like(student))


def test_vectors_that_are_not_contiguous():
    student, teacher = golden.text.vectors()
    expected = token_relations(student, teacher, 2)
    across = student.transpose(1, 2).contiguous().transpose(1, 2)
    torch.testing.assert_close(token_relations(across, teacher, 2), expected)


@pytest.mark.parametrize(
    ("heads", "owner"),
    [(3, "student's width 8"), (8, "teacher's width 12"), (0, "student's width 8"), (-2, "student's")],
)
def test_heads_must_divide_both_widths(heads: int, owner: str):
    with pytest.raises(DistillError, match=rf"token_relations: {heads} relation heads do not divide the {owner}"):
        token_relations(*golden.text.vectors(), heads)


def test_other_numbers_of_tokens():
    student, teacher = golden.text.vectors()
    for other in (teacher[:, :1], teacher[:1]):
        with pytest.raises(DistillError, match="must have the same shape"):
            token_relations(student, other, 2)
