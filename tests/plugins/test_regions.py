"""Regions: weights by hand on small grids, in the frame of the padded input."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kdgraft import REGIONS, Batch, Region, WiringError
from kdgraft.losses.focal_global import box_scales
from kdgraft.regions import FineGrained, foreground_weights, on_grid, valid_positions


def grid(height: int, width: int, images: int = 1) -> torch.Tensor:
    return torch.zeros(images, 3, height, width)


def boxes(*rows: tuple[float, float, float, float]) -> torch.Tensor:
    return torch.tensor(rows).reshape(-1, 4)


# --- valid positions: 32×32 pixels on 4×4 cells of 8 pixels, whose centres lie at 4, 12, 20, 28


def test_nothing_is_padded():
    assert valid_positions([(32, 32), (32, 32)], (32, 32), grid(4, 4, 2)) is None


@pytest.mark.parametrize(
    ("size", "rows", "columns"),
    [((16, 32), 2, 4), ((32, 20), 4, 2), ((32, 21), 4, 3), ((13, 12), 2, 1), ((4, 5), 0, 1)],
)
def test_a_position_is_valid_when_its_centre_lies_in_the_image(size: tuple[int, int], rows: int, columns: int):
    weights = valid_positions([(32, 32), size], (32, 32), grid(4, 4, 2))
    expected = torch.zeros(4, 4)
    expected[:rows, :columns] = 1
    assert torch.equal(weights[0], torch.ones(4, 4))
    assert torch.equal(weights[1], expected)


def test_cells_need_not_be_square():
    # 32×64 pixels on 2×8 cells of 16×8; centres at 8, 24 and at 4, 12, … 60.
    (weights,) = valid_positions([(20, 30)], (32, 64), grid(2, 8))
    assert weights.tolist() == [[1, 1, 1, 1, 0, 0, 0, 0], [0] * 8]


# --- foreground


def test_a_box_spreads_1_over_the_positions_it_touches():
    # x from 8 to 24 touches cells 1 and 2, y from 0 to 8 cell 0: two positions of ½.
    (weights,) = foreground_weights([boxes((8, 0, 24, 8))], (32, 32), grid(4, 4))
    assert weights.tolist() == [[0, 0.5, 0.5, 0], [0] * 4, [0] * 4, [0] * 4]
    assert weights.dtype is torch.float32


def test_a_box_across_cell_borders_touches_both_sides():
    # 7.9 to 8.1 lies in cells 0 and 1 both ways.
    (weights,) = foreground_weights([boxes((7.9, 7.9, 8.1, 8.1))], (32, 32), grid(4, 4))
    assert weights[:2, :2].tolist() == [[0.25, 0.25], [0.25, 0.25]]
    assert weights.sum() == 1


def test_a_box_smaller_than_a_cell_and_one_without_area_get_one_cell():
    (weights,) = foreground_weights([boxes((9, 17, 10, 18), (24, 8, 24, 8))], (32, 32), grid(4, 4))
    expected = torch.zeros(4, 4)
    expected[2, 1] = 1
    expected[1, 3] = 1
    assert torch.equal(weights, expected)


def test_a_box_on_the_border_stays_in_the_map():
    (weights,) = foreground_weights([boxes((32, 32, 32, 32), (-5, -5, 3, 3))], (32, 32), grid(4, 4))
    expected = torch.zeros(4, 4)
    expected[3, 3] = 1
    expected[0, 0] = 1
    assert torch.equal(weights, expected)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_where_boxes_overlap_the_smallest_wins(order: tuple[int, int]):
    # The large box covers the 9 cells of rows 0-2 × columns 0-2, the small one two of them: 7 are left for the large.
    both = boxes((0, 0, 24, 24), (8, 8, 16, 24))[list(order)]
    (weights,) = foreground_weights([both], (32, 32), grid(4, 4))
    large, small = 1 / 7, 1 / 2
    expected = torch.tensor(
        [[large, large, large, 0], [large, small, large, 0], [large, small, large, 0], [0, 0, 0, 0]]
    )
    torch.testing.assert_close(weights, expected)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2)])
def test_three_boxes_on_top_of_each_other(order: tuple[int, ...]):
    # 16 positions; a box of 6 on it, and one of 1 on that: 10, 5 and 1 are left.
    stack = boxes((0, 0, 32, 32), (8, 8, 24, 32), (8, 8, 16, 16))[list(order)]
    (weights,) = foreground_weights([stack], (32, 32), grid(4, 4))
    a, b, c = 1 / 10, 1 / 5, 1
    torch.testing.assert_close(weights, torch.tensor([[a, a, a, a], [a, c, b, a], [a, b, b, a], [a, b, b, a]]))


def test_boxes_on_cells_that_are_not_square():
    # 32×64 pixels on 2×4 cells of 16×16, then on 4×2 of 8×32: x from 20 to 40, y from 2 to 10.
    box = boxes((20, 2, 40, 10))
    (wide,) = foreground_weights([box], (32, 64), grid(2, 4))
    assert wide.tolist() == [[0, 0.5, 0.5, 0], [0, 0, 0, 0]]
    (tall,) = foreground_weights([box], (32, 64), grid(4, 2))
    assert tall.tolist() == [[0.25, 0.25], [0.25, 0.25], [0, 0], [0, 0]]


def test_every_box_weighs_1_whatever_its_area():
    sizes = foreground_weights([boxes((0, 0, 8, 8)), boxes((0, 0, 32, 32))], (32, 32), grid(4, 4, 2))
    assert sizes.sum((1, 2)).tolist() == [1, 1]
    assert sizes[0, 0, 0] == 1
    assert (sizes[1] == 1 / 16).all()


def test_empty_images():
    weights = foreground_weights([boxes(), boxes((0, 0, 8, 8)), boxes()], (32, 32), grid(4, 4, 3))
    assert weights.sum((1, 2)).tolist() == [0, 1, 0]
    assert torch.equal(foreground_weights([boxes(), boxes()], (32, 32), grid(4, 4, 2)), torch.zeros(2, 4, 4))


def test_boxes_are_scaled_by_the_padded_size():
    # An image of 16×16 in a padded input of 32×32. Scaled by the unpadded size the box (8, 8, 16, 16) would land on the
    # last two cells both ways; it lies on cell 1.
    (weights,) = foreground_weights([boxes((8, 8, 16, 16))], (32, 32), grid(4, 4))
    assert weights.nonzero().tolist() == [[1, 1]]


def many_boxes(images: int, count: int, height: int, width: int) -> list[torch.Tensor]:
    """Boxes of all sizes on ``height`` × ``width`` pixels, some of exactly the same area."""
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(images, count, 2, generator=generator) * torch.tensor([width, height])
    sides = 2 ** torch.randint(0, 7, (images, count, 2), generator=generator)
    return list(torch.cat([corners, (corners + sides)], 2))


def test_many_boxes_weigh_what_painting_them_one_by_one_says():
    # From the largest to the smallest, of equal ones the last first: each takes what it touches from those before it.
    found = many_boxes(2, 70, 96, 160)
    weights = foreground_weights([found[0], found[1][:33]], (96, 160), grid(12, 20, 2))
    for image, painted in enumerate((found[0], found[1][:33])):
        owner = torch.full((12, 20), -1)
        area = [float((x2 - x1) * (y2 - y1)) for x1, y1, x2, y2 in painted]
        for box in sorted(range(len(painted)), key=lambda i: (-area[i], -i)):
            x1, y1, x2, y2 = (value / 8 for value in painted[box].tolist())
            columns = range(min(int(x1), 19), min(max(math.ceil(x2), int(x1) + 1), 20))
            rows = range(min(int(y1), 11), min(max(math.ceil(y2), int(y1) + 1), 12))
            for row in rows:
                for column in columns:
                    owner[row, column] = box
        expected = torch.zeros(12, 20)
        for box in owner.unique():
            if box >= 0:
                expected[owner == box] = 1 / (owner == box).sum()
        torch.testing.assert_close(weights[image], expected)


class Largest(TorchDispatchMode):
    """Notes the largest tensor that is made."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, (tuple, list)) else [made]:
            if isinstance(tensor, torch.Tensor) and not tensor._is_view():
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return made


@pytest.mark.parametrize(
    "weigh",
    [
        foreground_weights,
        box_scales,
        lambda found, size, feature: FineGrained()(Batch(padded_size=size, boxes=found), feature),
    ],
    ids=["foreground", "focal and global", "fine grained"],
)
def test_memory_does_not_grow_with_the_number_of_boxes(weigh):
    used = []
    for count in (128, 512):
        with Largest() as largest:
            weigh(many_boxes(2, count, 512, 512), (512, 512), torch.zeros(2, 1, 64, 64))
        used.append(largest.bytes)
    assert used[1] <= 1.5 * used[0]
    assert used[1] <= 2 * 64 * 64 * 512  # what a truth value for each box and position takes


def test_no_gradient_and_no_precision_of_the_features():
    feature = torch.zeros(1, 3, 4, 4, dtype=torch.bfloat16, requires_grad=True)
    weights = foreground_weights([boxes((0, 0, 24, 8))], (32, 32), feature)
    assert weights.dtype is torch.float32
    assert not weights.requires_grad
    torch.testing.assert_close(weights[0, 0], torch.tensor([1 / 3, 1 / 3, 1 / 3, 0]))


# --- by name


def test_region_all():
    region = REGIONS.build("all")
    assert region(Batch(), grid(4, 4)) is None
    assert region(Batch(padded_size=(32, 32), image_sizes=[(32, 32)]), grid(4, 4)) is None
    assert region(Batch(padded_size=(32, 32), image_sizes=[(16, 16)]), torch.zeros(1, 7, 3)) is None
    weights = region(Batch(padded_size=(32, 32), image_sizes=[(16, 16)]), grid(4, 4))
    assert weights[0].nonzero().tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]


def test_region_foreground():
    region = REGIONS.build("foreground")
    assert region.needs == {"boxes"}
    batch = Batch(padded_size=(32, 32), boxes=[boxes((0, 0, 8, 8))])
    assert torch.equal(region(batch, grid(4, 4)), foreground_weights(batch.boxes, (32, 32), grid(4, 4)))
    for wrong, feature in ((Batch(padded_size=(32, 32)), grid(4, 4)), (batch, torch.zeros(1, 7, 3))):
        with pytest.raises(WiringError, match=r"needs a map .* and a batch with boxes"):
            region(wrong, feature)


def test_a_position_of_another_grid_takes_the_pixel_at_its_centre():
    pixels = torch.arange(24).view(1, 4, 6)
    assert on_grid(pixels, (4, 6)) is pixels
    # Centres at 1 and 3 of 4 rows, at 1, 3 and 5 of 6 columns.
    assert on_grid(pixels, (2, 3))[0].tolist() == [[7, 9, 11], [19, 21, 23]]
    # Odd factors meet the middle pixel: 1 of 3.
    assert on_grid(torch.arange(9).view(1, 3, 3), (1, 1)).item() == 4
    # A finer grid repeats.
    assert on_grid(torch.tensor([[[1, 2]]]), (2, 4))[0].tolist() == [[1, 1, 2, 2]] * 2
    # Grids that are no divisors stay inside; nothing is interpolated.
    assert on_grid(pixels, (3, 5))[0].tolist() == [[0, 1, 3, 4, 5], [12, 13, 15, 16, 17], [18, 19, 21, 22, 23]]
    assert on_grid(pixels == 9, (2, 3)).dtype is torch.bool


def test_region_all_leaves_out_pixels_that_the_host_does_not_count():
    region = REGIONS.build("all")
    pixels = torch.ones(2, 8, 8, dtype=torch.bool)
    pixels[0, :, 4:] = False
    pixels[1, 3, 3] = False  # the centre of the second cell's
    weights = region(Batch(valid=pixels), grid(4, 4, 2))
    assert weights.dtype is torch.float32
    assert weights[0].tolist() == [[1, 1, 0, 0]] * 4
    assert (weights[1] == 0).nonzero().tolist() == [[1, 1]]
    assert region(Batch(), grid(4, 4)) is None and region(Batch(valid=pixels), torch.zeros(2, 7, 3)) is None


def test_a_base_region_is_abstract():
    with pytest.raises(NotImplementedError):
        Region()(Batch(), grid(1, 1))
