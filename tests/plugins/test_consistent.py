"""Consistent teaching: both models see the same crop and the same mixture; what else there is to compare does not."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from kdgraft import Distiller, DistillError, SoftTargets
from kdgraft.consistent import Noise, Teaching, random_box, seen
from kdgraft.fit import fit

ROWS = torch.arange(16.0)[:, None].expand(16, 16)
PLACES = torch.stack([ROWS, ROWS.T]).expand(6, 2, 16, 16)  # each pixel's row and column
CONSTANT = torch.tensor([0.0, 1.0, 3.0, 7.0])[:, None, None, None].expand(4, 1, 8, 8)


def centres(view: Tensor) -> Tensor:
    """The middle of what each image of a view shows, in pixels of the original."""
    return view.mean((2, 3))


def drawn(mode: str, seed: int = 0, images: Tensor = PLACES, **settings) -> tuple[Tensor, Tensor]:
    torch.manual_seed(seed)
    views, _ = Teaching(mode, **{"mixup": False, **settings})(images, None)
    return views.student, views.of("teacher")


# --- crops


def test_a_crop_by_hand():
    image = torch.arange(16.0).reshape(1, 1, 4, 4)
    two = Noise([(1, 2, 2, 2)], [False], 1.0)
    assert seen(image, two, (2, 2)).tolist() == [[[[6.0, 7.0], [10.0, 11.0]]]]
    assert seen(image, two._replace(flips=[True]), (2, 2)).tolist() == [[[[7.0, 6.0], [11.0, 10.0]]]]
    assert seen(image, two, (1, 1)).tolist() == [[[[8.5]]]]  # the mean of the four
    row = seen(image, Noise([(1, 2, 1, 2)], [False], 1.0), (1, 4))  # bilinear, from 6 to 7: pixel centres at 0, ¼, ¾, 1
    torch.testing.assert_close(row, torch.tensor([[[[6.0, 6.25, 6.75, 7.0]]]]))


def test_crops_have_areas_and_proportions_in_the_limits():
    torch.manual_seed(0)
    boxes = [random_box(120, 100, (0.08, 1.0), (3 / 4, 4 / 3)) for _ in range(400)]
    for top, left, tall, wide in boxes:
        assert 0 <= top <= 120 - tall and 0 <= left <= 100 - wide
        assert 0.73 < wide / tall < 1.37
    areas = torch.tensor([tall * wide / 12000 for _, _, tall, wide in boxes])
    assert areas.min() > 0.075 and areas.min() < 0.1
    # Uniform, but for the large ones that do not fit.
    assert 0.25 < (areas < 0.4).float().mean() < 0.6
    assert random_box(16, 16, (1.0, 1.0), (1.0, 1.0)) == (0, 0, 16, 16)
    assert random_box(4, 64, (1.0, 1.0), (1.0, 1.0)) == (0, 0, 4, 64)  # no such square fits


def test_the_teacher_sees_the_same_crop():
    student, teacher = drawn("consistent")
    assert torch.equal(student, teacher)
    assert len({tuple(middle) for middle in centres(student).tolist()}) == 6  # of each image another one


def test_the_teacher_sees_the_same_crop_at_a_higher_resolution():
    student, teacher = drawn("consistent", size=8, teacher_size=(24, 24))
    assert student.shape[-2:] == (8, 8) and teacher.shape[-2:] == (24, 24)
    torch.testing.assert_close(centres(student), centres(teacher), atol=0.05, rtol=0)
    # From the first to the last row both show the same stretch, up to the half pixel at each end that differs in size.
    lower, higher = (view[:, 0, -1, 0] - view[:, 0, 0, 0] for view in (student, teacher))
    torch.testing.assert_close(lower, higher, atol=0, rtol=0.15)
    assert torch.equal(student, drawn("consistent", size=8)[0])  # what it costs the student's view: nothing


def test_in_fixed_teaching_the_teacher_sees_the_whole_image():
    student, teacher = drawn("fixed")
    assert torch.equal(teacher, PLACES) and not torch.equal(student, PLACES)
    assert torch.equal(student, drawn("consistent")[0])
    _, teacher = drawn("fixed", images=PLACES[..., 2:14], teacher_size=12)  # 16 × 12: the square in the middle
    assert torch.equal(teacher, PLACES[:, :, 2:14, 2:14])


def test_in_independent_teaching_it_sees_a_crop_of_its_own():
    student, teacher = drawn("independent")
    assert torch.equal(student, drawn("consistent")[0])
    assert ((centres(student) - centres(teacher)).abs().amax(1) > 0.2).all()


def test_half_of_the_crops_are_turned_for_both():
    student, teacher = drawn("consistent", images=PLACES[:1].expand(60, 2, 16, 16), crop=None, flip=True)
    turned = student[:, 1, 0, 0] == 15
    assert 15 < turned.sum() < 45 and torch.equal(student, teacher)
    assert all(
        torch.equal(view, PLACES[0].flip(-1) if side else PLACES[0]) for view, side in zip(student, turned, strict=True)
    )


# --- mixtures


def shares(view: Tensor) -> Tensor:
    """λ of each image of the constant ones, from λ·v[i] + (1 − λ)·v[i − 1]."""
    own, before = CONSTANT[:, 0, 0, 0], CONSTANT[:, 0, 0, 0].roll(1)
    return (view[:, 0, 0, 0] - before) / (own - before)


def test_both_see_the_same_mixture_and_so_do_the_targets():
    torch.manual_seed(0)
    views, targets = Teaching(crop=None, classes=4)(CONSTANT, torch.arange(4))
    share = shares(views.student)
    assert 0.5 <= share[0] < 1
    torch.testing.assert_close(share, share[:1].expand(4))  # one λ a batch
    assert torch.equal(views.of("teacher"), views.student)
    expected = share[0] * torch.eye(4) + (1 - share[0]) * torch.eye(4).roll(1, 0)
    torch.testing.assert_close(targets, expected)
    _, numbers = Teaching(crop=None)(CONSTANT, torch.tensor([1.0, 2.0, 3.0, 4.0]))
    torch.testing.assert_close(numbers.sum(), torch.tensor(10.0))


def test_the_mixture_is_uniform():
    torch.manual_seed(0)
    teaching = Teaching(crop=None)
    found = torch.stack([shares(teaching(CONSTANT, None)[0].student)[0] for _ in range(300)])
    # The larger of λ and 1 − λ is uniform on [½, 1]: mean ¾, deviation 1/√48.
    assert abs(found.mean() - 0.75) < 0.03 and abs(found.std() - 48**-0.5) < 0.02


def test_the_mixture_of_other_modes():
    torch.manual_seed(0)
    views, _ = Teaching("independent", crop=None)(CONSTANT, None)
    assert abs(shares(views.student)[0] - shares(views.of("teacher"))[0]) > 0.01
    views, _ = Teaching("fixed", crop=None)(CONSTANT, None)
    assert torch.equal(views.of("teacher"), CONSTANT) and shares(views.student)[0] < 1


# --- teaching


def net(seed: int = 0, width: int = 4) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(2, width, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 3))


@pytest.mark.parametrize("mode", ["consistent", "fixed", "independent"])
def test_of_two_equal_models_the_loss_is_zero_in_consistent_teaching_alone(mode: str):
    student = net()
    distiller = Distiller(student, copy.deepcopy(student), recipe="funmatch", example=PLACES[:1])
    views, _ = Teaching(mode)(PLACES / 16, None)
    found = float(distiller(views).loss.detach())
    assert abs(found) < 1e-7 if mode == "consistent" else found > 1e-6


def test_the_recipe_learns_from_the_teacher_alone():
    (term,) = Distiller(net(), net(1, 8), recipe="funmatch", example=PLACES[:1]).all_terms
    assert isinstance(term, SoftTargets) and (term.temperature, term.host_share, term.own_share) == (1, 0, 1)
    student, teacher = net(), net(1, 8)
    out = Distiller(student, teacher, recipe="funmatch", example=PLACES[:1])(PLACES / 16, targets=torch.ones(6, 3) / 3)
    expected = F.kl_div(student(PLACES / 16).log_softmax(1), teacher(PLACES / 16).softmax(1), reduction="batchmean")
    torch.testing.assert_close(out.total(torch.tensor(5.0)), expected)


def test_a_run_that_was_resumed_draws_the_same_views(tmp_path: Path):
    data = TensorDataset(torch.sin(torch.arange(24 * 2 * 12 * 12.0)).reshape(24, 2, 12, 12), torch.arange(24) % 3)
    settings = dict(views=Teaching(size=8, teacher_size=12, classes=3), clip=1.0, schedule="cosine", lr=0.01)

    def trained(stop: int | None, resume: bool, folder: str) -> dict[str, Tensor]:
        torch.manual_seed(0)
        distiller = Distiller(net(), net(1, 8), recipe="funmatch", example=data.tensors[0][:1])
        loader = DataLoader(data, 8, shuffle=True)
        fit(
            distiller, loader, F.cross_entropy, epochs=3, stop=stop, folder=tmp_path / folder, resume=resume, **settings
        )
        return distiller.student.state_dict()

    whole = trained(None, False, "whole")
    trained(1, False, "parts")
    torch.rand(5)
    resumed = trained(None, True, "parts")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (dict(mode="same"), "mode must be 'consistent', 'fixed' or 'independent', got 'same'"),
        (dict(crop=(0.5, 1.2)), "crop must be two numbers, 0 < least <= largest <= 1"),
        (dict(ratio=(2, 1)), "ratio must be two numbers"),
        (dict(size=0), "size must be a whole number >= 1, got 0"),
        (dict(teacher_size=(1, 2, 3)), "teacher_size must be a number or"),
        (dict(teachers="teacher"), "teachers must be a list of names"),
        (dict(classes=1), "classes must be a whole number >= 2"),
        (dict(mixup="yes"), "mixup must be true or false"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict, said: str):
    with pytest.raises(DistillError, match=said):
        Teaching(**settings)


def test_batches_that_cannot_be_seen_so_are_refused():
    with pytest.raises(
        DistillError, match=r"needs images \(B, C, H, W\) of floating-point numbers, got torch.float32 \(4, 8\)"
    ):
        Teaching()(torch.zeros(4, 8), None)
    with pytest.raises(DistillError, match="give their number, classes="):
        Teaching()(CONSTANT, torch.arange(4))
    with pytest.raises(DistillError, match="give mixup=False for others"):
        Teaching()(CONSTANT, torch.zeros(4, 8, 8))
    assert torch.equal(Teaching(mixup=False)(CONSTANT, torch.arange(4))[1], torch.arange(4))
