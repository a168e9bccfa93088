"""Focal and global distillation: the authors' figures, small cases by hand, padding, and maps with nothing in them."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

import golden
import golden.dense
from kdgraft.losses import focal_attention, focal_features
from kdgraft.losses.focal_global import GlobalRelation, box_scales, channel_attention, spatial_attention


def maps(dtype: torch.dtype = torch.float64, width: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(11)
    return tuple(torch.randn(2, 3, 4, width, generator=generator, dtype=dtype) for _ in range(2))  # type: ignore[return-value]


def relation(channels: int = 3) -> GlobalRelation:
    """Away from its start, where the blocks add nothing."""
    module = GlobalRelation(channels)
    golden.dense.fill(module)
    return module


def every_part(valid: Tensor | None = None) -> dict[str, Callable[..., Tensor]]:
    scale = golden.wave((2, 4, 5), 0.4, 0.2, 0.3).abs()
    module = relation()
    return {
        "features": lambda s, t, **k: focal_features(s, t, scale, valid=valid, **k),
        "attention": lambda s, t, **k: focal_attention(s, t, valid=valid, **k),
        "relation": lambda s, t, **k: module(s, t, valid=valid, **k),
    }


every = pytest.mark.parametrize("part", ["features", "attention", "relation"])


# --- the authors' figures


def figures(value: Tensor, student: Tensor) -> list[float]:
    (slope,) = torch.autograd.grad(value, student)
    return [value.item(), slope[0, 0, 0, 0].item(), slope.square().sum().item()]


def authors_parts(boxes: str, student: Tensor, teacher: Tensor) -> dict[str, Tensor]:
    found = [torch.tensor(rows).reshape(-1, 4) for rows in golden.dense.FOCAL_BOXES[boxes]]
    foreground, background = box_scales(found, (40, 32), teacher)
    return {
        "foreground": focal_features(student, teacher, foreground.double()),
        "background": focal_features(student, teacher, background.double()),
        "attention": focal_attention(student, teacher),
        "relation": relation(6)(student, teacher),
    }


@pytest.mark.parametrize(("part", "boxes"), list(golden.dense.FOCAL_GLOBAL))
def test_the_authors_figures(part: str, boxes: str):
    student, teacher = golden.features()
    value = authors_parts(boxes, student.requires_grad_(), teacher)[part]
    # Scales are float32: 1/20 and the like are good to 7 digits.
    np.testing.assert_allclose(figures(value, student), golden.dense.FOCAL_GLOBAL[part, boxes], rtol=1e-6, atol=1e-9)


def test_the_authors_figures_at_their_weights():
    student, teacher = golden.features()
    parts = authors_parts("some", student.requires_grad_(), teacher)
    weights = dict(foreground=1e-3, background=5e-4, attention=5e-4, relation=5e-6)
    value = torch.stack([weights[name] * part for name, part in parts.items()]).sum()
    np.testing.assert_allclose(figures(value, student), golden.dense.FOCAL_GLOBAL_ONE_STAGE, rtol=1e-6)


# --- by hand


def test_attentions_by_hand():
    # Mean |F| over channels: 0, ½ ln 3 → at T = ½ the softmax of (0, ln 3) is (¼, ¾), times two positions.
    features = torch.tensor([[[[0.0, math.log(3)]], [[0.0, 0.0]]]])
    torch.testing.assert_close(spatial_attention(features, 0.5), torch.tensor([[[0.5, 1.5]]]))
    # Mean |F| over positions: ½ ln 3, 0 → (¾, ¼), times two channels. Signs do not matter.
    torch.testing.assert_close(channel_attention(-features, 0.5), torch.tensor([[1.5, 0.5]]))
    # Alone, the first position has all the attention and the channels are alike.
    valid = torch.tensor([[[1.0, 0.0]]])
    torch.testing.assert_close(spatial_attention(features, 0.5, valid=valid), torch.tensor([[[1.0, 0.0]]]))
    torch.testing.assert_close(channel_attention(features, 0.5, valid=valid), torch.tensor([[1.0, 1.0]]))


def test_scales_by_hand():
    # Cells of 8 pixels. The large box holds cells 0 … 2 both ways (9 cells), the small one (9 … 15) 1 … 2 both ways (4 cells).
    boxes = [torch.tensor([[0.0, 0.0, 15.0, 15.0], [9.0, 9.0, 15.0, 15.0]]), torch.zeros(0, 4)]
    foreground, background = box_scales(boxes, (32, 32), torch.zeros(2, 1, 4, 4))
    ninth, quarter = 1 / 9, 1 / 4
    expected = [[ninth] * 3 + [0], *[[ninth, quarter, quarter, 0]] * 2, [0] * 4]
    torch.testing.assert_close(foreground[0], torch.tensor(expected))
    torch.testing.assert_close(background[0], (torch.tensor(expected) == 0) / 7)
    assert not foreground[1].any()
    torch.testing.assert_close(background[1], torch.full((4, 4), 1 / 16))


def test_padding_is_neither_foreground_nor_background():
    valid = torch.ones(1, 4, 4)
    valid[:, :, 2:] = 0
    foreground, background = box_scales(
        [torch.tensor([[9.0, 1.0, 20.0, 7.0]])], (32, 32), torch.zeros(1, 1, 4, 4), valid=valid
    )
    # Cells 1 … 3 of rows 0 and 1, a sixth each; two of the cells are in the image, six others with them.
    torch.testing.assert_close(foreground[0, :, :2], torch.tensor([[0, 1 / 6], [0, 1 / 6], [0, 0], [0, 0]]))
    torch.testing.assert_close(background[0, :, :2], (foreground[0, :, :2] == 0) / 6)
    assert not foreground[0, :, 2:].any() and not background[0, :, 2:].any()


@pytest.mark.parametrize("box", [(500, 500, 600, 600), (-90, -90, -50, -50), (10, 10, 10, 10), (20, 20, 4, 4)])
def test_odd_boxes_stay_finite(box: tuple[float, ...]):
    foreground, background = box_scales([torch.tensor([box], dtype=torch.float32)], (32, 32), torch.zeros(1, 1, 4, 4))
    assert foreground.isfinite().all() and (foreground >= 0).all()
    torch.testing.assert_close(background.sum(), torch.ones(()))


def test_focal_features_by_hand():
    # Constant maps have attention 1 everywhere: 2 channels · 2² at a position of scale 0.5, 2 · 2² at one of 0.25.
    student, teacher = torch.ones(1, 2, 1, 2), torch.full((1, 2, 1, 2), 3.0)
    assert focal_features(student, teacher, torch.tensor([[[0.5, 0.25]]])).item() == pytest.approx(8 * 0.75)


def test_focal_attention_by_hand():
    # The teacher's attention (½, 3/2) over positions, (3/2, ½) over channels (see above); a student of zeros has 1 everywhere.
    teacher = torch.tensor([[[[0.0, math.log(3)]], [[0.0, 0.0]]]])
    assert focal_attention(torch.zeros_like(teacher), teacher).item() == pytest.approx(2)


def test_the_relation_starts_as_the_squared_error():
    student, teacher = maps(torch.float32)
    value = GlobalRelation(3)(student, teacher)
    torch.testing.assert_close(value, (student - teacher).square().sum() / 2)


# --- properties


@every
@pytest.mark.parametrize("junk", [1e6, torch.inf, torch.nan])
def test_what_is_padded_takes_no_part(part: str, junk: float):
    student, teacher = maps(width=5)
    valid = torch.ones(2, 4, 5)
    valid[1, :, 3:] = 0
    scale = golden.wave((2, 4, 5), 0.4, 0.2, 0.3).abs()
    loss = every_part(valid)[part]
    module = relation()
    alone = {
        "features": lambda s, t: focal_features(s, t, scale[1:, :, :3]),
        "attention": focal_attention,
        "relation": module,
    }[part](student[1:, :, :, :3], teacher[1:, :, :, :3])
    for x in (student, teacher):
        x[1, :, :, 3:] = junk
    items = loss(student.requires_grad_(), teacher, reduction="none")
    torch.testing.assert_close(items[1], alone)
    items.sum().backward()
    assert student.grad is not None and student.grad.isfinite().all()
    assert not student.grad[1, :, :, 3:].any() and student.grad[1, :, :, :3].any()
