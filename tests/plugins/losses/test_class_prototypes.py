"""Class prototypes (intra-class feature variation)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

import golden.dense
from kdgraft import DistillError
from kdgraft.losses import class_prototypes
from support.tensors import gradient

LABELS = golden.dense.labels()
IGNORED = LABELS == 255


def direct(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """The items, pixel by pixel."""
    items = torch.zeros(labels.shape, dtype=torch.float64)
    for image, row, column in np.ndindex(*labels.shape):
        cosines = []
        for maps in (student[image], teacher[image]):
            prototype = maps[:, labels[image] == labels[image, row, column]].mean(1)
            feature = maps[:, row, column]
            cosines.append(feature.dot(prototype) / feature.norm() / prototype.norm())
        items[image, row, column] = (cosines[0] - cosines[1]) ** 2
    return items


def test_authors_figures():
    student, teacher = golden.dense.features()
    # Their mean is over all 40 pixels, ours over those not ignored.
    value = class_prototypes(student.requires_grad_(), teacher, LABELS, reduction="sum") / 40
    slope = gradient(value, student)
    figures = [value.item(), slope[0, 0, 0, 0].item(), slope.square().sum().item()]
    np.testing.assert_allclose(figures, golden.dense.CLASS_PROTOTYPES, rtol=1e-10)
    mean = class_prototypes(student, teacher, LABELS).item()
    assert mean == pytest.approx(golden.dense.CLASS_PROTOTYPES[0] * 40 / (~IGNORED).sum().item(), rel=1e-10)


def test_by_hand():
    # Pixels 0 and 1 are of class 0, pixel 2 of class 1. Student's (1, 0) and (0, 1) have the prototype (½, ½), cosine √½;
    # teacher's (1, 0) twice are their prototype, cosine 1; a pixel alone has cosine 1 in both. (1 − √½)² = 0.085786
    student = torch.tensor([[[[1.0, 0.0, 5.0]], [[0.0, 1.0, 4.0]]]])
    teacher = torch.tensor([[[[1.0, 1.0, 2.0]], [[0.0, 0.0, -7.0]]]])
    labels = torch.tensor([[[0, 0, 1]]])
    items = class_prototypes(student, teacher, labels, reduction="none")
    assert items.tolist() == [[[pytest.approx(0.085786, abs=1e-6), pytest.approx(0.085786, abs=1e-6), 0]]]
    assert class_prototypes(student, teacher, labels).item() == pytest.approx(2 * 0.085786 / 3, abs=1e-6)
    # Without the last pixel: mean over two. Without the second, the others stand alone.
    ignored = torch.tensor([[[0, 0, 255]]])
    assert class_prototypes(student, teacher, ignored).item() == pytest.approx(0.085786, abs=1e-6)
    ignored = torch.tensor([[[0, 255, 1]]])
    assert class_prototypes(student, teacher, ignored).item() == pytest.approx(0, abs=1e-12)


def test_pixel_by_pixel():
    student, teacher = golden.dense.features()
    items = class_prototypes(student, teacher, LABELS, reduction="none")
    torch.testing.assert_close(items, direct(student, teacher, LABELS).masked_fill(IGNORED, 0))


def test_each_model_may_scale_and_rotate_its_channels():
    student, teacher = golden.dense.features()
    expected = class_prototypes(student, teacher, LABELS)
    rotation = torch.linalg.qr(golden.dense.chirp((6, 6), 0.31, 0.2, 1.0)).Q
    rotated = torch.einsum("dc,bchw->bdhw", rotation, teacher)
    torch.testing.assert_close(class_prototypes(7 * student, 0.01 * rotated, LABELS), expected)
    torch.testing.assert_close(class_prototypes(teacher, rotated, LABELS), torch.zeros_like(expected))
    # But a shift moves the angles.
    assert abs(class_prototypes(student + 1, teacher, LABELS) - expected) > 0.01


def test_classes_may_be_renumbered():
    student, teacher = golden.dense.features()
    renumbered = torch.tensor([17, 3, 0, 99, 1])[LABELS.masked_fill(IGNORED, 0)].masked_fill(IGNORED, 255)
    torch.testing.assert_close(
        class_prototypes(student, teacher, renumbered), class_prototypes(student, teacher, LABELS)
    )


def test_prototypes_are_of_one_image():
    student, teacher = golden.dense.features()
    together = class_prototypes(student, teacher, LABELS, reduction="none")
    apart = [
        class_prototypes(student[i : i + 1], teacher[i : i + 1], LABELS[i : i + 1], reduction="none") for i in (0, 1)
    ]
    torch.testing.assert_close(together, torch.cat(apart))


@pytest.mark.parametrize("ignore_index", [-100, -1, 0, 3, 1000])
def test_any_label_may_be_the_ignored_one(ignore_index: int):
    student, teacher = golden.dense.features()
    labels = (LABELS + 1).masked_fill(LABELS == 2, 7).masked_fill(IGNORED, ignore_index)
    torch.testing.assert_close(
        class_prototypes(student, teacher, labels, ignore_index=ignore_index),
        class_prototypes(student, teacher, LABELS),
    )


def test_pixels_that_are_their_own_prototypes_cost_nothing():
    student, teacher = golden.dense.features()
    every_pixel_a_class = torch.arange(20).expand(2, 20).reshape(2, 5, 4)
    constant = torch.full_like(student, 2.0)
    for s, t, labels in (
        (student[..., :1, :1], teacher[..., :1, :1], LABELS[..., :1, :1]),
        (student, teacher, every_pixel_a_class),
        (constant, torch.full_like(teacher, -3.0), LABELS),
    ):
        leaf = s.clone().requires_grad_()
        value = class_prototypes(leaf, t, labels)
        assert value.item() == pytest.approx(0, abs=1e-14)
        torch.testing.assert_close(gradient(value, leaf), torch.zeros_like(leaf), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("teacher", "labels"), [((2, 6, 5, 3), (2, 5, 4)), ((1, 6, 5, 4), (2, 5, 4)), ((2, 6, 5, 4), (2, 4, 5))]
)
def test_all_must_lie_on_one_grid(teacher: tuple[int, ...], labels: tuple[int, ...]):
    with pytest.raises(
        DistillError, match=r"student \(2, 3, 5, 4\), teacher \(.*\) and labels .* must lie on one grid"
    ):
        class_prototypes(torch.ones(2, 3, 5, 4), torch.ones(teacher), torch.zeros(labels, dtype=torch.long))


def test_labels_have_no_channel():
    with pytest.raises(DistillError, match=r"labels \(2, 1, 5, 4\) must lie on one grid"):
        class_prototypes(torch.ones(2, 3, 5, 4), torch.ones(2, 3, 5, 4), LABELS[:, None])
