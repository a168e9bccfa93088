"""Frequency distillation: the transform, the prompts' masks, and the errors of the bands."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import golden.dense
from kdgraft import DistillError
from kdgraft.losses import frequency_imitation
from kdgraft.losses.frequency import FrequencyPrompts, haar_bands, haar_maps, halved
from support.tensors import gradient

# Gumpest/FreeKD@e0874f5da980e762577cfb472e76d895ef7261a8: mmrazor/models/losses/freekd.py with pytorch_wavelets 1.3.0, on maps(size)
# with two prompts, filled by fill(): value, gradient at the student's first number, sum of the squared gradients, and the Dice loss
# of the prompts. The transform's filters are in float32.
FREEKD = {
    (16, 8): ((1.9695466860467201, 0.002091672651346636, 0.00940332379427454), 1.8507774524728888),
    (11, 7): ((1.50838877938746, -0.0013048549461392024, 0.00847554141529872), 2.044090818614243),
}
# The same: squared error of the teacher's map, restored by the inverse transform from its masked bands, over its squares.
RESTORED = [0.043203320305501086, 0.0288672129431605]


def maps(size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Maps of student and teacher, ``(2, 3, H, W)``."""
    return golden.dense.chirp((2, 3, *size), 0.41, 0.6, 1.2), golden.dense.chirp((2, 3, *size), 0.53, 0.9, 2.0)


def prompts() -> FrequencyPrompts:
    module = FrequencyPrompts(3, 2)
    golden.dense.fill(module)
    return module


@pytest.mark.parametrize("size", FREEKD, ids=str)
def test_authors_figures(size: tuple[int, int]):
    student, teacher = maps(size)
    expected, dice = FREEKD[size]
    value = frequency_imitation(student.requires_grad_(), teacher, prompts().masks(teacher))
    slope = gradient(value, student)
    assert [value.item(), slope[0, 0, 0, 0].item(), slope.square().sum().item()] == pytest.approx(expected, rel=1e-6)
    assert prompts().errors(teacher)["overlap"].mean().item() == pytest.approx(dice, rel=1e-6)


def test_what_the_bands_miss_is_what_the_restored_map_misses():
    assert prompts().errors(maps((16, 8))[1])["unmasked"].tolist() == pytest.approx(RESTORED, rel=1e-6)


def test_four_numbers_by_hand():
    low, (high,) = haar_bands(torch.tensor([[[[1.0, 2.0], [3.0, 8.0]]]]), 1)
    assert low.flatten().tolist() == [7]  # (1 + 2 + 3 + 8) / 2
    # Upper minus lower row, left minus right column, one diagonal minus the other.
    assert high.flatten().tolist() == [(3 - 11) / 2, (4 - 10) / 2, (9 - 5) / 2]
    masks = [torch.tensor([[[[0.5]], [[1.0]]]])]
    found = frequency_imitation(torch.tensor([[[[1.0, 2.0], [3.0, 8.0]]]]), torch.zeros(1, 1, 2, 2), masks)
    assert found.item() == pytest.approx((4 + 3 + 2) / 3 * 0.75)


def test_the_transform_keeps_the_energy_and_a_constant_has_no_high_band():
    _, teacher = maps((11, 7))
    low, high = haar_bands(teacher)
    energy = low.square().sum() + torch.stack([level.square().sum() for level in high]).sum()
    torch.testing.assert_close(energy, teacher.square().sum())
    assert [tuple(level.shape[2:]) for level in high] == [(3, 6, 4), (3, 3, 2), (3, 2, 1)]
    assert not any(level.any() for level in haar_bands(torch.ones(1, 1, 8, 8))[1])


def test_padding_changes_nothing():
    student, teacher = maps((11, 7))
    wide = [torch.nn.functional.pad(x, (0, 6, 0, 9), value=math.nan) for x in (student, teacher)]
    valid = torch.nn.functional.pad(torch.ones(2, 11, 7), (0, 6, 0, 9))
    module = prompts()
    found = frequency_imitation(*wide, module.masks(wide[1], valid), valid=valid)
    torch.testing.assert_close(found, frequency_imitation(student, teacher, module.masks(teacher)))
    torch.testing.assert_close(module.errors(wide[1], valid), module.errors(teacher))


@pytest.mark.parametrize("size", [(16, 8), (11, 7), (1, 5)], ids=str)
def test_the_bands_restore_the_maps(size: tuple[int, int]):
    _, teacher = maps(size)
    torch.testing.assert_close(haar_maps(haar_bands(teacher), size), teacher)


def test_the_masked_map_is_the_authors():
    _, teacher = maps((16, 8))
    kept, overlap = prompts().masked(teacher)
    shares = (kept - teacher).square().flatten(1).sum(1) / teacher.square().flatten(1).sum(1)
    assert shares.tolist() == pytest.approx(RESTORED, rel=1e-6)
    torch.testing.assert_close(overlap, prompts().errors(teacher)["overlap"])


def test_a_coefficient_counts_if_a_valid_position_contributes():
    valid = torch.zeros(1, 5, 4)
    valid[0, 2, 3] = 1
    assert [None if own is None else own[0].nonzero().tolist() for own in halved(valid)] == [
        [[1, 1]],
        [[0, 0]],
        [[0, 0]],
    ]
    assert halved(None, 2) == [None, None]


def test_mistakes():
    student, teacher = maps((8, 8))
    with pytest.raises(DistillError, match="must have the same shape"):
        frequency_imitation(student[:, :2], teacher, [torch.ones(2, 1, 4, 4)])
    with pytest.raises(DistillError, match="needs the masks of at least one level"):
        frequency_imitation(student, teacher, [])
