"""Attention transfer by gradients."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import golden.dense
from kdgraft import Batch, Distiller, FeatureImitation, GradientTransfer, Itself, Peer, Stop, WiringError
from kdgraft.losses import gradient_transfer

IMAGES = golden.dense.chirp((3, 3, 6, 6), 0.37, 0.2, 1.0).float()
LABELS = torch.tensor([1, 4, 0])


def test_by_hand():
    student, teacher = torch.tensor([[[[1.0, 2.0]]], [[[0.0, 3.0]]]]), torch.tensor([[[[4.0, 2.0]]], [[[0.0, 1.0]]]])
    assert gradient_transfer(student, teacher, reduction="none").tolist() == [4.5, 2]
    assert gradient_transfer(student, teacher).item() == 3.25
    valid = torch.tensor([[[1, 0]], [[0, 0]]])
    assert gradient_transfer(student, teacher, valid=valid).item() == 4.5


class Net(nn.Module):
    """Smooth, so that numerical derivatives exist."""

    def __init__(self, width: int, attention: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3, padding=1)
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True) if attention else None
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).tanh().flatten(2).mT
        if self.attention is not None:
            x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.head(x.mean(1))


def distilled(*terms: Any, student: nn.Module | None = None, teacher: Any = None, **settings: Any) -> Distiller:
    torch.manual_seed(0)
    return Distiller(student or Net(4), teacher or Net(6), list(terms), IMAGES, **settings)


def slope(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """The gradient of each image's own cross-entropy by it."""
    x = images.clone().requires_grad_()
    return torch.autograd.grad(F.cross_entropy(model(x), labels, reduction="sum"), x, create_graph=True)[0]


def test_the_loss_is_of_the_gradients_by_the_images():
    distiller = distilled(recipe=dict(type="gradient-at", weight=10.0))
    found = distiller(IMAGES, targets=LABELS).loss
    ours, theirs = (slope(model, IMAGES, LABELS) for model in (distiller.student, distiller.teacher.model))
    torch.testing.assert_close(found, 10 * (ours - theirs).square().sum((1, 2, 3)).mean() / 2)
    # Images without a label do not count, and one image at a time gives the same.
    some = distiller(IMAGES, targets=torch.tensor([1, -100, 0])).loss
    kept = (ours - theirs).square().sum((1, 2, 3))[[0, 2]]
    torch.testing.assert_close(some, 10 * kept.sum() / 3 / 2 * (3 / 2) ** 2)


def test_derivatives_are_the_numerical_ones_and_the_teacher_gets_none():
    distiller = distilled(GradientTransfer())
    distiller.double()
    weight = distiller.student.conv.weight
    distiller(IMAGES.double(), targets=LABELS).loss.backward()
    assert all(p.grad is None for p in distiller.teacher.model.parameters())
    at, step = (2, 1, 0, 2), 1e-4
    values = []
    for move in (step, -2 * step):
        with torch.no_grad():
            weight[at] += move
        values.append(distiller(IMAGES.double(), targets=LABELS).loss.item())
    assert weight.grad[at].item() == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-5)


def test_a_student_that_is_the_teacher_costs_nothing():
    student = Net(4)
    assert (
        distilled(GradientTransfer(), student=student, teacher=copy.deepcopy(student))(IMAGES, targets=LABELS).loss == 0
    )


def test_other_terms_hear_the_teacher_without_a_graph_and_inactive_steps_build_none():
    seen = []

    class Watching(FeatureImitation):
        def forward(self, student: Any, teacher: Any, batch: Batch) -> Any:
            seen.append((student[self.student_taps[0]].requires_grad, teacher[self.teacher_taps[0]].requires_grad))
            return super().forward(student, teacher, batch)

    inputs = []
    distiller = distilled(GradientTransfer(schedule=Stop(1)), Watching("conv", name="watching"))
    distiller.student.conv.register_forward_pre_hook(lambda _, args: inputs.append(args[0].requires_grad))
    distiller.teacher.model.conv.register_forward_pre_hook(lambda _, args: inputs.append(args[0].requires_grad))
    for _ in range(2):
        distiller(IMAGES, targets=LABELS)
    assert seen == [(True, False)] * 2
    assert inputs == [True, True, False, False]
    alone = distilled(Watching("conv", name="watching"))
    torch.testing.assert_close(
        distiller(IMAGES, targets=LABELS).losses["distill.watching.loss"], alone(IMAGES, targets=LABELS).loss
    )


def test_fused_attention_is_off_only_where_it_has_to_be():
    student = Net(4, attention=True)
    distiller = distilled(GradientTransfer(schedule=Stop(1)), student=student)
    allowed = []
    student.head.register_forward_pre_hook(lambda *_: allowed.append(torch.backends.cuda.flash_sdp_enabled()))
    before = torch.backends.cuda.flash_sdp_enabled()
    distiller(IMAGES, targets=LABELS).loss.backward()
    assert student.attention.in_proj_weight.grad.isfinite().all()
    distiller(IMAGES, targets=LABELS)
    assert allowed == [False, before]


def test_padding_is_left_out():
    distiller = distilled(GradientTransfer())
    found = distiller(
        IMAGES, targets=LABELS, batch=Batch(padded_size=(6, 6), image_sizes=[(6, 6), (3, 6), (6, 2)])
    ).loss
    ours, theirs = (slope(model, IMAGES, LABELS) for model in (distiller.student, distiller.teacher.model))
    squares = (ours - theirs).square().sum(1) / 2
    expected = squares[0].sum() + squares[1, :3].sum() + squares[2, :, :2].sum()
    torch.testing.assert_close(found, expected / 3)


def test_peers_and_averages():
    peers = Distiller(Net(4), Peer(Net(6)), [GradientTransfer(name="g")], IMAGES)
    out = peers(IMAGES, targets=LABELS)
    ours, theirs = (slope(model, IMAGES, LABELS) for model in (peers.student, peers.peers["teacher"]))
    for name in ("g", "g_of_teacher"):
        expected = (ours - theirs).square().sum((1, 2, 3)).mean() / 2
        torch.testing.assert_close(out.losses[f"distill.{name}.loss"], expected)
    (out.loss + F.cross_entropy(out.peers["teacher"], LABELS)).backward()
    assert peers.peers["teacher"].conv.weight.grad.isfinite().all()
    average = Distiller(Net(4), Itself(momentum=0.9), [GradientTransfer()], IMAGES)
    assert average(IMAGES, targets=LABELS).loss == 0


class NoSecondDerivative(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, x: Tensor) -> Tensor:
        context.save_for_backward(x)
        return x.tanh()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(context: Any, slope: Tensor) -> Tensor:
        return slope * (1 - context.saved_tensors[0].tanh() ** 2)


def test_wiring_mistakes():
    class Fused(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(NoSecondDerivative.apply(self.conv(x)).mean((2, 3)))

    with pytest.raises(
        WiringError, match=r"cannot be differentiated twice by its input \(.*once_differentiable\); use layers"
    ):
        distilled(GradientTransfer(), student=Fused(4))
    with pytest.raises(
        WiringError, match=r"needs images \(B, C, H, W\) as the input of the student, and ':input' gives \(2, 3\)"
    ):
        Distiller(nn.Linear(3, 5), nn.Linear(3, 5), [GradientTransfer()], torch.rand(2, 3))
