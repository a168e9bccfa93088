"""RKD: distances and angles between samples."""

from __future__ import annotations

import math

import pytest
import torch

import golden.dense
from kdgraft import RKD, Distiller, DistillError
from kdgraft.losses import rkd_angle, rkd_distance
from support.samples import IMAGES, Pointwise
from support.tensors import gradient

# HobbitLong/RepDistiller@b84f547c5db6a35318d4671d7d5c4de74c822403: distiller_zoo/RKD.py, RKDLoss, whose two parts are those of
# lenscloth/RKD@0a6c3c0c190722d428322bf71703c0ae86c25242: metric/loss.py. In float64 on golden.dense.embeddings(): value, gradient
# at the student's first number, sum of the squared gradients.
AUTHORS = {
    "distance": (0.06526812744422061, 0.00017617377961118448, 0.0010643600065765022),
    "angle": (0.0709398002913919, 0.0012630087992243871, 0.0007164992454996088),
}
LOSSES = {"distance": rkd_distance, "angle": rkd_angle}

each = pytest.mark.parametrize("part", LOSSES)


@each
def test_authors_figures(part: str):
    student, teacher, _ = golden.dense.embeddings()
    value = LOSSES[part](student.requires_grad_(), teacher)
    slope = gradient(value, student)
    figures = [value.item(), slope[0, 0].item(), slope.square().sum().item()]
    assert figures == pytest.approx(AUTHORS[part], rel=1e-9)


def test_three_points_by_hand():
    # Distances 3, 4, 5 of mean 4 against 1, 1, 2 of mean 4/3: differences 0, 1/4, -1/4, each twice among nine.
    student = torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 4.0]])
    teacher = torch.tensor([[1.0], [0.0], [2.0]])
    assert rkd_distance(student, teacher).item() == pytest.approx(4 * 0.5 / 16 / 9)
    # Cosines at the corners 0, 0.6, 0.8 against -1, 1, 1; each angle counts twice among 27.
    assert rkd_angle(student, teacher).item() == pytest.approx((1 + 0.4**2 + 0.2**2) / 27)


@each
def test_rotation_translation_and_scale_change_nothing(part: str):
    student, teacher, _ = golden.dense.embeddings()
    turn = torch.linalg.qr(golden.dense.chirp((6, 6), 0.3, 0.2, 1.0))[0]
    found = LOSSES[part](7 * student @ turn + 3, teacher @ turn.T / 9 - 1)
    torch.testing.assert_close(found, LOSSES[part](student, teacher))
    assert not LOSSES[part](student @ turn * 2, student).allclose(LOSSES[part](student, teacher))
    torch.testing.assert_close(LOSSES[part](student @ turn * 2, student), torch.zeros_like(found), atol=1e-13, rtol=0)


@each
def test_samples_that_coincide_have_a_bounded_gradient(part: str):
    _, teacher, _ = golden.dense.embeddings()
    for same in (torch.ones(7, 6), torch.zeros(7, 6), torch.eye(7, 6)[[0, 0, 1, 2, 3, 4, 5]]):
        student = same.double().requires_grad_()
        slope = gradient(LOSSES[part](student, teacher), student)
        assert slope.abs().max() < 1


@each
def test_one_sample_has_no_relation(part: str):
    student = torch.ones(1, 6, requires_grad=True)
    value = LOSSES[part](student, torch.full((1, 3), 2.0))
    assert value.item() == 0
    assert torch.equal(gradient(value, student), torch.zeros(1, 6))


def test_the_term_weighs_the_two_parts():
    torch.manual_seed(0)
    student, teacher = Pointwise(4), Pointwise(6)
    both = [net(IMAGES[0]).mean((2, 3)) for net in (student, teacher)]
    parts = rkd_distance(*both), rkd_angle(*both)
    for settings, expected in (({}, parts[0] + 2 * parts[1]), (dict(distance=0, angle=50.0), 50 * parts[1])):
        model = Distiller(student, teacher, recipe=dict(type="rkd", tap="mix", **settings), example=IMAGES[0])
        torch.testing.assert_close(model(IMAGES[0]).loss, expected)
    assert not list(model.terms.parameters())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(distance=-1.0), "RKD: distance must be a number >= 0"),
        (dict(angle=math.nan), "RKD: angle must be a number >= 0"),
        (dict(distance=0, angle=0), "distance and angle are both 0"),
    ],
)
def test_mistakes(settings, message):
    with pytest.raises(DistillError, match=message):
        RKD("mix", **settings)
