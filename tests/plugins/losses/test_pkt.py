"""PKT: probabilities of being each other's neighbours."""

from __future__ import annotations

import math

import pytest
import torch

import golden.dense
from kdgraft import PKT, Distiller, DistillError
from kdgraft.losses import pkt
from support.samples import IMAGES, Pointwise
from support.tensors import gradient

# HobbitLong/RepDistiller@b84f547c5db6a35318d4671d7d5c4de74c822403: distiller_zoo/PKT.py, which is nn/pkt.py of
# passalis/probabilistic_kt@a58fd1b0c62491f55a78189daf835e3558f96176, in float64 on golden.dense.embeddings(): value, gradient at
# the student's first number, sum of the squared gradients. It adds 1e-7 to the vectors' lengths, hence the tolerance.
AUTHORS = (0.035753371779277725, 0.005149358734336436, 0.00019004167236567958)


def test_authors_figures():
    student, teacher, _ = golden.dense.embeddings()
    value = pkt(student.requires_grad_(), teacher)
    slope = gradient(value, student)
    assert [value.item(), slope[0, 0].item(), slope.square().sum().item()] == pytest.approx(AUTHORS, rel=5e-6)


def test_three_samples_by_hand():
    # Cosines of the student 0, 0, -1 and of the teacher 1 throughout.
    student = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, -2.0]])
    teacher = torch.ones(3, 1)
    # Kernels with oneself: rows (1, ½, ½) / 2, (½, 1, 0) / 1.5, (½, 0, 1) / 1.5, against thirds. Where q is 0, eps stands.
    third, rest = 1 / 3, 1e-7
    rows = [[0.5, 0.25, 0.25], [third, 2 / 3, 0.0], [third, 0.0, 2 / 3]]
    expected = sum(third * math.log((third + rest) / (q + rest)) for row in rows for q in row) / 9
    assert pkt(student, teacher).item() == pytest.approx(expected, rel=1e-5)
    # Without oneself: (½, ½), (1, 0), (1, 0) against halves.
    others = [[0.5, 0.5], [1.0, 0.0], [1.0, 0.0]]
    expected = sum(0.5 * math.log((0.5 + rest) / (q + rest)) for row in others for q in row) / 3
    assert pkt(student, teacher, variant="paper").item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("variant", ["code", "paper"])
def test_lengths_and_rotations_change_nothing(variant):
    student, teacher, _ = golden.dense.embeddings()
    turn = torch.linalg.qr(golden.dense.chirp((6, 6), 0.3, 0.2, 1.0))[0]
    lengths = torch.arange(1.0, 8.0)[:, None]
    found = pkt(student @ turn * lengths, teacher / lengths, variant=variant)
    torch.testing.assert_close(found, pkt(student, teacher, variant=variant))


@pytest.mark.parametrize("variant", ["code", "paper"])
def test_one_or_two_opposite_samples(variant):
    for student in (torch.ones(1, 2), torch.tensor([[1.0, 0.0], [-1.0, 0.0]])):
        student.requires_grad_()
        value = pkt(student, torch.ones(len(student), 3), variant=variant)
        assert value.isfinite()
        assert gradient(value, student).isfinite().all()


def test_the_term_and_its_variants():
    torch.manual_seed(0)
    student, teacher = Pointwise(4), Pointwise(6)
    both = [net(IMAGES[0]).mean((2, 3)) for net in (student, teacher)]
    for settings in ({}, dict(variant="paper", weight=1.0)):
        model = Distiller(student, teacher, recipe=dict(type="pkt", tap="mix", **settings), example=IMAGES[0])
        weight, variant = settings.get("weight", 30000.0), settings.get("variant", "code")
        torch.testing.assert_close(model(IMAGES[0]).loss, weight * pkt(*both, variant=variant))
    with pytest.raises(DistillError, match="PKT: variant must be one of code, paper"):
        PKT("mix", variant="fast")
    with pytest.raises(DistillError, match="variant must be 'code' or 'paper'"):
        pkt(*both, variant="fast")
