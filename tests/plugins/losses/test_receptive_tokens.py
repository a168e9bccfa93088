"""Receptive tokens: their masks, what they learn by, and the errors within the masks."""

from __future__ import annotations

import math

import pytest
import torch

import golden.dense
from kdgraft import DistillError
from kdgraft.losses import masked_imitation
from kdgraft.losses.receptive_tokens import ReceptiveTokens, mask_overlap, unmasked_share
from support.tensors import gradient

# hunto/MasKD@b5af34fe343f1b82689291871f85b97a6aea4278, in float64 on maps(), three tokens, filled by fill(): value, gradient at the
# student's first number, sum of the squared gradients. mmrazor/mmrazor/models/losses/maskd.py, MasKDLoss before and after its
# custom_mask_warmup; segmentation/losses/maskd.py, which halves the loss and adds 1e-5 to the areas of the masks.
DETECTION = (1.8286303067184853, -0.0070937855189234615, 0.038973839934614854)
STUDENTS_MASKS = (0.957874695875345, -0.008750082006457457, 0.01324308034153492)
SEGMENTATION = (0.9248996352452905, -0.001979192646507886, 0.00812918133266918)
DICE = 0.7727699517107944
# The same MaskModules on the teacher's map: the first number of the masked features, and the sum of their squares.
MASKED = {True: (1.1057554081069563, 145.1643719295796), False: (2.220913750639316, 1353.4462280394239)}


def maps() -> tuple[torch.Tensor, torch.Tensor]:
    """Maps of student and teacher, ``(2, 6, 5, 4)``."""
    return golden.dense.chirp((2, 6, 5, 4), 0.41, 0.6, 1.2), golden.dense.features()[1]


def tokens(weigh: bool = True) -> ReceptiveTokens:
    module = ReceptiveTokens(6, 3, weigh)
    golden.dense.fill(module)
    return module


@pytest.mark.parametrize("which", ["teacher's masks", "both masks", "segmentation"])
def test_authors_figures(which: str):
    student, teacher = maps()
    module = tokens(which != "segmentation")
    masks = module.masks(teacher) * (module.masks(student) if which == "both masks" else 1)
    value = masked_imitation(student.requires_grad_(), teacher, masks, shares=module.shares(teacher))
    slope = gradient(value, student)
    found = [value.item(), slope[0, 0, 0, 0].item(), slope.square().sum().item()]
    if which == "segmentation":
        assert [found[0] / 2, found[1] / 2, found[2] / 4] == pytest.approx(SEGMENTATION, rel=1e-5)
    else:
        assert found == pytest.approx(STUDENTS_MASKS if which == "both masks" else DETECTION, rel=1e-10)


def test_the_overlap_is_the_authors():
    assert tokens().errors(maps()[1])["overlap"].mean().item() == pytest.approx(DICE, rel=1e-10)


@pytest.mark.parametrize("weigh", [True, False])
def test_the_masked_features_are_the_authors(weigh: bool):
    kept, overlap = tokens(weigh).masked(maps()[1])
    assert [kept[0, 0, 0, 0].item(), kept.square().sum().item()] == pytest.approx(MASKED[weigh], rel=1e-10)
    assert overlap.mean().item() == pytest.approx(DICE, rel=1e-10)


def test_two_masks_by_hand():
    # Squared errors 4 and 1, means over two channels 2.5 and 0.5: masks (1, 0.5) and (0, 0.5).
    difference = torch.tensor([[[[2.0, 1.0]], [[1.0, 0.0]]]])
    masks = torch.tensor([[[[1.0, 0.5]], [[0.0, 0.5]]]])
    first, second = (2.5 + 0.25 * 0.5) / 1.5, 0.25 * 0.5 / 0.5
    zero = torch.zeros_like(difference)
    assert masked_imitation(difference, zero, masks).item() == pytest.approx((first + second) / 2)
    shares = torch.tensor([[0.9, 0.1]])
    assert masked_imitation(difference, zero, masks, shares=shares).item() == pytest.approx(0.9 * first + 0.1 * second)
    # Dice 2 · 0.25 / (1.25 + 0.25); the sum of the masks is 1 in both positions.
    assert mask_overlap(masks).item() == pytest.approx(0.5 / 1.5)
    assert unmasked_share([(difference, masks.sum(1))]).item() == 0
    # Half of the second position is missed: energies 5 and 1, (0.25 · 1) / 6.
    assert unmasked_share([(difference, masks[:, 0])]).item() == pytest.approx(0.25 / 6)


def test_a_single_mask_overlaps_nothing_and_masks_without_area_stay_finite():
    assert mask_overlap(torch.rand(2, 1, 3, 3)).tolist() == [0, 0]
    assert mask_overlap(torch.zeros(2, 2, 3, 3)).tolist() == [0, 0]
    student, teacher = (x.requires_grad_() for x in maps())
    value = masked_imitation(student, teacher, torch.zeros(2, 3, 5, 4))
    value.backward()
    assert value == 0 and student.grad.isfinite().all()
    assert unmasked_share([(torch.zeros(1, 2, 3, 3), torch.ones(1, 3, 3))]).item() == 0


def test_padding_changes_nothing_in_masks_shares_and_errors():
    _, teacher = maps()
    wide = torch.nn.functional.pad(teacher, (0, 2, 0, 1), value=math.inf)
    valid = torch.nn.functional.pad(torch.ones(2, 5, 4), (0, 2, 0, 1))
    module = tokens()
    torch.testing.assert_close(module.masks(wide, valid)[..., :5, :4], module.masks(teacher))
    assert not module.masks(wide, valid)[..., 5:, :].any()
    torch.testing.assert_close(module.shares(wide, valid), module.shares(teacher))
    torch.testing.assert_close(module.errors(wide, valid), module.errors(teacher))


def test_tokens_learn_masks_that_do_not_overlap_and_keep_the_features():
    torch.manual_seed(0)
    teacher = torch.zeros(1, 4, 6, 6)
    teacher[:, 0, :3], teacher[:, 1, 3:] = 2, 2  # two regions
    module = ReceptiveTokens(4, 2)
    optimizer = torch.optim.Adam(module.parameters(), 0.05)
    first = {name: value.item() for name, value in module.errors(teacher).items()}
    for _ in range(150):
        errors = module.errors(teacher)
        optimizer.zero_grad()
        torch.stack(list(errors.values())).sum().backward()
        optimizer.step()
    assert sum(value.item() for value in errors.values()) < 0.2 < 0.9 < sum(first.values())
    masks = module.masks(teacher)[0]
    assert sorted(masks[:, 0, 0].round().tolist()) == [0, 1]


def test_mistakes():
    student, teacher = maps()
    with pytest.raises(DistillError, match="must have the same shape"):
        masked_imitation(student[:, :3], teacher, torch.ones(2, 1, 5, 4))
