"""A dense head that this suite has never seen: refused by itself, compared once its author registers a reader of it."""

from __future__ import annotations

import pytest
import torch
from mmdet.models.dense_heads import GFLHead
from mmdet.registry import MODELS

from kdgraft.errors import WiringError
from kdgraft_det import HEADS, DenseHead
from support.det import BOXES, build, detector, distilled, losses, raw_batch, runner_config, save_teacher
from support.mm import history, run

TERMS = (
    dict(type="SoftTargets", anchors="main"),
    dict(type="BoundedRegression", margin=1e6),
)


@MODELS.register_module()
class ReversedGFLHead(GFLHead):
    """A GFLHead whose convolution predicts the bins of an edge from the farthest to the nearest, and turns them round itself."""

    def forward(self, x):
        scores, edges = super().forward(x)
        return [2 * level for level in scores], [self._reversed(level) for level in edges]

    @staticmethod
    def _reversed(level):
        return level.unflatten(1, (4, -1)).flip(2).flatten(1, 2)


class ReversedReader(DenseHead):
    """The edges of this head are distributions over bins, in strides; all else is read as the base reads it."""

    unit = "strides"
    distributions = True

    def edges(self, picked, centres, strides, trains=False):
        distances = picked.unflatten(1, (4, self.bins)).softmax(-1) @ torch.arange(float(self.bins))
        centres = centres / strides[:, None]
        return torch.cat([centres - distances[:, :2], centres + distances[:, 2:]], 1)


@pytest.fixture
def registered(monkeypatch):
    monkeypatch.setattr(HEADS, "_own", dict(HEADS._own))
    HEADS.register("ReversedGFLHead")(ReversedReader)


def entry(tmp_path):
    student, teacher = detector(), detector(width=6)
    for model in (student, teacher):
        model["bbox_head"]["type"] = "ReversedGFLHead"
    return distilled(student, teacher, save_teacher(tmp_path / "teacher.pth", teacher), terms=list(TERMS))


@pytest.mark.parametrize("term", TERMS, ids=lambda term: term["type"])
def test_a_head_with_a_forward_of_its_own_is_refused(term, tmp_path):
    model = {**entry(tmp_path), "terms": [term]}
    with pytest.raises(WiringError, match=r"head ReversedGFLHead is not one .*kdgraft_det\.HEADS"):
        build(model)


def test_two_steps_train_on_a_head_whose_reader_is_registered(registered, scenes, tmp_path):
    runner = run(runner_config(entry(tmp_path), scenes, tmp_path / "work", iters=2))
    untrained = build(runner.cfg.model).state_dict()
    for name in ("soft_targets", "bounded_regression"):
        found = history(runner, f"distill.{name}.loss")
        assert len(found) == 2
        assert all(0 < value < float("inf") for value in found)
    assert type(runner.model.bbox_head) is ReversedGFLHead
    moved = {key for key, value in runner.model.state_dict().items() if not torch.equal(value, untrained[key])}
    assert {"bbox_head.gfl_cls.weight", "bbox_head.gfl_reg.weight"} <= moved


def test_the_registered_reader_gives_the_boxes_that_the_host_decodes(registered, tmp_path):
    model = build(entry(tmp_path))
    heads = model.distiller.terms["bounded_regression"].predictions.heads
    assert type(heads.student) is type(heads.teacher) is ReversedReader
    seen, head = {}, model.bbox_head
    pairs, loss = heads.box_pairs, head.loss_by_feat_single
    heads.box_pairs = lambda *given: seen.setdefault("pairs", pairs(*given))

    def decode(anchors, scores, boxes, labels, weights, targets, stride, **rest):
        anchors, labels = anchors.reshape(-1, 4), labels.reshape(-1)
        positive = (labels >= 0) & (labels < head.num_classes)
        predicted = boxes.permute(0, 2, 3, 1).reshape(-1, 4 * (head.reg_max + 1))[positive]
        centres = head.anchor_center(anchors)[positive] / stride[0]
        seen.setdefault("host", []).append(head.bbox_coder.decode(centres, head.integral(predicted)).detach())
        return loss(anchors, scores, boxes, labels, weights, targets, stride, **rest)

    head.loss_by_feat_single = decode
    losses(model, raw_batch())
    (read,) = seen["pairs"]
    assert len(read.student) >= len(BOXES)
    torch.testing.assert_close(read.student.detach(), torch.cat(seen["host"]), rtol=1e-4, atol=1e-4)
