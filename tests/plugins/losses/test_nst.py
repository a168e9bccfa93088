"""Neuron selectivity transfer (NST), and the discrepancy of sets that it shares with other losses."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import golden.dense
from golden.dense import chirp
from kdgraft import NST, Distiller, DistillError, WiringError
from kdgraft.losses import nst
from kdgraft.losses.mmd import discrepancy
from support.tensors import gradient

# HobbitLong/RepDistiller@b84f547c5db6a35318d4671d7d5c4de74c822403: distiller_zoo/NST.py, nst_loss, in float64: value, gradient at
# the student's first number, sum of the squared gradients. The authors' code (TuSimple/neuron-selectivity-transfer@50dee40, MXNet)
# leaves the teacher's part out, which has no gradient.
PORT = (0.4749385898015521, 0.003399322620806647, 0.0028405320397174214)

KERNELS = ["linear", "poly", "gaussian"]


def test_figures_of_a_port():
    student, teacher = golden.dense.features()
    value = nst(student.requires_grad_(), teacher)
    slope = gradient(value, student)
    assert (value.item(), slope[0, 0, 0, 0].item(), slope.square().sum().item()) == pytest.approx(PORT, rel=1e-10)


def kernel_of(name: str, x: Tensor, y: Tensor, variance: float) -> float:
    product = sum(a * b for a, b in zip(x.tolist(), y.tolist(), strict=True))
    distance = sum((a - b) ** 2 for a, b in zip(x.tolist(), y.tolist(), strict=True))
    return {"linear": product, "poly": product**2, "gaussian": math.exp(-distance / (2 * variance))}[name]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("grid", [(1, 2), (5, 4)], ids=["fewer positions", "fewer channels"])
def test_kernel_by_kernel(kernel: str, grid: tuple[int, int]):
    student, teacher = chirp((2, 3, *grid), 0.41, 0.6, 1.2), chirp((2, 6, *grid), 0.53, 0.9, 2.0)
    found = nst(student, teacher, kernel=kernel, reduction="none")
    for image in range(2):
        x, y = (list(F.normalize(maps[image].flatten(1), dim=1)) for maps in (student, teacher))
        mean = lambda f, left, right: sum(f(a, b) for a in left for b in right) / (len(left) * len(right))  # noqa: E731
        variance = mean(lambda a, b: (a - b).square().sum().item(), x, y)
        k = lambda a, b, v=variance: kernel_of(kernel, a, b, v)  # noqa: E731
        assert found[image].item() == pytest.approx(mean(k, x, x) - 2 * mean(k, x, y) + mean(k, y, y), rel=1e-10)


def test_two_channels_by_hand():
    # Channels (1, 0) and (0, 1) against (0.6, 0.8) alone; a channel of zeros counts, as one.
    student, teacher = torch.tensor([[[[3.0, 0.0]], [[0.0, 0.5]]]]), torch.tensor([[[[6.0, 8.0]]]])
    # Means (0.5, 0.5) − (0.6, 0.8); pairs (1 + 0 + 0 + 1) / 4 − 2 · (0.36 + 0.64) / 2 + 1.
    assert nst(student, teacher, kernel="linear").item() == pytest.approx(0.01 + 0.09, rel=1e-6)
    assert nst(student, teacher).item() == pytest.approx(0.5, rel=1e-6)
    with_zeros = torch.cat([teacher, torch.zeros_like(teacher)], 1)
    # 2 · 1/4 − 2 · 1/4 + 1/4 · 1
    assert nst(student, with_zeros).item() == pytest.approx(0.5 - 0.5 + 0.25, rel=1e-6)


def test_poly_matches_gram_matrices_of_positions():
    student, teacher = golden.dense.features()
    grams = [F.normalize(maps.flatten(2), dim=2) for maps in (student, teacher)]
    grams = [x.mT @ x / x.shape[1] for x in grams]
    torch.testing.assert_close(nst(student, teacher), (grams[0] - grams[1]).square().sum((1, 2)).mean())


def test_linear_is_the_attention_of_normalised_channels():
    student, teacher = golden.dense.features()
    attention = [F.normalize(maps.flatten(2), dim=2).mean(1) for maps in (student, teacher)]
    expected = (attention[0] - attention[1]).square().sum(1).mean()
    torch.testing.assert_close(nst(student, teacher, kernel="linear"), expected)


@pytest.mark.parametrize("kernel", KERNELS)
def test_neither_order_nor_repetition_nor_scale_of_channels_matters(kernel: str):
    student, teacher = golden.dense.features()
    expected = nst(student, teacher, kernel=kernel)
    scales = torch.tensor([1e-3, 1.0, 1e12])[:, None, None]
    turned = student.flip(1) * scales
    torch.testing.assert_close(nst(turned, teacher.roll(2, 1), kernel=kernel), expected)
    torch.testing.assert_close(nst(torch.cat([student, student], 1), teacher, kernel=kernel), expected)
    # A different distribution of the same channels is not the same.
    assert abs(nst(student[:, [0, 0, 1, 2]], teacher, kernel=kernel).item() - expected.item()) > 1e-3


def test_the_bandwidth_is_a_constant_of_each_image():
    student, teacher = golden.dense.features()
    x, y = (F.normalize(maps.flatten(2), dim=2) for maps in (student, teacher))
    variances = (x[:, :, None] - y[:, None]).square().sum(3).mean((1, 2))
    left, right = student.clone().requires_grad_(), student.clone().requires_grad_()
    own = gradient(nst(left, teacher, kernel="gaussian", reduction="sum"), left)
    given = [
        nst(right[i : i + 1], teacher[i : i + 1], kernel="gaussian", bandwidth=v)
        for i, v in enumerate(variances.tolist())
    ]
    torch.testing.assert_close(own, gradient(sum(given), right))


@pytest.mark.parametrize("kernel", KERNELS)
def test_one_channel_and_constant_maps(kernel: str):
    same = torch.full((2, 3, 2, 2), 4.0, requires_grad=True)
    value = nst(same, torch.full((2, 5, 2, 2), 0.5), kernel=kernel)
    assert value.item() == pytest.approx(0, abs=1e-6)
    assert gradient(value, same).isfinite().all()
    one, other = torch.ones(1, 1, 1, 1), -torch.ones(1, 1, 1, 1)
    # The distance 4 is its own mean: 2 − 2 · exp(−½).
    expected = {"linear": 4, "poly": 0, "gaussian": 2 - 2 * math.exp(-0.5)}[kernel]
    assert nst(one, other, kernel=kernel).item() == pytest.approx(expected)


def test_shares_are_repetitions():
    student, teacher = golden.dense.embeddings()[:2]
    p, q = torch.tensor([[0.5, 0.25, 0.25]]).double(), torch.tensor([[0.75, 0.0, 0.25]]).double()
    for kernel in KERNELS:
        found = discrepancy(student[None, :3], teacher[None, :3], kernel, shares=(p, q))
        repeated = discrepancy(student[None, [0, 0, 1, 2]], teacher[None, [0, 0, 0, 2]], kernel)
        torch.testing.assert_close(found, repeated)


def test_padding_changes_nothing():
    student, teacher = golden.dense.features()
    valid = torch.ones(2, 5, 4)
    valid[:, :, 3] = 0
    for kernel in KERNELS:
        cut = nst(student[..., :3], teacher[..., :3], kernel=kernel)
        torch.testing.assert_close(nst(student, teacher, kernel=kernel, valid=valid), cut)


def test_mistakes():
    student, teacher = golden.dense.features()
    with pytest.raises(DistillError, match="must lie on one grid"):
        nst(student[..., :3], teacher)
    with pytest.raises(DistillError, match=r"^kernel must be one of linear, poly, gaussian, got 'rbf'$"):
        NST("0", kernel="rbf")
    with pytest.raises(DistillError, match="bandwidth must be a number > 0, got 0"):
        NST("0", kernel="gaussian", bandwidth=0)
    with pytest.raises(DistillError, match="'poly' has no bandwidth; use kernel='gaussian'"):
        NST("0", bandwidth=0.5)


def test_in_plain_pytorch_of_any_two_widths():
    torch.manual_seed(0)
    student, teacher = (torch.nn.Sequential(torch.nn.Conv2d(3, width, 3), torch.nn.Flatten()) for width in (4, 9))
    images = torch.randn(2, 3, 8, 8)
    distiller = Distiller(student, teacher, example=images, recipe=dict(type="nst", tap="0", kernel="gaussian"))
    expected = 50 * nst(student[0](images), teacher[0](images), kernel="gaussian")
    torch.testing.assert_close(distiller(images).loss, expected)
    assert not list(distiller.terms.parameters())
    with pytest.raises(WiringError, match=r"must be maps \(B, C, H, W\)"):
        Distiller(student, teacher, [NST("1")], images)
