"""Heads that this suite has never seen: refused by themselves, compared once their author registers a reader of them."""

from __future__ import annotations

import pytest
import torch
from mmdet.models.dense_heads import DeformableDETRHead, GFLHead
from mmdet.models.roi_heads import Shared2FCBBoxHead, StandardRoIHead
from mmdet.registry import MODELS

from kdgraft.errors import WiringError
from kdgraft_det import HEADS, BoxHead, DenseHead, QueryHead, RoIHead
from support.det import BOXES, build, detector, distilled, losses, raw_batch, runner_config, save_teacher
from support.det_stages import detr, staged
from support.mm import history, run
from support.tensors import gradients

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
    with pytest.raises(WiringError, match=r"ReversedGFLHead is not one .*kdgraft_det\.HEADS"):
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


# --- RoI heads, and heads on queries


@MODELS.register_module()
class SharpRoIHead(StandardRoIHead):
    """An RoI head that doubles its box head's logits and halves its deltas, before its losses as before its predictions."""

    def _bbox_forward(self, x, rois):
        found = super()._bbox_forward(x, rois)
        return found | dict(cls_score=2 * found["cls_score"], bbox_pred=found["bbox_pred"] / 2)


class SharpReader(RoIHead):
    """A reader of what the RoI head makes of its box head's outputs, which are what is tapped."""

    def logits(self, recording, stage):
        return 2 * super().logits(recording, stage)

    def regression(self, recording, stage, rows, labels):
        return super().regression(recording, stage, rows, labels) / 2


@MODELS.register_module()
class CertainBBoxHead(Shared2FCBBoxHead):
    """A box head with targets of its own."""

    def get_targets(self, *args, **settings):
        return super().get_targets(*args, **settings)


@MODELS.register_module()
class BoxesFirstHead(DeformableDETRHead):
    """A head on queries that returns boxes before classes."""

    def forward(self, hidden_states, references):
        classes, boxes = super().forward(hidden_states, references)
        return boxes, classes

    def loss_by_feat(self, boxes, classes, *rest, **settings):
        return super().loss_by_feat(classes, boxes, *rest, **settings)

    def predict_by_feat(self, boxes, classes, *rest, **settings):
        return super().predict_by_feat(classes, boxes, *rest, **settings)


class BoxesFirstReader(QueryHead):
    """A reader whose two taps change places."""

    def __init__(self, head, path, owner):
        super().__init__(head, path, owner)
        self.classes, self.boxes = self.boxes, self.classes


def of_kind(kind, **settings):
    """A small detector with a head of this kind."""
    if kind == "BoxesFirstHead":
        model = detr(**settings)
        model["bbox_head"]["type"] = kind
        return model
    model = staged("Faster R-CNN", **settings)
    head = model["roi_head"] if kind == "SharpRoIHead" else model["roi_head"]["bbox_head"]
    head["type"] = kind
    return model


READERS = {"SharpRoIHead": SharpReader, "CertainBBoxHead": BoxHead, "BoxesFirstHead": BoxesFirstReader}


def distilled_kind(kind, tmp_path):
    teacher = of_kind(kind, width=6)
    checkpoint = save_teacher(tmp_path / "teacher.pth", teacher)
    terms = [dict(type="SoftTargets"), dict(type="BoundedRegression", margin=1e6)]
    return distilled(of_kind(kind, frozen_bn=True), teacher, checkpoint, terms=terms)


@pytest.mark.parametrize("kind", READERS)
def test_a_head_of_any_kind_needs_a_reader(kind, tmp_path, monkeypatch):
    entry = distilled_kind(kind, tmp_path)
    with pytest.raises(WiringError, match=f"the student's {kind} is not one .*kdgraft_det.HEADS"):
        build(entry)
    monkeypatch.setattr(HEADS, "_own", dict(HEADS._own))
    HEADS.register(kind)(READERS[kind])
    model = build(entry)
    model.zero_grad()
    found = losses(model, raw_batch())
    values = [found[f"distill.{name}.loss"] for name in ("soft_targets", "bounded_regression")]
    assert all(0 < value < float("inf") for value in values)
    sum(values).backward()
    assert gradients(model)["backbone.conv1.weight"].abs().sum() > 0


def test_the_reader_of_an_roi_head_gives_what_its_host_makes_of_the_outputs(tmp_path, monkeypatch):
    monkeypatch.setattr(HEADS, "_own", dict(HEADS._own))
    HEADS.register("SharpRoIHead")(SharpReader)
    made, seen = [], {}
    forward = SharpRoIHead._bbox_forward

    def kept(self, x, rois):
        made.append(forward(self, x, rois))
        return made[-1]

    monkeypatch.setattr(SharpRoIHead, "_bbox_forward", kept)
    model = build(distilled_kind("SharpRoIHead", tmp_path))
    heads = model.distiller.terms["soft_targets"].reader
    assert heads is not None
    scores = model.distiller.terms["soft_targets"].scores
    pairs = scores.heads.class_pairs
    scores.heads.class_pairs = lambda *given: seen.setdefault("pairs", pairs(*given))
    made.clear()
    losses(model, raw_batch())
    (read,) = seen["pairs"]
    student = made[0]["cls_score"]
    torch.testing.assert_close(read.student, student)
    assert read.teacher.shape == student.shape and not torch.equal(read.teacher, student)


def test_a_head_on_queries_is_read_as_the_one_that_it_rearranges(tmp_path, monkeypatch):
    monkeypatch.setattr(HEADS, "_own", dict(HEADS._own))
    HEADS.register("BoxesFirstHead")(BoxesFirstReader)
    rearranged = distilled_kind("BoxesFirstHead", tmp_path)
    plain = distilled(
        detr(frozen_bn=True), detr(width=6), rearranged["teacher"]["checkpoint"], terms=rearranged["terms"]
    )
    ours, theirs = (losses(build(entry), raw_batch()) for entry in (rearranged, plain))
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert ours[name].item() == pytest.approx(value.item(), rel=1e-6), name
