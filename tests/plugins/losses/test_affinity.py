"""Pair-wise affinity, and the pixel-wise part of the same paper."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import golden.dense
from kdgraft import DistillError
from kdgraft.losses import pairwise_affinity, soft_targets
from support.tensors import gradient

# Of the 2×5×4 positions; whole 2×2 patches of the first image are invalid.
VALID = (torch.arange(40) % 3 != 1).reshape(2, 5, 4)
VALID[0, :2, :2] = False
# Patch 1: 20 nodes, more than the 6 channels. Patch 2: 6 nodes, no more than channels.
both_ways = pytest.mark.parametrize("patch", [1, 2])


def direct(student: Tensor, teacher: Tensor, present: Tensor | None = None) -> Tensor:
    """Every affinity of every two positions, per image."""
    present = torch.ones_like(student[:, 0], dtype=torch.bool) if present is None else present
    items = []
    for s, t, inside in zip(student, teacher, present, strict=True):
        units = [x[:, inside] / x[:, inside].norm(dim=0) for x in (s, t)]
        a, b = (torch.einsum("ci,cj->ij", u, u) for u in units)
        items.append((a - b).square().mean())
    return torch.stack(items)


# --- figures


@pytest.mark.parametrize("patch", golden.dense.PAIRWISE)
def test_authors_figures(patch: float):
    student, teacher = golden.dense.features()
    value = pairwise_affinity(student.requires_grad_(), teacher, patch=patch, pool="max")
    expected, first, last = golden.dense.PAIRWISE[patch]
    assert value.item() == pytest.approx(expected, rel=1e-6)
    # Theirs has no gradient through the norm; without its part along the node, it is the cosine's.
    slope, side = gradient(value, student), int(4 * patch)
    for image, rows, columns, authors in (
        (0, slice(0, side), slice(0, side), first),
        (1, slice(4, 5), slice(4 - side, 4), last),
    ):
        node = student.detach()[image, :, rows, columns].amax((1, 2))
        along = node / node.norm()
        theirs = torch.tensor(authors, dtype=torch.float64)
        ours = slope[image, :, rows, columns].sum((1, 2))
        torch.testing.assert_close(ours, theirs - theirs.dot(along) * along, rtol=1e-5, atol=1e-7)


def test_two_nodes_by_hand():
    # Student (1, 0) and (2, 2): cosine √½. Teacher (3, 0) and (0, 1): 0. Two of four affinities differ, by √½: 2 · ½ / 4 = ¼
    student = torch.tensor([[[[1.0, 2.0]], [[0.0, 2.0]]]])
    teacher = torch.tensor([[[[3.0, 0.0]], [[0.0, 1.0]]]])
    assert pairwise_affinity(student, teacher, patch=1).item() == pytest.approx(0.25)


def test_more_nodes_than_channels_by_hand():
    # One channel: affinities are signs. Student + − +, teacher + + +: four of nine differ, by 2: 4 · 4 / 9
    student, teacher = torch.tensor([[[[1.0, -5.0, 2.0]]]]), torch.tensor([[[[1.0, 1.0, 3.0]]]])
    assert pairwise_affinity(student, teacher, patch=1).item() == pytest.approx(16 / 9)


def test_pools_by_hand():
    # Two patches of two positions. Student's average: (1, 1) and (0, 2), cosine √½; its maximum: (2, 2) and (0, 4), √½ too.
    student = torch.tensor([[[[2.0, 0.0, 0.0, 0.0]], [[0.0, 2.0, 0.0, 4.0]]]])
    # Teacher's average: (1, 0) and (0, 1), cosine 0; its maximum: (4, 1) and (1, 4), 8/17.
    teacher = torch.tensor([[[[4.0, -2.0, 1.0, -1.0]], [[1.0, -1.0, -2.0, 4.0]]]])
    average = pairwise_affinity(student, teacher, patch=2)
    assert average.item() == pytest.approx(0.25)
    maximum = pairwise_affinity(student, teacher, patch=2, pool="max")
    assert maximum.item() == pytest.approx((math.sqrt(0.5) - 8 / 17) ** 2 / 2)


@pytest.mark.parametrize("pool", ["average", "max"])
def test_pools_take_the_valid_positions_of_a_patch(pool: str):
    # The odd columns are invalid: of a 2×2 patch its left column is left.
    student, teacher = golden.dense.features()
    valid = torch.ones(2, 5, 4)
    valid[..., 1::2] = 0
    pooled = F.avg_pool2d if pool == "average" else F.max_pool2d
    nodes = [pooled(x[..., ::2], (2, 1), ceil_mode=True) for x in (student, teacher)]
    items = pairwise_affinity(student, teacher, pool=pool, valid=valid, reduction="none")
    torch.testing.assert_close(items, direct(*nodes))


def test_a_patch_may_stick_out():
    # 5×4 in patches of 3: rows 0–2 and 3–4, columns 0–2 and 3.
    student, teacher = golden.dense.features()
    rows, columns = (slice(0, 3), slice(3, 5)), (slice(0, 3), slice(3, 4))
    nodes = [
        torch.stack([torch.stack([x[..., r, c].mean((2, 3)) for c in columns], -1) for r in rows], -2)
        for x in (student, teacher)
    ]
    torch.testing.assert_close(pairwise_affinity(student, teacher, patch=3), direct(*nodes).mean())


def test_a_fraction_is_of_the_map():
    student, teacher = golden.dense.features()
    torch.testing.assert_close(
        pairwise_affinity(student, teacher, patch=0.5), pairwise_affinity(student, teacher, patch=2)
    )
    # 5×2 in halves: patches of 2×1.
    student, teacher = student[..., :2], teacher[..., :2]
    nodes = [F.avg_pool2d(x, (2, 1), ceil_mode=True) for x in (student, teacher)]
    torch.testing.assert_close(pairwise_affinity(student, teacher, patch=0.5), direct(*nodes).mean())
    tiny = pairwise_affinity(student, teacher, patch=0.01)
    torch.testing.assert_close(tiny, pairwise_affinity(student, teacher, patch=1))


# --- both ways to compute


@pytest.mark.parametrize("valid", [None, VALID])
def test_gram_matrices_give_the_same_as_all_affinities(valid: Tensor | None):
    student, teacher = golden.dense.features()
    student.requires_grad_(), teacher.requires_grad_()
    items = pairwise_affinity(student, teacher, patch=1, valid=valid, reduction="none")
    expected = direct(student, teacher, valid)
    torch.testing.assert_close(items, expected, rtol=1e-10, atol=0)
    for own, reference in zip(
        torch.autograd.grad(items.sum(), (student, teacher)),
        torch.autograd.grad(expected.sum(), (student, teacher)),
        strict=True,
    ):
        torch.testing.assert_close(own, reference, rtol=1e-9, atol=1e-14)


def test_gram_matrices_are_precise_in_float32():
    # Student near teacher: the three sums are about 10⁴ times their difference.
    teacher = golden.dense.chirp((1, 8, 32, 32), 0.53, 0.9, 1.0)
    student = teacher + golden.dense.chirp((1, 8, 32, 32), 0.37, 0.1, 0.01)
    exact = direct(student, teacher).item()
    assert pairwise_affinity(student.float(), teacher.float(), patch=1).item() == pytest.approx(exact, rel=1e-2)


class Largest(TorchDispatchMode):
    """The size of the largest tensor that any operation made."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.numel = max([self.numel, *(x.numel() for x in tree_leaves(result) if isinstance(x, Tensor))])
        return result


def test_memory_does_not_grow_with_the_square_of_the_nodes():
    student, teacher = torch.randn(1, 8, 64, 64, requires_grad=True), torch.randn(1, 8, 64, 64)
    with Largest() as largest:
        pairwise_affinity(student, teacher, patch=1).backward()
    assert largest.numel == 8 * 64 * 64  # the map itself; all affinities would be 64⁴


# --- properties


@both_ways
def test_each_model_may_scale_and_rotate_its_channels(patch: int):
    student, teacher = golden.dense.features()
    expected = pairwise_affinity(student, teacher, patch=patch)
    assert expected > 0.1
    rotation = torch.linalg.qr(golden.dense.chirp((6, 6), 0.31, 0.2, 1.0)).Q
    rotated = torch.einsum("dc,bchw->bdhw", rotation, teacher)
    torch.testing.assert_close(pairwise_affinity(7 * student, 0.01 * rotated, patch=patch), expected)
    torch.testing.assert_close(pairwise_affinity(teacher, rotated, patch=patch), torch.zeros_like(expected))


def test_a_node_may_scale():
    student, teacher = golden.dense.features()
    scale = 1.5 + golden.dense.wave((2, 1, 5, 4), 1.3, 0.2, 1.0)
    torch.testing.assert_close(
        pairwise_affinity(student * scale, teacher, patch=1), pairwise_affinity(student, teacher, patch=1)
    )


# --- degenerate


@pytest.mark.parametrize("size", [1, 3])
def test_a_single_node_costs_nothing(size: int):
    student, teacher = (x[..., :size, :size].clone() for x in golden.dense.features())
    value = pairwise_affinity(student.requires_grad_(), teacher, patch=8)  # larger than the map: the map
    assert value.item() == pytest.approx(0, abs=1e-14)
    torch.testing.assert_close(gradient(value, student), torch.zeros_like(student), rtol=0, atol=1e-14)


@both_ways
def test_constant_maps(patch: int):
    # All of the student's affinities are 1, and nothing of the map can be told apart.
    _, teacher = golden.dense.features()
    student = torch.full((2, 3, 5, 4), 2.0, dtype=torch.float64, requires_grad=True)
    value = pairwise_affinity(student, teacher, patch=patch)
    nodes = F.avg_pool2d(teacher, patch, ceil_mode=True)
    torch.testing.assert_close(value, direct(torch.ones_like(nodes), nodes).mean())
    torch.testing.assert_close(gradient(value, student), torch.zeros_like(student), rtol=0, atol=1e-14)


# --- errors


@pytest.mark.parametrize("shape", [(2, 6, 5, 5), (1, 6, 5, 4)])
def test_grids_must_be_equal(shape: tuple[int, ...]):
    student, _ = golden.dense.features()
    with pytest.raises(DistillError, match=r"student \(2, 3, 5, 4\) and teacher \(.*\) must lie on one grid"):
        pairwise_affinity(student, torch.ones(shape))


@pytest.mark.parametrize("patch", [0, -1, 1.0, 2.5, 0.0, math.nan, True, "2"])
def test_patch_is_whole_or_a_fraction(patch: float):
    with pytest.raises(DistillError, match="patch must be a whole number >= 1, or a fraction"):
        pairwise_affinity(*golden.dense.features(), patch=patch)


def test_unknown_pool():
    with pytest.raises(DistillError, match="pool must be 'average' or 'max', got 'min'"):
        pairwise_affinity(*golden.dense.features(), pool="min")


# --- the paper's pixel-wise part


def test_pixel_wise_part_is_soft_targets():
    student, teacher = golden.dense.class_maps()
    value = soft_targets(student.requires_grad_(), teacher, 1.0, dim=1)
    slope = gradient(value, student)
    # Theirs is the cross entropy, the KL plus the teacher's entropy, and is divided by W·H, not by the batch of 2 too.
    p = teacher.softmax(1)
    entropy = -(p * p.log()).sum(1).mean()
    figures = [2 * (value + entropy).item(), 2 * slope[0, 0, 0, 0].item(), 4 * slope.square().sum().item()]
    np.testing.assert_allclose(figures, golden.dense.PIXEL_WISE, rtol=1e-10)
