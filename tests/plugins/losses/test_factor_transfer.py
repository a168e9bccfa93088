"""Factor transfer."""

from __future__ import annotations

import math

import pytest
import torch

import golden.dense
from kdgraft import DistillError
from kdgraft.losses import factor_transfer
from kdgraft.losses.factor_transfer import Paraphraser, Translator
from support.tensors import gradient

# Jangho-Kim/Factor-Transfer-pytorch@19cce265ebe51c751481041e223a13be2e684322: Models/FeatureProjection.py and utils.py in float64
# on golden.dense.features(), six channels to three factors, modules filled by fill(): value, gradient at the first number of the
# first weight or of the student, sum of the squared gradients.
RECONSTRUCTION = (5.09640854236511, -0.7794040649141151, 127.62531459883691)
TRANSFER = (0.09125087666755931, 0.0006710784995968858, 0.00020309379189312237)


def networks() -> tuple[Paraphraser, Translator]:
    paraphraser, translator = Paraphraser(6, 3), Translator(3, 3)
    golden.dense.fill(paraphraser), golden.dense.fill(translator)
    return paraphraser, translator


def test_authors_figures():
    student, teacher = golden.dense.features()
    paraphraser, translator = networks()
    value = paraphraser.errors(teacher).mean()
    slope = gradient(value, next(paraphraser.parameters()))
    assert [value.item(), slope[0, 0, 0, 0].item(), slope.square().sum().item()] == pytest.approx(
        RECONSTRUCTION, rel=1e-10
    )
    value = factor_transfer(translator(student.requires_grad_()), paraphraser.encode(teacher))
    slope = gradient(value, student)
    assert [value.item(), slope[0, 0, 0, 0].item(), slope.square().sum().item()] == pytest.approx(TRANSFER, rel=1e-10)


def test_four_numbers_by_hand():
    # (3, 4) / 5 against (1, 0): differences −0.4 and 0.8; the second position is 0 in both.
    student = torch.tensor([[[[3.0, 0.0]], [[4.0, 0.0]]]])
    teacher = torch.tensor([[[[7.0, 0.0]], [[0.0, 0.0]]]])
    assert factor_transfer(student, teacher).item() == pytest.approx(1.2 / 4, rel=1e-6)
    assert factor_transfer(student, teacher, variant="paper").item() == pytest.approx(1.2, rel=1e-6)
    first = torch.tensor([[[1, 0]]])
    assert factor_transfer(student, teacher, valid=first).item() == pytest.approx(1.2 / 2, rel=1e-6)


def test_padding_changes_nothing_even_through_the_convolutions():
    student, teacher = (torch.nn.functional.pad(x, (0, 2, 0, 1), value=math.inf) for x in golden.dense.features())
    valid = torch.zeros(2, 6, 6)
    valid[:, :5, :4] = 1
    paraphraser, translator = networks()
    cut = [x[..., :5, :4] for x in (student, teacher)]
    torch.testing.assert_close(paraphraser.errors(teacher, valid), paraphraser.errors(cut[1]))
    found = factor_transfer(translator(student, valid), paraphraser.encode(teacher, valid), valid=valid)
    torch.testing.assert_close(found, factor_transfer(translator(cut[0]), paraphraser.encode(cut[1])))


def test_mistakes():
    student, teacher = golden.dense.features()
    with pytest.raises(DistillError, match="must have the same shape"):
        factor_transfer(student, teacher)
    with pytest.raises(DistillError, match="variant must be 'code' or 'paper'"):
        factor_transfer(teacher, teacher, variant="fast")
