"""The region near objects: the authors' masks, cases by hand, levels, padding."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import golden.dense
from kdgraft import REGIONS, Batch, DistillError, WiringError
from kdgraft.regions import FineGrained


def boxes(*rows: tuple[float, ...]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float32).reshape(-1, 4)


def square(side: float, centre: float = 0.0) -> Tensor:
    return boxes((centre - side / 2, centre - side / 2, centre + side / 2, centre + side / 2))


def grid(height: int, width: int, images: int = 1) -> Tensor:
    return torch.zeros(images, 3, height, width)


def test_the_authors_masks():
    found = [boxes(*map(tuple, rows)) for rows in golden.dense.FINE_GRAINED_BOXES]
    batch = Batch(padded_size=(304, 400), image_sizes=[(304, 400)] * 2, boxes=found)
    batch.extra["base_anchors"] = [((16, 16), boxes(*golden.dense.FINE_GRAINED_ANCHORS))]
    masks = FineGrained()(batch, grid(19, 25, 2))
    for mask, (rows, columns, places) in zip(masks, golden.dense.FINE_GRAINED, strict=True):
        assert mask.sum(1).tolist() == rows
        assert mask.sum(0).tolist() == columns
        assert mask.flatten().nonzero().sum().item() == places


def test_by_hand():
    # Anchors are 16×16 at multiples of 8; the box is the anchor of position (1, 1). Moved by one position the overlap is ½ of
    # 256, the IoU ⅓; diagonally ¼ and 1/7; by two there is none. (0, 0) to (2, 2) are the neighbours.
    batch = Batch(padded_size=(32, 32), boxes=[boxes((0, 0, 16, 16))])
    batch.extra["base_anchors"] = [((8, 8), square(16))]
    cross = [[0, 1, 0, 0], [1, 1, 1, 0], [0, 1, 0, 0], [0, 0, 0, 0]]
    block = [[1, 1, 1, 0]] * 3 + [[0] * 4]
    alone = [[0] * 4, [0, 1, 0, 0], [0] * 4, [0] * 4]
    for threshold, expected in ((0.5, alone), (0.3, cross), (0.1, block), (0.0, block), (1.0, [[0] * 4] * 4)):
        assert FineGrained(threshold)(batch, grid(4, 4))[0].tolist() == expected


def test_an_anchor_of_any_shape_and_any_box_will_do():
    # Of the squares of 8 and 16, the first fits a box of 8×8 around (8, 8), the second one of 16×16 around (24, 24).
    batch = Batch(padded_size=(32, 32), boxes=[boxes((4, 4, 12, 12), (16, 16, 32, 32))])
    batch.extra["base_anchors"] = [((8, 8), torch.cat([square(8), square(16)]))]
    found = FineGrained()(batch, grid(4, 4))[0]
    assert found.nonzero().tolist() == [[1, 1], [3, 3]]


def test_the_best_is_taken_over_all_levels():
    # A box of 16×16 is an anchor of the first level; the second one's anchor of 64×64 has an IoU of 1/16 with it at most.
    batch = Batch(padded_size=(64, 64), boxes=[boxes((8, 8, 24, 24))])
    batch.extra["base_anchors"] = [((8, 8), square(16)), ((32, 32), square(64, 16))]
    first, second = FineGrained()(batch, grid(8, 8)), FineGrained()(batch, grid(2, 2))
    assert first[0].nonzero().tolist() == [[2, 2]]
    assert not second.any()
    alone = Batch(padded_size=(64, 64), boxes=batch.boxes)
    alone.extra["base_anchors"] = batch.extra["base_anchors"][1:]
    assert FineGrained()(alone, grid(2, 2)).any()


@pytest.mark.parametrize("anchors", ["points", "none", "another grid"])
def test_without_anchors_of_the_hosts_own_there_are_squares(anchors: str):
    # scale 2: 16×16 around the centres 4, 12, 20, 28 of the cells; a box of 16×16 around (12, 12) is one of them.
    batch = Batch(padded_size=(32, 32), boxes=[boxes((4, 4, 20, 20))])
    if anchors == "points":
        batch.extra["base_anchors"] = [((8.0, 8.0), None), ((16.0, 16.0), None)]
    if anchors == "another grid":
        batch.extra["base_anchors"] = [((16.0, 16.0), square(1))]
    region = REGIONS.build(dict(type="fine_grained", scale=2, ratios=[1.0]))
    assert region(batch, grid(4, 4))[0].nonzero().tolist() == [[1, 1]]


def test_the_squares_are_stretched_at_equal_area():
    # 16 · √2 × 16 / √2 around (12, 12), ratio ½: wide.
    wide = boxes((12 - 8 * 2**0.5, 12 - 8 / 2**0.5, 12 + 8 * 2**0.5, 12 + 8 / 2**0.5))
    batch = Batch(padded_size=(32, 32), boxes=[wide])
    found = {ratio: FineGrained(0.99, scale=2, ratios=(ratio,))(batch, grid(4, 4))[0] for ratio in (0.5, 1.0, 2.0)}
    assert found[0.5].nonzero().tolist() == [[1, 1]]
    every = FineGrained(0.99, scale=2)(batch, grid(4, 4))[0]
    assert torch.equal(every, found[0.5])


def test_padding_changes_nothing():
    # A thin box at the image's right border (16 pixels wide): the anchor that fits it best is centred in the padding.
    found = boxes((8, 0, 16, 16))
    anchors = [((8, 8), torch.cat([square(8, 4), boxes((-4, 0, 4, 16))]))]
    image = Batch(padded_size=(32, 16), image_sizes=[(32, 16)], boxes=[found], extra={"base_anchors": anchors})
    padded = Batch(padded_size=(32, 40), image_sizes=[(32, 16)], boxes=[found], extra={"base_anchors": anchors})
    region = FineGrained()
    alone, among = region(image, grid(4, 2)), region(padded, grid(4, 5))
    assert alone.any()
    assert torch.equal(among[:, :, :2], alone)
    assert not among[:, :, 2:].any()


def test_images_without_boxes_and_odd_boxes_have_no_region():
    odd = boxes((10, 10, 10, 10), (500, 500, 600, 600), (20, 20, 4, 4))
    batch = Batch(padded_size=(32, 32), boxes=[boxes(), odd])
    found = FineGrained()(batch, grid(4, 4, 2))
    assert found.shape == (2, 4, 4) and not found[0].any() and found.isfinite().all()
    assert not found[1].any()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(threshold=-0.1), r"threshold must be in \[0, 1\], got -0.1"),
        (dict(threshold=1.1), r"threshold must be in \[0, 1\], got 1.1"),
        (dict(scale=0), "scale must be a number > 0, got 0"),
        (dict(ratios=[]), r"ratios must be a list of numbers, got \[\]"),
        (dict(ratios=[1, -1]), "a ratio must be a number > 0, got -1"),
        (dict(treshold=0.5), "takes no argument 'treshold'; did you mean 'threshold'"),
    ],
)
def test_wrong_settings(settings: dict, message: str):
    with pytest.raises(DistillError, match=message):
        REGIONS.build(dict(type="fine_grained", **settings))


def test_it_needs_a_map_and_boxes():
    with pytest.raises(WiringError, match="needs a map"):
        FineGrained()(Batch(padded_size=(32, 32)), grid(4, 4))


def test_a_larger_teachers_map_has_the_students_anchors_at_finer_positions():
    # The student's P3 and P4 under a teacher of twice its size: the teacher's P3 has the grid of no level of the student, its P4
    # that of the student's P3.
    batch = Batch(padded_size=(32, 32), boxes=[boxes((0, 0, 16, 16))])
    batch.extra["base_anchors"] = [((8, 8), square(16)), ((16, 16), square(32))]
    expected = [FineGrained(0.3)(batch, grid(side, side)) for side in (4, 2)]
    assert expected[0].any()
    for mask, side in zip(expected, (8, 4), strict=True):
        found = FineGrained(0.3)(batch, grid(side, side), 2.0)
        assert torch.equal(found, mask.repeat_interleave(2, 1).repeat_interleave(2, 2))
