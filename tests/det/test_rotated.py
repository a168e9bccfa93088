"""Detectors of rotated boxes: regions take the upright boxes around objects; terms on predictions are refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from mmdet.models.task_modules.coders.base_bbox_coder import BaseBBoxCoder
from mmdet.models.task_modules.prior_generators import AnchorGenerator
from mmdet.registry import TASK_UTILS
from mmdet.structures.bbox import HorizontalBoxes, bbox_overlaps, register_box_converter
from mmdet.structures.bbox.base_boxes import BaseBoxes
from mmdet.structures.bbox.box_type import register_box
from torch import Tensor

from kdgraft.errors import DistillError, WiringError
from kdgraft.regions import foreground_weights
from kdgraft_det.regions import enclosing_boxes
from support.det import build, detector, distilled, losses, raw_batch, save_teacher
from support.det_zoo import zoo

UPRIGHT = [
    [[9.3, 11.3, 45.3, 51.3]],
    [[21.3, 5.3, 91.3, 89.3], [51.3, 51.3, 81.3, 77.3]],
    [],
    [[13.3, 21.3, 61.3, 65.3]],
]
"""The boxes that :func:`turned` are enclosed by."""


def turned(boxes: list[list[float]]) -> Tensor:
    """Squares on a corner (centre, sides and π/4), each enclosed by one of the upright boxes as far as that is a square."""
    rows = [
        [(x1 + x2) / 2, (y1 + y2) / 2, (x2 - x1) / math.sqrt(2), (x2 - x1) / math.sqrt(2), math.pi / 4]
        for x1, y1, x2, y2 in boxes
    ]
    return torch.tensor(rows).reshape(-1, 5)


def around(rotated: Tensor) -> Tensor:
    """By trigonometry, corner by corner."""
    found = []
    for x, y, w, h, angle in rotated.tolist():
        corners = [
            (
                x + a * w / 2 * math.cos(angle) - b * h / 2 * math.sin(angle),
                y + a * w / 2 * math.sin(angle) + b * h / 2 * math.cos(angle),
            )
            for a in (-1, 1)
            for b in (-1, 1)
        ]
        across, down = zip(*corners, strict=True)
        found.append([min(across), min(down), max(across), max(down)])
    return torch.tensor(found).reshape(-1, 4)


@register_box("turned")
class Turned(BaseBoxes):
    """Boxes with an angle, as a rotated detector's package brings them."""

    box_dim = 5


for name in getattr(Turned, "__abstractmethods__", ()):
    setattr(Turned, name, lambda self, *_, **__: None)
Turned.__abstractmethods__ = frozenset()
register_box_converter("turned", "hbox", lambda boxes: around(boxes.reshape(-1, 5)))


@TASK_UTILS.register_module()
class TurnedAnchors(AnchorGenerator):
    """Upright anchors with an angle of 0."""

    def single_level_grid_priors(self, *args: Any, **kwargs: Any) -> Tensor:
        found = super().single_level_grid_priors(*args, **kwargs)
        sides = found[:, 2:] - found[:, :2]
        return torch.cat([found[:, :2] + sides / 2, sides, torch.zeros_like(sides[:, :1])], 1)


@TASK_UTILS.register_module()
class TurnedDeltas(BaseBBoxCoder):
    """Differences of the five numbers."""

    encode_size = 5

    def encode(self, bboxes: Any, gt_bboxes: Any) -> Tensor:
        return (getattr(gt_bboxes, "tensor", gt_bboxes) - getattr(bboxes, "tensor", bboxes)) / 10

    def decode(self, bboxes: Any, bboxes_pred: Tensor, **_: Any) -> Tensor:
        return bboxes + bboxes_pred * 10


@TASK_UTILS.register_module()
class Overlaps:
    """The overlap of the upright boxes around two sets."""

    def __call__(self, left: Any, right: Any, mode: str = "iou", is_aligned: bool = False) -> Tensor:
        pair = [around(getattr(boxes, "tensor", boxes)) for boxes in (left, right)]
        return bbox_overlaps(*pair, mode, is_aligned)


def rotated(**settings: Any) -> dict[str, Any]:
    """A small ``RetinaNet`` of rotated boxes."""
    model = zoo("RetinaNet", **settings)
    model["data_preprocessor"] = dict(model["data_preprocessor"], boxtype2tensor=False)
    model["bbox_head"] |= dict(
        anchor_generator=model["bbox_head"]["anchor_generator"] | dict(type="TurnedAnchors"),
        bbox_coder=dict(type="TurnedDeltas"),
    )
    model["train_cfg"]["assigner"] |= dict(iou_calculator=dict(type="Overlaps"))
    return model


def rotated_batch(kind: str) -> dict[str, Any]:
    """The raw batch with rotated boxes: as tensors, or as boxes of a type of their own."""
    batch = raw_batch(UPRIGHT)
    for sample, boxes in zip(batch["data_samples"], UPRIGHT, strict=True):
        found = turned(boxes)
        sample.gt_instances.bboxes = found if kind == "tensor" else Turned(found)
    return batch


@pytest.mark.parametrize("kind", ["tensor", "type of its own"])
def test_regions_are_those_of_the_upright_boxes_around_objects(tmp_path, kind):
    checkpoint = save_teacher(tmp_path / "teacher.pth", rotated())
    terms = [
        dict(type="FeatureImitation", tap="neck[0]", region="foreground", adapter="none"),
        dict(type="FocalGlobal", tap="neck[0]"),
        dict(type="FeatureImitation", tap="neck[0]", region="fine_grained", name="near"),
    ]
    model = build(distilled(rotated(), rotated(), checkpoint, terms=terms))
    batch = rotated_batch(kind)
    found = losses(model, batch)
    data = model.data_preprocessor(batch, True)
    inputs = data["inputs"]
    size = (inputs.shape[-2], inputs.shape[-1])
    boxes = [around(turned(rows)) for rows in UPRIGHT]
    with torch.no_grad():
        ours, theirs = (
            each.train(each is model).extract_feat(inputs)[0] for each in (model, model.distiller.teacher.model)
        )
        weights = foreground_weights(boxes, size, theirs)
        expected = ((ours - theirs).square().mean(1) * weights).sum() / weights.sum()
        assert found["distill.feature_imitation.loss"].item() == pytest.approx(expected.item(), rel=1e-3)
    assert found["distill.focal_global.loss"] > 0 and found["distill.near.loss"] > 0
    assert all(value.isfinite() for value in found.values())


@pytest.mark.parametrize("term", ["SoftTargets", "BoundedRegression", "CrossHead"])
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_terms_on_predictions_are_refused_when_the_model_is_built(tmp_path, term, side):
    upright = zoo("RetinaNet")
    student, teacher = (rotated(), upright) if side == "student" else (upright, rotated())
    checkpoint = save_teacher(tmp_path / "teacher.pth", teacher)
    with pytest.raises(WiringError, match=rf"the {side}'s RetinaHead predicts boxes of 5 numbers \(rotated") as caught:
        build(distilled(student, teacher, checkpoint, terms=[dict(type=term)]))
    assert "\n" not in str(caught.value)


def test_enclosing_boxes():
    upright = torch.tensor([[1.0, 2.0, 5.0, 4.0]])
    assert enclosing_boxes(upright) is upright
    assert torch.equal(enclosing_boxes(HorizontalBoxes(upright)), upright)
    # Around (3, 3): 4 wide and 2 high, then the same on its side, then on its corner: (4 + 2) / √2 both ways.
    half = 3 / math.sqrt(2)
    expected = [[1, 2, 5, 4], [2, 1, 4, 5], [3 - half, 3 - half, 3 + half, 3 + half]]
    rows = torch.tensor([[3.0, 3, 4, 2, angle] for angle in (0, math.pi / 2, -math.pi / 4)])
    torch.testing.assert_close(enclosing_boxes(rows), torch.tensor(expected, dtype=torch.float32))
    corners = torch.tensor([[3.0, 0, 6, 3, 3, 6, 0, 3]])
    assert enclosing_boxes(corners).tolist() == [[0, 0, 6, 6]]
    for empty in (torch.zeros(0, 5), torch.zeros(0, 8), torch.zeros(0, 4)):
        assert enclosing_boxes(empty).shape == (0, 4)
    with pytest.raises(DistillError, match="ground truth boxes of 6 numbers"):
        enclosing_boxes(torch.zeros(1, 6))


def test_the_angle_is_the_same_at_every_size(tmp_path):
    checkpoint = save_teacher(tmp_path / "teacher.pth", detector())
    model = build(
        distilled(detector(), detector(), checkpoint, terms=[dict(type="FeatureImitation", tap="neck[0]")])
        | dict(teacher=dict(config=detector(), checkpoint=checkpoint, scale=2))
    )
    data = model.data_preprocessor(rotated_batch("tensor"), True)
    _, small = model._reduced(data["inputs"], data["data_samples"], model.distill_context.resolution)
    expected = turned(UPRIGHT[1]) / torch.tensor([2.0, 2, 2, 2, 1])
    torch.testing.assert_close(small[1].gt_instances.bboxes, expected)
