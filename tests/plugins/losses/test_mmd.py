"""Maximum mean discrepancy (MMD) of feature vectors; of its formula ``test_nst.py`` has more."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from golden.dense import chirp
from kdgraft import Batch, Distiller, DistillError, FeatureMMD, WiringError
from kdgraft.losses import mmd
from kdgraft.losses.mmd import pooled_vectors

KERNELS = ["linear", "poly", "gaussian"]
STUDENT, TEACHER = chirp((2, 5, 4), 0.41, 0.6, 1.2), chirp((2, 5, 4), 0.53, 0.9, 2.0)


def test_one_channel_by_hand():
    # Means 2 and 4; mean squares 5 and 17.
    student, teacher = torch.tensor([[[1.0], [3.0]]]), torch.tensor([[[3.0], [5.0]]])
    assert mmd(student, teacher, kernel="linear").item() == pytest.approx(4)
    assert mmd(student, teacher, kernel="poly").item() == pytest.approx(144)
    # Distances 0, 4, 4 and 0 within each set, 4, 16, 0 and 4 between them: σ² = 6.
    within, between = (2 + 2 * math.exp(-4 / 12)) / 4, (1 + 2 * math.exp(-4 / 12) + math.exp(-16 / 12)) / 4
    assert mmd(student, teacher).item() == pytest.approx(2 * within - 2 * between, rel=1e-6)


@pytest.mark.parametrize("kernel", KERNELS)
def test_sets_have_no_order_and_channels_no_number(kernel: str):
    expected = mmd(STUDENT, TEACHER, kernel=kernel)
    assert expected > 0.01
    torch.testing.assert_close(mmd(STUDENT.flip(1), TEACHER.roll(2, 1), kernel=kernel), expected)
    torch.testing.assert_close(mmd(STUDENT.repeat(1, 1, 3), TEACHER.repeat(1, 1, 3), kernel=kernel), expected)
    torch.testing.assert_close(
        mmd(STUDENT, STUDENT.flip(1), kernel=kernel), torch.zeros_like(expected), atol=1e-12, rtol=0
    )


@pytest.mark.parametrize("factor", [1e-6, 1.0, 1e6])
def test_the_gaussian_kernel_is_of_any_scale_and_origin(factor: float):
    found = mmd(STUDENT.float() * factor + 3 * factor, TEACHER.float() * factor + 3 * factor)
    torch.testing.assert_close(found.double(), mmd(STUDENT, TEACHER), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kernel", KERNELS)
def test_weights_are_repetitions(kernel: str):
    valid = torch.tensor([[2.0, 1, 0, 0, 1], [1, 1, 1, 1, 0]])
    rows = ([0, 0, 1, 4], [0, 1, 2, 3])
    expected = [mmd(STUDENT[i : i + 1, r], TEACHER[i : i + 1, r], kernel=kernel) for i, r in enumerate(rows)]
    torch.testing.assert_close(mmd(STUDENT, TEACHER, kernel=kernel, valid=valid), sum(expected) / 2)


@pytest.mark.parametrize("kernel", KERNELS)
def test_one_vector_and_none(kernel: str):
    one = (STUDENT[:, :1], TEACHER[:, :1])
    product = lambda x, y: (x * y).mean(2)  # noqa: E731
    (s, t), k = one, {"linear": product, "poly": lambda x, y: product(x, y) ** 2}.get(kernel)
    expected = (
        torch.full((2,), 2 - 2 * math.exp(-0.5)).double() if k is None else (k(s, s) - 2 * k(s, t) + k(t, t))[:, 0]
    )
    torch.testing.assert_close(mmd(*one, kernel=kernel, reduction="none"), expected)
    same = torch.zeros(1, 3, 2, requires_grad=True)
    mmd(same, torch.zeros(1, 3, 2), kernel=kernel).backward()
    assert not same.grad.any()


def test_patches_of_a_map():
    maps = torch.arange(2.0 * 3 * 5).reshape(1, 2, 3, 5)
    vectors, weight = pooled_vectors(maps, None, 15)
    torch.testing.assert_close(vectors, maps.flatten(2).mT)
    assert weight is None
    # At most six: patches of 2×2, smaller at the right and at the bottom, of four, four, two, and two, two, one positions.
    vectors, weight = pooled_vectors(maps, None, 6)
    assert weight.tolist() == [[4, 4, 2, 2, 2, 1]]
    assert vectors[0, :, 0].tolist() == [3, 5, 6.5, 10.5, 12.5, 14]
    # Weights of positions: those outside count in nothing.
    inside = torch.zeros(1, 3, 5)
    inside[0, 0, :2], inside[0, 1, 1] = torch.tensor([1.0, 2.0]), 1
    maps[0, :, 2] = math.inf
    vectors, weight = pooled_vectors(maps, inside, 6)
    assert weight.tolist() == [[4, 0, 0, 0, 0, 0]]
    assert vectors[0, :, 0].tolist() == [(0 + 2 * 1 + 6) / 4, 0, 0, 0, 0, 0]
    vectors, _ = pooled_vectors(maps[:, :, :1], None, 2)
    assert vectors[0, :, 0].tolist() == [1, 3.5]
    assert pooled_vectors(maps, None, 1)[0].shape == (1, 1, 2)


def test_mistakes():
    with pytest.raises(DistillError, match="kernel must be one of linear, poly, gaussian"):
        FeatureMMD("0", kernel="cosine")
    with pytest.raises(DistillError, match=r"^FeatureMMD: items must be a whole number >= 2, got 1"):
        FeatureMMD("0", items=1)
    with pytest.raises(WiringError, match=r"student .* and teacher .* must agree; use adapter='auto'"):
        distilled(dict(tap="0", adapter="any"))


# --- the term

IMAGES = chirp((3, 3, 6, 6), 0.37, 0.2, 1.0).float()


def distilled(term: dict[str, object], **settings: object) -> Distiller:
    torch.manual_seed(0)
    models = [
        nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.Flatten(), nn.Linear(36 * width, 4)) for width in (4, 6)
    ]
    return Distiller(*models, [dict(type="FeatureMMD", **term)], IMAGES[:1])


def sets(distiller: Distiller, tap: int) -> tuple[torch.Tensor, torch.Tensor]:
    s, t = (model[:tap](IMAGES) for model in (distiller.student, distiller.teacher.model))
    return distiller.terms["feature_mmd"].adapters[0](s, t), t


@pytest.mark.parametrize("kernel", KERNELS)
def test_positions_of_each_image(kernel: str):
    distiller = distilled(dict(tap="0", kernel=kernel))
    assert distiller.rows[0].adapter == "ConvAdapter 4→6"
    s, t = (maps.flatten(2).mT for maps in sets(distiller, 1))
    torch.testing.assert_close(distiller(IMAGES).loss, mmd(s, t, kernel=kernel))
    batch = Batch(padded_size=(6, 6), image_sizes=[(6, 6), (6, 2), (3, 6)])
    found = distiller(IMAGES, batch=batch).loss
    alone = [maps.unflatten(1, (6, 6)) for maps in (s, t)]
    parts = [
        mmd(*(x[i : i + 1, :h, :w].flatten(1, 2) for x in alone), kernel=kernel)
        for i, (h, w) in enumerate(batch.image_sizes)
    ]
    torch.testing.assert_close(found, torch.stack(parts).mean())


def test_a_large_map_is_pooled_for_the_gaussian_kernel_alone():
    distiller = distilled(dict(tap="0", items=9))
    s, t = (nn.functional.avg_pool2d(maps, 2).flatten(2).mT for maps in sets(distiller, 1))
    torch.testing.assert_close(distiller(IMAGES).loss, mmd(s, t))
    distiller = distilled(dict(tap="0", items=9, kernel="poly"))
    s, t = (maps.flatten(2).mT for maps in sets(distiller, 1))
    torch.testing.assert_close(distiller(IMAGES).loss, mmd(s, t, kernel="poly"))


def test_single_vectors_are_one_set():
    distiller = distilled(dict(tap="2"))
    s, t = sets(distiller, 3)
    torch.testing.assert_close(distiller(IMAGES).loss, mmd(s[None], t[None]))
    distiller = distilled(dict(tap="2", items=2))
    s, t = sets(distiller, 3)
    torch.testing.assert_close(distiller(IMAGES).loss, mmd(s[None, :2], t[None, :2]))


def test_a_student_that_is_moved_by_the_loss_alone_learns_the_distribution():
    torch.manual_seed(0)
    rows = torch.randn(64, 3)
    student, teacher = nn.Linear(3, 2), nn.Linear(3, 2)
    distiller = Distiller(student, teacher, example=rows, recipe=dict(type="mmd", tap="", weight=10.0))
    optimizer = torch.optim.Adam(student.parameters(), lr=0.05)
    for _ in range(100):
        optimizer.zero_grad()
        distiller(rows).loss.backward()
        optimizer.step()
    ours, theirs = (model(rows).detach() for model in (student, teacher))
    torch.testing.assert_close(ours.mean(0), theirs.mean(0), atol=0.1, rtol=0)
    torch.testing.assert_close(ours.T.cov(), theirs.T.cov(), atol=0.15, rtol=0)
