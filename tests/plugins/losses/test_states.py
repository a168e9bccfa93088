"""Hidden states: cosine and patient."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch

import golden.text
from kdgraft import Batch, Distiller, DistillError, FeatureImitation
from kdgraft.losses import cosine, patient
from support.tensors import gradient

EVERY = {"cosine": cosine, "patient": patient, "patient's code": partial(patient, variant="code")}
every_loss = pytest.mark.parametrize("name", EVERY)


def test_cosine_authors_figures():
    student, teacher = golden.text.states()
    value = cosine(student.requires_grad_(), teacher, weight=golden.text.tokens())
    np.testing.assert_allclose(golden.text.figure(value, student), golden.text.COSINE, rtol=1e-9)


def test_patient_authors_figures():
    student, teacher = golden.text.states()
    figure = golden.text.figure(patient(student.requires_grad_(), teacher, variant="code"), student)
    assert figure[0] == pytest.approx(golden.text.PATIENT[0], rel=1e-3)
    np.testing.assert_allclose(figure[1:], golden.text.PATIENT[1:], rtol=1e-5)


def test_by_hand():
    # Student (3, 4) and (0, 2), teacher (5, 0) and (0, 1): cosines 3/5 and 1.
    student, teacher = torch.tensor([[3.0, 4.0], [0.0, 2.0]]), torch.tensor([[5.0, 0.0], [0.0, 1.0]])
    assert cosine(student, teacher, reduction="none").tolist() == pytest.approx([0.4, 0])
    assert cosine(student, teacher).item() == pytest.approx(0.2)
    # (0.6, 0.8) − (1, 0): 0.16 + 0.64 = 0.8; the mean of two channels 0.4.
    assert patient(student, teacher, reduction="none").tolist() == pytest.approx([0.8, 0])
    assert patient(student, teacher, variant="code", reduction="none").tolist() == pytest.approx([0.4, 0])
    # Weights 3 and 1: 3 · 0.4 / 4
    assert cosine(student, teacher, weight=torch.tensor([3.0, 1.0])).item() == pytest.approx(0.3)


def test_ends():
    # The same direction, at right angles, opposite.
    student, teacher = torch.tensor([[2.0, 0.0], [0.0, 3.0], [-1.0, 0.0]]), torch.tensor([[1.0, 0.0]] * 3)
    assert cosine(student, teacher, reduction="none").tolist() == [0, 1, 2]
    assert patient(student, teacher, reduction="none").tolist() == [0, 2, 4]


def test_patient_is_twice_cosine():
    student, teacher = golden.text.states()
    # ‖a − b‖² = 2 − 2 cos for unit vectors; of the eight channels, the mean is an eighth.
    expected = 2 * cosine(student, teacher, reduction="none")
    torch.testing.assert_close(patient(student, teacher, reduction="none"), expected)
    torch.testing.assert_close(patient(student, teacher, variant="code", reduction="none"), expected / 8)


@every_loss
def test_lengths_do_not_matter(name: str):
    student, teacher = golden.text.states()
    items = EVERY[name](student, teacher, reduction="none")
    lengths = torch.linspace(0.01, 100, 10, dtype=torch.float64).reshape(2, 5, 1)
    scaled = EVERY[name](lengths * student, teacher / lengths, reduction="none")
    torch.testing.assert_close(scaled, items)


@every_loss
def test_gradient_stands_at_right_angles_to_the_vector(name: str):
    student, teacher = golden.text.states()
    slope = gradient(EVERY[name](student.requires_grad_(), teacher), student)
    torch.testing.assert_close((slope * student).sum(-1), torch.zeros(2, 5).double(), rtol=0, atol=1e-14)


@every_loss
def test_symmetric_and_the_same_in_a_rotated_space(name: str):
    student, teacher = golden.text.states()
    value = EVERY[name](student, teacher)
    turn = torch.linalg.qr(golden.text.chirp((8, 8), 0.31, 0.2, 1.0)).Q
    torch.testing.assert_close(EVERY[name](teacher, student), value)
    torch.testing.assert_close(EVERY[name](student @ turn, teacher @ turn), value)


@every_loss
def test_another_channel_dimension(name: str):
    student, teacher = golden.text.states()
    items = EVERY[name](student, teacher, reduction="none")
    maps = [x.movedim(-1, 1) for x in (student, teacher)]
    torch.testing.assert_close(EVERY[name](*maps, dim=1, reduction="none"), items)


@every_loss
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zero_vectors_stay_finite(name: str, dtype: torch.dtype):
    # Cosine 0 gives 1; patient: ‖0 − t‖² = 1, an eighth in their code.
    expected = {"cosine": 1.0, "patient": 1.0, "patient's code": 0.125}[name]
    zeros, other = torch.zeros(2, 8, dtype=dtype), golden.text.states()[0][0, :2].to(dtype)
    for student, teacher in ((zeros, other), (other, zeros)):
        leaf = student.clone().requires_grad_()
        value = EVERY[name](leaf, teacher)
        assert value.item() == pytest.approx(expected)
        assert gradient(value, leaf).isfinite().all()
    leaf = zeros.clone().requires_grad_()
    value = EVERY[name](leaf, zeros)
    assert value.item() == (1 if name == "cosine" else 0)
    assert torch.equal(gradient(value, leaf), zeros)


@every_loss
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_zero_vectors_at_weight_0_have_no_gradient(name: str, dtype: torch.dtype):
    student, teacher = (x.to(dtype) for x in golden.text.states())
    tokens = golden.text.tokens()
    student = student.masked_fill(~tokens[..., None], 0).requires_grad_()
    value = EVERY[name](student, teacher, weight=tokens)
    slope = gradient(value, student)
    assert slope.isfinite().all()
    assert not slope[~tokens].any()
    torch.testing.assert_close(value, EVERY[name](student[tokens], teacher[tokens]))


def test_unknown_variant():
    with pytest.raises(DistillError, match="variant must be 'paper' or 'code', got 'sum'"):
        patient(*golden.text.states(), variant="sum")


def test_features_of_any_kind_imitate_directions():
    torch.manual_seed(0)
    models = [torch.nn.Sequential(torch.nn.Conv2d(3, width, 3, padding=1), torch.nn.Flatten(2)) for width in (4, 6)]
    images = torch.randn(2, 3, 5, 5)
    distiller = Distiller(*models, [FeatureImitation("0", loss="cosine")], images)
    batch = Batch(padded_size=(5, 5), image_sizes=[(5, 2), (4, 3)])
    found = distiller(images, batch=batch).loss
    inside = torch.zeros(2, 5, 5, dtype=torch.bool)
    inside[0, :, :2] = inside[1, :4, :3] = True
    s, t = distiller.terms["feature_imitation"].adapters[0](models[0][0](images), images), models[1][0](images)
    products = (s * t).sum(1) / s.square().sum(1).sqrt() / t.square().sum(1).sqrt()
    torch.testing.assert_close(found, 1 - products[inside].mean())
    # The teacher's scale does not matter, and vectors (B, N, C) are compared along the last axis.
    models[1][0].weight.data *= 100
    models[1][0].bias.data *= 100
    torch.testing.assert_close(distiller(images, batch=batch).loss, found)
    vectors = [torch.nn.Linear(3, width) for width in (4, 6)]
    rows = torch.randn(2, 7, 3)
    distiller = Distiller(*vectors, [FeatureImitation("", loss="cosine", name="rows")], rows)
    s, t = distiller.terms["rows"].adapters[0](vectors[0](rows), rows), vectors[1](rows)
    torch.testing.assert_close(distiller(rows).loss, (1 - torch.cosine_similarity(s, t, -1)).mean())
