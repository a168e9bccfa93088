"""The teacher's view of the student's batch."""

from __future__ import annotations

import pytest
import torch
from mmengine.model import ImgDataPreprocessor
from torch import nn

from kdgraft.errors import WiringError
from kdgraft_mm.views import TeacherView

SIZES = [(8, 8), (5, 8), (8, 6)]


def preprocessor(mean=(1.0, 2.0, 3.0), std=(4.0, 5.0, 6.0), **settings):
    return ImgDataPreprocessor(mean=mean, std=std, **settings)


def images():
    return [
        torch.randint(0, 256, (3, *size), generator=torch.Generator().manual_seed(i)) for i, size in enumerate(SIZES)
    ]


PAIRS = [
    (preprocessor(), preprocessor((10.0, 20.0, 30.0), (7.0, 8.0, 9.0))),
    (preprocessor(bgr_to_rgb=True), preprocessor(bgr_to_rgb=False)),
    (preprocessor(), preprocessor((10.0, 20.0, 30.0), (7.0, 8.0, 9.0), bgr_to_rgb=True)),
    (preprocessor(rgb_to_bgr=True, pad_value=7), preprocessor((0.0, 0.0, 0.0), (1.0, 1.0, 1.0), pad_value=2)),
    (preprocessor(pad_value=1), preprocessor(pad_value=5)),
    (ImgDataPreprocessor(), preprocessor()),
    (preprocessor(bgr_to_rgb=True), ImgDataPreprocessor()),
]


@pytest.mark.parametrize(("student", "teacher"), PAIRS)
def test_it_is_what_the_teachers_preprocessor_makes_of_the_raw_images(student, teacher):
    raw = {"inputs": images()}
    inputs = student({"inputs": [image.clone() for image in raw["inputs"]]})["inputs"].float()
    expected = teacher({"inputs": [image.clone() for image in raw["inputs"]]})["inputs"].float()
    before = inputs.clone()
    view = TeacherView(student, teacher)
    found = view(inputs, SIZES)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
    assert torch.equal(inputs, before)  # the student's batch is its own


def test_by_hand():
    # Raw pixel 21: the student sees (21 − 1)/4 = 5 in its first channel, the teacher (21 − 11)/2 = 5 in its last (swapped).
    view = TeacherView(preprocessor(), preprocessor((12.0, 13.0, 11.0), (2.0, 2.0, 2.0), bgr_to_rgb=True))
    found = view(torch.full((1, 3, 1, 1), 5.0), [(1, 1)])
    # Channels of the raw image: 21, 27, 33; in the teacher's order 33, 27, 21.
    assert found.flatten().tolist() == [(33 - 12) / 2, (27 - 13) / 2, (21 - 11) / 2]


def test_the_same_normalisation_is_the_very_same_tensor():
    inputs = torch.randn(3, 3, 8, 8)
    assert TeacherView(preprocessor(), preprocessor())(inputs, SIZES) is inputs


def test_half_precision_stays():
    view = TeacherView(preprocessor(), preprocessor((10.0, 20.0, 30.0)))
    inputs = torch.randn(3, 3, 8, 8).bfloat16()
    found = view(inputs, SIZES)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), view(inputs.float(), SIZES), rtol=0.05, atol=0.05)


def test_other_numbers_of_channels_are_refused():
    with pytest.raises(WiringError, match="3 channels, the teacher's 1"):
        TeacherView(preprocessor(), ImgDataPreprocessor(mean=(1.0,), std=(2.0,)))


def test_a_preprocessor_without_normalisation_is_raw_pixels():
    assert TeacherView(nn.Identity(), nn.Identity()).identity
