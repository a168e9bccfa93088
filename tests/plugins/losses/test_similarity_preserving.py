"""SP: normalised rows of the samples' Gram matrices."""

from __future__ import annotations

import math

import pytest
import torch

import golden.dense
from kdgraft import Distiller, SimilarityPreserving
from kdgraft.losses import similarity_preserving
from support.samples import IMAGES, Pointwise
from support.tensors import gradient

# HobbitLong/RepDistiller@b84f547c5db6a35318d4671d7d5c4de74c822403: distiller_zoo/SP.py, Similarity ("verified by original
# author"), in float64 on golden.dense.embeddings(): value, gradient at the student's first number, sum of the squared gradients;
# and on the flattened maps of golden.dense.features().
AUTHORS = (0.18672169466113026, -0.0019228768830443803, 0.002244414152885016)
AUTHORS_OF_MAPS = (0.013343768303493703, 0.0009768050790203387, 0.0008993737881898911)


@pytest.mark.parametrize(
    ("inputs", "expected"),
    [(golden.dense.embeddings, AUTHORS), (golden.dense.features, AUTHORS_OF_MAPS)],
    ids=["vectors", "maps"],
)
def test_authors_figures(inputs, expected):
    student, teacher = (x.flatten(1) for x in inputs()[:2])
    value = similarity_preserving(student.requires_grad_(), teacher)
    slope = gradient(value, student)
    assert [value.item(), slope[0, 0].item(), slope.square().sum().item()] == pytest.approx(expected, rel=1e-9)


def test_two_samples_by_hand():
    # Gram matrices ((9, 0), (0, 4)) and ((1, 1), (1, 1)): rows (1, 0) and (0, 1) against (√½, √½) twice.
    student = torch.tensor([[3.0, 0.0], [0.0, 2.0]])
    root = math.sqrt(0.5)
    expected = 2 * ((1 - root) ** 2 + root**2) / 4
    assert similarity_preserving(student, torch.ones(2, 5)).item() == pytest.approx(expected)


def test_a_rotation_of_either_model_changes_nothing():
    student, teacher, _ = golden.dense.embeddings()
    turn = torch.linalg.qr(golden.dense.chirp((6, 6), 0.3, 0.2, 1.0))[0]
    found = similarity_preserving(3 * student @ turn, teacher @ turn.T)
    torch.testing.assert_close(found, similarity_preserving(student, teacher))


def test_the_term_on_means_and_on_whole_maps():
    torch.manual_seed(0)
    student, teacher = Pointwise(4), Pointwise(6)
    maps = [net(IMAGES[0]) for net in (student, teacher)]
    for pool, vectors in (("mean", [x.mean((2, 3)) for x in maps]), ("flat", [x.flatten(1) for x in maps])):
        model = Distiller(student, teacher, recipe=dict(type="sp", tap="mix", pool=pool), example=IMAGES[0])
        torch.testing.assert_close(model(IMAGES[0]).loss, 3000 * similarity_preserving(*vectors))
    assert SimilarityPreserving("mix").pool == "mean"
