"""Activation boundaries (AB) and the share of units that are in another state."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import golden
from kdgraft import ActivationBoundaries, Batch, Distiller, DistillError, WiringError
from kdgraft.losses import activation_boundaries, sparsity_mismatch
from support.tensors import gradient

# bhheo/AB_distillation@a7701d3506e13da87bda75aba1cee6397408144f: models/distillation_module.py, criterion_active_L2 with margin 1
# on golden.features() in float64, divided by the number of images: value, gradient at the student's first number, sum of the
# squared gradients; and its loss_AT, the share of units whose state differs.
AUTHORS = (247.8311344561239, -0.7019960038074082, 495.6622689122478)
AUTHORS_MISMATCH = 0.49166666666666664


def test_authors_figures():
    student, teacher = golden.features()
    value = activation_boundaries(student.requires_grad_(), teacher, reduction="sum") / len(student)
    slope = gradient(value, student)
    figures = (value.item(), slope[0, 0, 0, 0].item(), slope.square().sum().item())
    assert figures == pytest.approx(AUTHORS, rel=1e-12)
    assert sparsity_mismatch(student, teacher).item() == pytest.approx(AUTHORS_MISMATCH)


def test_by_hand():
    # Right by more than the margin, right by less, wrong; the teacher is on, off, on, and off where it is 0.
    student = torch.tensor([[2.0, -0.25, -3.0, 0.5]], requires_grad=True)
    teacher = torch.tensor([[0.1, -7.0, 5.0, 0.0]])
    value = activation_boundaries(student, teacher, dim=-1)
    assert value.item() == pytest.approx(0 + 0.75**2 + 4**2 + 1.5**2)
    assert gradient(value, student).tolist() == [[0, 1.5, -8, 3]]
    assert activation_boundaries(student, teacher, dim=-1, margin=0).item() == pytest.approx(9 + 0.25)
    assert sparsity_mismatch(student, teacher, dim=-1).item() == 0.5


def test_only_signs_of_the_teacher_count():
    student, teacher = golden.features()
    expected = activation_boundaries(student, teacher)
    for other in (teacher * 1e9, teacher.relu(), (teacher > 0).double()):
        torch.testing.assert_close(activation_boundaries(student, other), expected)
        assert sparsity_mismatch(student, other) == sparsity_mismatch(student, teacher)


def test_the_least_value_is_the_teachers_pattern():
    student, teacher = golden.features()
    student = student.clone().requires_grad_()
    optimizer = torch.optim.SGD([student], 0.4)
    for _ in range(40):
        optimizer.zero_grad()
        activation_boundaries(student, teacher, reduction="sum").backward()
        optimizer.step()
    assert activation_boundaries(student, teacher).item() == pytest.approx(0, abs=1e-8)
    assert sparsity_mismatch(student, teacher) == 0
    torch.testing.assert_close(
        activation_boundaries(1.01 * student, teacher), torch.zeros(()).double(), atol=1e-9, rtol=0
    )


def test_mismatch_of_positions_that_count():
    student, teacher = golden.features()
    weight = torch.zeros(2, 5, 4)
    weight[0, 0], weight[1, :, 1] = 1, 2
    differs = ((student > 0) != (teacher > 0)).double().mean(1)
    expected = (differs[0, 0].sum() + 2 * differs[1, :, 1].sum()) / (4 + 10)
    torch.testing.assert_close(sparsity_mismatch(student, teacher, weight=weight), expected)
    assert sparsity_mismatch(student, teacher, weight=torch.zeros(2, 5, 4)) == 0
    assert sparsity_mismatch(student[:0], teacher[:0]) == 0
    assert sparsity_mismatch(student.half(), teacher.half()).dtype is torch.float32


def test_mistakes():
    student, teacher = golden.features()
    with pytest.raises(DistillError, match="must have the same shape"):
        sparsity_mismatch(student, teacher[:, :2])
    with pytest.raises(DistillError, match=r"^activation_boundaries: margin must be a number >= 0, got -1"):
        activation_boundaries(student, teacher, margin=-1)
    with pytest.raises(DistillError, match=r"^ActivationBoundaries: margin must be a number >= 0, got 'wide'"):
        ActivationBoundaries("0", margin="wide")


# --- the term

IMAGES = golden.wave((2, 3, 6, 6), 0.37, 0.2, 1.0).float()


def net(width: int, inplace: bool = False) -> nn.Sequential:
    act = nn.ReLU(inplace=inplace)
    return nn.Sequential(
        nn.Conv2d(3, width, 3), act, nn.Conv2d(width, width, 3), nn.ReLU(), nn.Flatten(2), nn.Linear(4, 5)
    )


def distilled(*terms: object, widths: tuple[int, int] = (4, 4), **settings: object) -> Distiller:
    torch.manual_seed(0)
    return Distiller(net(widths[0], inplace=True), net(widths[1]), list(terms), IMAGES, **settings)


def test_later_layers_weigh_twice_as_much():
    distiller = distilled(recipe=dict(type="ab", tap=["0", "2"]), widths=(4, 6))
    term, parts = distiller.terms["activation_boundaries"], [distiller.student, distiller.teacher.model]
    out = distiller(IMAGES)
    total, shares = 0, []
    for place, end in enumerate((1, 3)):
        # Before the ReLU, although the student's overwrites it.
        s, t = (part[2:end](part[:1](IMAGES).relu()) if end == 3 else part[0](IMAGES) for part in parts)
        s = term.adapters[place](s, t)
        hinge = torch.where(t > 0, 1 - s, 1 + s).relu().square()
        total = total + hinge.sum() / 2 * (0.5, 1)[place]
        shares.append(((s > 0) != (t > 0)).float().mean())
    torch.testing.assert_close(out.loss, 3e-3 * total)
    torch.testing.assert_close(out.losses["distill.activation_boundaries.mismatch"], sum(shares) / 2)


def test_padding_counts_in_nothing():
    distiller = distilled(ActivationBoundaries("0", weight=1.0))
    batch = Batch(padded_size=(6, 6), image_sizes=[(6, 6), (3, 6)])
    out = distiller(IMAGES, batch=batch)
    s, t = (model[0](IMAGES) for model in (distiller.student, distiller.teacher.model))
    hinge = torch.where(t > 0, 1 - s, 1 + s).relu().square()
    torch.testing.assert_close(out.loss, (hinge[0].sum() + hinge[1, :, :2].sum()) / 2)
    differs = ((s > 0) != (t > 0)).float()
    expected = torch.cat([differs[0].flatten(), differs[1, :, :2].flatten()]).mean()
    torch.testing.assert_close(out.losses["distill.activation_boundaries.mismatch"], expected)


def test_vectors():
    distiller = distilled(ActivationBoundaries("5", weight=1.0))
    s, t = (model(IMAGES) for model in (distiller.student, distiller.teacher.model))
    hinge = torch.where(t > 0, 1 - s, 1 + s).relu().square()
    torch.testing.assert_close(distiller(IMAGES).loss, hinge.sum() / 2)


def test_wiring_mistakes():
    with pytest.raises(
        WiringError, match=r"no unit of the student's 3 is below 0, as after a ReLU.*tap the layer before it"
    ):
        distilled(ActivationBoundaries("3"))
    distilled(ActivationBoundaries("3"), widths=(4, 6))  # an adapter may be negative
    distilled(ActivationBoundaries(student_tap="2", teacher_tap="3"))
    with pytest.raises(WiringError, match=r"must agree; use adapter='auto'"):
        distilled(ActivationBoundaries("0", adapter="any"), widths=(4, 6))
