"""Cross-head distillation's functions: the authors' figures, alignment by hand. What every loss does is in test_every_loss.py.

jbwang1997/CrossKD@87e156a46259e3a516b65fc6a049b200b9ab0d54, mmdet/models/detectors/crosskd_gfl.py and kd_loss.py.
"""

from __future__ import annotations

import math

import pytest
import torch

from golden import features, logits
from kdgraft.losses import align_scale, focused_entropy


def test_the_alignment_is_the_authors():
    aligned = align_scale(*features())
    assert aligned.square().sum().item() == pytest.approx(483.73278356085876, rel=1e-9)
    expected = [-1.3670396611018911, -1.7610272083705942, -1.90072307058492, -1.7672200681370842]
    assert aligned[1, 3].flatten()[:4].tolist() == pytest.approx(expected, rel=1e-9)


def test_the_class_loss_is_the_authors():
    student, teacher = logits()
    student.requires_grad_()
    value = focused_entropy(student, teacher, reduction="sum")
    value.backward()
    assert value.item() == pytest.approx(43.68327305704167, rel=1e-12)
    # With a gradient through the factor: without it this is another number.
    assert student.grad.abs().sum().item() == pytest.approx(22.673258726543928, rel=1e-9)


def test_alignment_by_hand():
    # Student 0, 0, 3: mean 1, variance (1 + 1 + 4) / 2 = 3. Teacher 2, 4, 9: mean 5, variance (9 + 1 + 16) / 2 = 13.
    student = torch.tensor([0.0, 0.0, 3.0]).reshape(1, 1, 1, 3)
    teacher = torch.tensor([2.0, 4.0, 9.0]).reshape(1, 1, 1, 3)
    slope = math.sqrt(13 / 3)
    expected = [5 - slope, 5 - slope, 5 + 2 * slope]
    assert align_scale(student, teacher).flatten().tolist() == pytest.approx(expected, rel=1e-5)
    # A fourth position in the padding: no part of the statistics, and the teacher's own afterwards.
    padded = [torch.cat([x, torch.full((1, 1, 1, 1), fill)], -1) for x, fill in ((student, torch.nan), (teacher, 7.0))]
    padded[0].requires_grad_()
    aligned = align_scale(*padded, torch.tensor([[[1.0, 1.0, 1.0, 0.0]]]))
    assert aligned.flatten().tolist() == pytest.approx([*expected, 7.0], rel=1e-5)
    aligned[..., 2].sum().backward()
    assert padded[0].grad.isfinite().all()
    assert padded[0].grad[..., 3] == 0


def test_the_alignment_does_not_mind_the_students_scale():
    student, teacher = features()
    torch.testing.assert_close(
        align_scale(3 * student + 2, teacher), align_scale(student, teacher), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("value", [0.0, 0.1])
@pytest.mark.parametrize("valid", [None, torch.zeros(2, 3, 3), torch.eye(3)[None].expand(2, 3, 3) * 0 + 1])
def test_a_constant_channel_becomes_the_teachers_mean_without_gradient(value, valid):
    student = torch.full((2, 1, 3, 3), value, requires_grad=True)
    teacher = torch.arange(18.0).reshape(2, 1, 3, 3)
    aligned = align_scale(student, teacher, valid)
    expected = teacher if valid is not None and not valid.any() else torch.full_like(teacher, 8.5)
    torch.testing.assert_close(aligned, expected)
    aligned.sum().backward()
    assert (student.grad == 0).all()


def test_one_position_has_no_standard_deviation():
    assert align_scale(torch.ones(1, 2, 1, 1), torch.full((1, 2, 1, 1), 5.0)).flatten().tolist() == [5.0, 5.0]
