"""The valuable localization region: the authors' figures, and a case by hand."""

from __future__ import annotations

import pytest
import torch

from golden.localization import CASES, VALUABLE, anchors_and_boxes
from kdgraft_det.regions import valuable_region


@pytest.mark.parametrize("variant", ["code", "paper"])
@pytest.mark.parametrize("case", list(CASES))
def test_the_authors_figures(case, variant):
    anchors, counts, boxes = anchors_and_boxes(case)
    found = valuable_region(anchors, counts, boxes, variant=variant)
    expected = torch.zeros(len(anchors), dtype=torch.float64)
    for anchor, weight in VALUABLE[case, variant].items():
        expected[anchor] = weight
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=0)


BY_HAND = torch.tensor(
    [
        [0.0, 0.0, 10.0, 10.0],  # IoU 1,    DIoU 1
        [0.0, 0.0, 10.0, 20.0],  # IoU 1/2,  DIoU 1/2 − 25/500 = 0.45
        [0.0, 0.0, 20.0, 20.0],  # IoU 1/4,  DIoU 1/4 − 50/800 = 0.1875
        [30.0, 30.0, 40.0, 40.0],  # IoU 0, DIoU −1800/3200
        [0.0, 0.0, 5.0, 5.0],  # IoU 1/4,  DIoU 1/4 − 12.5/200 = 0.1875; by the anchor's area 1 − 0.0625 = 0.9375
    ],
    dtype=torch.float64,
)
BOX = torch.tensor([[0.0, 0.0, 10.0, 10.0]], dtype=torch.float64)


@pytest.mark.parametrize(
    ("gamma", "variant", "expected"),
    [
        # α = mean 0.4 + standard deviation √(0.575/4) = 0.779; the first anchor is above it, 0.25·α = 0.195 leaves out 0.1875.
        (0.25, "paper", [0, 0.5, 0, 0, 0]),
        (0.2, "paper", [0, 0.5, 0.25, 0, 0.25]),  # 0.2·α = 0.156
        (0.2, "code", [0, 0.5, 0.25, 0, 0]),  # 0.9375 is above α
    ],
)
def test_by_hand(gamma, variant, expected):
    found = valuable_region(BY_HAND, [5], BOX, gamma=gamma, variant=variant)
    assert found.tolist() == expected


def test_the_threshold_takes_the_nearest_anchors_of_each_level():
    # One candidate a level: of the first three the anchor at distance 0 (IoU 1), of the last two the one at √12.5 (IoU 1/4).
    # α = 0.625 + √(2·0.375²) = 1.155, 0.25·α = 0.289: now the first anchor is below α and inside.
    found = valuable_region(BY_HAND, [3, 2], BOX, topk=1)
    assert found.tolist() == [1, 0.5, 0, 0, 0]


def test_several_boxes_give_the_largest_iou():
    far = torch.tensor([[100.0, 100.0, 110.0, 110.0]], dtype=torch.float64)
    one = valuable_region(BY_HAND, [5], BOX, gamma=0.2)
    both = valuable_region(BY_HAND, [5], torch.cat([far, BOX, BOX]), gamma=0.2)
    torch.testing.assert_close(one, both, rtol=0, atol=0)


def test_nothing_gives_nothing():
    assert valuable_region(BY_HAND, [5], BOX[:0]).tolist() == [0] * 5
    assert valuable_region(BY_HAND[:0], [0], BOX).shape == (0,)
    assert torch.isfinite(valuable_region(BY_HAND[:1], [1, 0], BOX)).all()
