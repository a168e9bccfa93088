"""A teacher at its own input resolution: the student's batch from the teacher's, and how the two correspond."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F

from kdgraft.adapters import resize_to
from kdgraft.errors import DistillError
from kdgraft.regions import foreground_weights
from kdgraft_mm.resolution import Resolution, nearest_positions, reduce_image, teacher_scale

SCALES = [Fraction(2), Fraction(3, 2), Fraction(4, 3), Fraction(8, 5), Fraction(3)]
SIZES = [(200, 333), (331, 250), (96, 40)]


def coordinates(height: int, width: int) -> torch.Tensor:
    """An image whose two channels are the y and x of its pixels' centres."""
    y, x = torch.arange(height) + 0.5, torch.arange(width) + 0.5
    return torch.stack([y[:, None].expand(height, width), x.expand(height, width)])


def batch_of(sizes, pad_value: float, divisor: int = 32) -> torch.Tensor:
    height, width = (math.ceil(max(side) / divisor) * divisor for side in zip(*sizes, strict=True))
    return torch.stack([F.pad(coordinates(h, w), (0, width - w, 0, height - h), value=pad_value) for h, w in sizes])


# --- the option


@pytest.mark.parametrize(
    ("given", "scale"),
    [(1, 1), (1.0, 1), (2, 2), (2.0, 2), (1.5, Fraction(3, 2)), (1.333, Fraction(4, 3)), (1.6, Fraction(8, 5))],
)
def test_the_scale_is_a_ratio_of_small_numbers(given, scale):
    assert teacher_scale(dict(config="a", scale=given)) == scale
    assert teacher_scale(dict(config="a")) == 1
    assert teacher_scale(None) == 1  # what is no teacher at all is refused elsewhere


@pytest.mark.parametrize("given", [0, -1, 0.5, "2", True, None, math.nan, math.inf, 17, [2]])
def test_no_scale(given):
    with pytest.raises(DistillError, match=r"scale must be a number from 1 to 16 .*, got"):
        teacher_scale(dict(scale=given))


def test_no_ratio_of_small_numbers_names_the_nearest():
    with pytest.raises(DistillError, match=r"scale=1\.67 is no ratio of small whole numbers.*write scale=5/3$"):
        teacher_scale(dict(scale=1.67))


# --- sizes


def test_sizes_by_hand():
    # 800×1333 on the teacher. The student's 400×667 is padded to multiples of 32, 416×672; twice that is the teacher's.
    twice = Resolution(Fraction(2), 32, 32)
    assert twice.reduced((800, 1333)) == (400, 667)
    assert twice.pad_shape((400, 667)) == (416, 672)
    assert twice.padded([(400, 667), (300, 500)]) == (416, 672)
    assert twice.enlarged((416, 672)) == (832, 1344)
    # 3/2 of a multiple of 32 is one of 32 too where it is one of 64.
    half = Resolution(Fraction(3, 2), 32, 32)
    assert half.padded([(400, 667)]) == (448, 704) and half.enlarged((448, 704)) == (672, 1056)
    # A teacher of any size leaves the student's own padding; one of multiples of 64 asks for its own.
    assert Resolution(Fraction(2), 32, 1).padded([(33, 32)]) == (64, 32)
    assert Resolution(Fraction(2), 1, 64).padded([(33, 32)]) == (64, 32)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("divisors", [(32, 32), (1, 32), (32, 1), (16, 64), (128, 32)])
def test_both_padded_sizes_are_multiples_and_correspond(scale, divisors):
    resolution = Resolution(scale, *divisors)
    for size in [(1, 1), (97, 130), (333, 201)]:
        small = resolution.reduced(size)
        padded = resolution.padded([small])
        large = resolution.enlarged(padded)
        for side in range(2):
            assert padded[side] % divisors[0] == 0 and large[side] % divisors[1] == 0
            assert large[side] == padded[side] * scale
            assert padded[side] >= small[side] and large[side] >= size[side]


# --- pixels


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("size", SIZES)
def test_a_pixel_lies_where_it_should(scale, size):
    # Interpolation keeps what is linear: the pixel's own place, away from the border. (With a scale that is no whole number
    # a triangle sampled at pixels has its centre of mass off by a few hundredths.)
    within = 1e-3 if scale.denominator == 1 else 0.1
    small = reduce_image(coordinates(*size), scale)
    assert small.shape == (2, math.ceil(size[0] / scale), math.ceil(size[1] / scale))
    expected = coordinates(*small.shape[1:]) * float(scale)
    torch.testing.assert_close(small[:, 2:-2, 2:-2], expected[:, 2:-2, 2:-2], rtol=0, atol=within)


def test_a_reduced_image_by_hand():
    # Halving with an antialiased triangle: 1/8 · (1, 3, 3, 1) each way; at the left border (3, 3, 1)/7.
    row = torch.tensor([0.0, 7.0, 14.0, 0.0, 8.0, 16.0])
    small = reduce_image(row.expand(3, 4, 6), Fraction(2))
    assert small.shape == (3, 2, 3)
    # On the right the border is repeated: 0 + 3·8 + 3·16 + 16.
    torch.testing.assert_close(small[0, 0], torch.tensor([(21 + 14) / 7, (7 + 42 + 0 + 8) / 8, (0 + 24 + 48 + 16) / 8]))


def test_reducing_is_antialiased():
    stripes = (torch.arange(64) % 2).float().expand(1, 64, 64)
    small = reduce_image(stripes, Fraction(3))
    assert (small[..., 1:-1] - 0.5).abs().max() < 0.15  # sampled without a filter they would alias to 0 and 1


def test_half_precision_stays():
    image = torch.rand(3, 8, 8)
    small = reduce_image(image.bfloat16(), Fraction(2))
    assert small.dtype == torch.bfloat16
    torch.testing.assert_close(small.float(), reduce_image(image, Fraction(2)), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("scale", SCALES)
def test_the_padding_neither_bleeds_into_an_image_nor_is_lost(scale):
    resolution = Resolution(scale, 32, 32, pad_value=-7.0)
    found = [resolution.student_inputs(batch_of(SIZES, pad_value), SIZES) for pad_value in (0.0, 1e6)]
    assert torch.equal(*found)
    for image, size in zip(found[0], SIZES, strict=True):
        height, width = resolution.reduced(size)
        assert torch.equal(image[:, :height, :width], reduce_image(coordinates(*size), scale))
        assert (image[:, height:] == -7).all() and (image[:, :, width:] == -7).all()


def test_labels_of_pixels_take_the_nearest():
    # Halves: the centres 1, 3, 5 lie on the border of two pixels, of which the second is taken. 5/2 ends beyond the image.
    assert nearest_positions(6, Fraction(2)).tolist() == [1, 3, 5]
    assert nearest_positions(6, Fraction(3)).tolist() == [1, 4]
    assert nearest_positions(6, Fraction(5, 2)).tolist() == [1, 3, 5]


# --- maps


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("stride", [8, 32])
def test_feature_maps_agree_on_where_a_position_lies(scale, stride):
    # The mean coordinate of each cell, on both models' inputs, in the teacher's pixels.
    resolution, sizes = Resolution(scale, 32, 32), [(400, 633), (631, 450)]
    delivered = batch_of(sizes, 0.0)
    student = resolution.student_inputs(delivered, sizes)
    padded = (student.shape[2], student.shape[3])
    teacher = resolution.teacher_inputs(delivered, padded, 0.0)
    assert teacher.shape[2:] == resolution.enlarged(padded)
    ours, theirs = (F.avg_pool2d(maps, stride) for maps in (student, teacher))
    ours = resize_to(ours, theirs.shape[-2:])
    compared = 0
    for image, (height, width) in enumerate(sizes):
        # Where neither the image's border nor the map's comes in: two of the student's cells away.
        far = 2 * stride * float(scale)
        y, x = ((torch.arange(n) + 0.5) * stride for n in theirs.shape[-2:])
        inner = ((y > far) & (y < height - far))[:, None] & ((x > far) & (x < width - far))
        torch.testing.assert_close(ours[image][:, inner], theirs[image][:, inner], rtol=0, atol=0.01)
        compared += int(inner.sum())
    assert compared > 0


@pytest.mark.parametrize("scale", SCALES)
def test_a_region_of_the_teachers_map_covers_the_same_object(scale):
    # Boxes in either model's pixels of its own padded input give the very same weights on the teacher's map.
    resolution = Resolution(scale, 32, 32)
    boxes = [
        torch.tensor([[13.0, 21.0, 140.0, 190.0], [201.0, 70.0, 289.0, 99.0]]),
        torch.zeros(0, 4),
        torch.zeros(0, 4),
    ]
    padded = resolution.padded([resolution.reduced(size) for size in SIZES])
    large = resolution.enlarged(padded)
    feature = torch.zeros(3, 1, large[0] // 8, large[1] // 8)
    small = foreground_weights([box / float(scale) for box in boxes], padded, feature)
    torch.testing.assert_close(small, foreground_weights(boxes, large, feature))
    # The first box from 13 to 140 and from 21 to 190 touches columns 1 to 17 and rows 2 to 23 of 8 pixels.
    assert (small[0, 2:24, 1:18] > 0).all() and (small[0, :, 0] == 0).all() and (small[0, :2] == 0).all()
    assert small[0, 24:, :18].sum() == 0


def test_padding_beyond_the_correspondence_is_cut():
    # A batch that the host pads to a fixed size larger than needed.
    resolution = Resolution(Fraction(2), 32, 32)
    delivered = batch_of([(60, 60)], 0.0, divisor=256)
    student = resolution.student_inputs(delivered, [(60, 60)])
    assert student.shape == (1, 2, 32, 32)
    assert torch.equal(resolution.teacher_inputs(delivered, (32, 32), 0.0), delivered[:, :, :64, :64])
