"""Attention transfer by activations."""

from __future__ import annotations

import math

import pytest
import torch

import golden.dense
from kdgraft import AttentionTransfer, Distiller, DistillError, WiringError
from kdgraft.losses import attention_transfer
from support.tensors import gradient

# szagoruyko/attention-transfer@893df5488f93691799f082a70e2521a9dc2ddf2d: utils.py, at_loss, in float64: value, gradient at the
# student's first number, sum of the squared gradients.
AUTHORS = (0.015040724573362956, -9.808612596372016e-05, 5.1141600415243494e-05)


def test_authors_figures():
    student, teacher = golden.dense.features()
    value = attention_transfer(student.requires_grad_(), teacher)
    slope = gradient(value, student)
    figures = [value.item(), slope[0, 0, 0, 0].item(), slope.square().sum().item()]
    assert figures == pytest.approx(AUTHORS, rel=1e-10)


def test_two_positions_by_hand():
    # Mean squares 3 and 4, as a unit vector 0.6 and 0.8, against 1 and 0: differences −0.4 and 0.8, squares 0.16 and 0.64.
    student = torch.tensor([[[[math.sqrt(6), 2.0]], [[0.0, 2.0]]]])
    teacher = torch.tensor([[[[7.0, 0.0]]]])
    assert attention_transfer(student, teacher).item() == pytest.approx(0.4, rel=1e-6)
    assert attention_transfer(student, teacher, variant="paper").item() == pytest.approx(math.sqrt(0.8) / 2, rel=1e-6)


@pytest.mark.parametrize("variant", ["code", "paper"])
def test_neither_scale_nor_sign_nor_order_of_channels_matters(variant):
    student, teacher = golden.dense.features()
    expected = attention_transfer(student, teacher, variant=variant)
    torch.testing.assert_close(attention_transfer(-1e9 * student.flip(1), teacher, variant=variant), expected)


def test_padding_changes_nothing():
    student, teacher = golden.dense.features()
    valid = torch.ones(2, 5, 4)
    valid[:, :, 3] = 0
    cut = attention_transfer(student[..., :3], teacher[..., :3])
    torch.testing.assert_close(attention_transfer(student, teacher, valid=valid), cut)


def test_mistakes():
    student, teacher = golden.dense.features()
    with pytest.raises(DistillError, match="must lie on one grid"):
        attention_transfer(student[..., :3], teacher)
    with pytest.raises(DistillError, match="variant must be 'code' or 'paper'"):
        attention_transfer(student, teacher, variant="fast")


def test_in_plain_pytorch_of_any_two_widths():
    torch.manual_seed(0)
    student, teacher = (torch.nn.Sequential(torch.nn.Conv2d(3, width, 3), torch.nn.Flatten()) for width in (4, 9))
    images = torch.randn(2, 3, 8, 8)
    distiller = Distiller(student, teacher, [AttentionTransfer("0")], images)
    torch.testing.assert_close(
        distiller(images).loss, 1000 * attention_transfer(student[0](images), teacher[0](images))
    )
    assert not list(distiller.terms.parameters())
    with pytest.raises(WiringError, match=r"must be maps \(B, C, H, W\)"):
        Distiller(student, teacher, [AttentionTransfer("1")], images)
