"""Labels weighted by the teacher's confidence (CWTM)."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

import golden
from kdgraft import DistillError
from kdgraft.losses import confidence, confidence_weighted

LABELS = torch.tensor([0, 2, 4, 6, 8])


def test_two_items_by_hand():
    # The teacher is sure by 1/2 (1/4, 1/4, 1/2) and 2/3; the student gives the true classes 1/2 and 1/4.
    teacher = torch.tensor([[1.0, 1.0, 2.0], [4.0, 1.0, 1.0]]).log()
    student = torch.tensor([[2.0, 1.0, 1.0], [1.0, 1.0, 2.0]]).log()
    items = confidence_weighted(student, teacher, torch.tensor([0, 1]), reduction="none")
    torch.testing.assert_close(items, torch.tensor([math.log(2) / 2, 2 * math.log(4) / 3]))
    torch.testing.assert_close(confidence(teacher), torch.tensor([1 / 2, 2 / 3]))
    torch.testing.assert_close(confidence(teacher.T, dim=0, weight=torch.tensor([0, 3])), torch.tensor([0.0, 2.0]))


def test_a_teacher_equally_sure_of_all_items_scales_the_cross_entropy():
    student, teacher = golden.logits()
    teacher = teacher[:1].expand(5, 10)
    found = confidence_weighted(student, teacher, LABELS)
    torch.testing.assert_close(found, F.cross_entropy(student, LABELS) * teacher[0].softmax(0).max())


def test_classes_that_an_item_lacks_count_neither_for_the_student():
    student, teacher = golden.logits()
    present = torch.ones(5, 10, dtype=torch.bool)
    present[:, 9] = False
    masked = [x.masked_fill(~present, -1e4) for x in (student, teacher)]
    found = confidence_weighted(*masked, LABELS, present=present)
    torch.testing.assert_close(found, confidence_weighted(student[:, :9], teacher[:, :9], LABELS))


def test_labels_must_be_one_for_each_item():
    with pytest.raises(DistillError, match=r"confidence_weighted: labels \(5, 1\) must be one for each item"):
        confidence_weighted(*golden.logits(), LABELS[:, None])
