"""Teacher-bounded boxes on dense heads: read from the raw outputs as mmdet itself decodes them."""

from __future__ import annotations

import copy

import pytest
import torch
from mmdet.models.dense_heads import RPNHead
from mmengine.config import ConfigDict
from mmengine.logging import MessageHub

from kdgraft_det.picking import in_order_of_pick
from support.det import BOXES, build, distilled, losses, raw_batch, save_teacher
from support.det_stages import staged
from support.det_zoo import KINDS, zoo

EVERYTHING = ConfigDict(nms_pre=10**6, score_thr=-1.0, min_bbox_size=-1, max_per_img=10**6, nms=None)


def entry(kind, **settings):
    if kind == "RPN":
        return staged("Faster R-CNN", **settings)
    head = {
        "FCOS in strides": dict(norm_on_bbox=True),
        "RetinaNet decoded": dict(reg_decoded_bbox=True, loss_bbox=dict(type="GIoULoss", loss_weight=2.0)),
    }
    return zoo(kind.split()[0], head=head.get(kind), **settings)


@torch.no_grad()
def decoded(model, head):
    """Per image all boxes that mmdet makes of a head's outputs, in pixels."""
    model.eval()
    data = model.data_preprocessor(copy.deepcopy(raw_batch()), False)
    outputs = head(model.extract_feat(data["inputs"]))
    metas = [sample.metainfo for sample in data["data_samples"]]
    if isinstance(head, RPNHead):  # its prediction keeps the best alone
        boxes = [torch.cat([p.permute(0, 2, 3, 1).reshape(4, -1, 4)[i] for p in outputs[1]]) for i in range(4)]
        priors = torch.cat(head.prior_generator.grid_priors([c.shape[-2:] for c in outputs[0]], device="cpu"))
        return [head.bbox_coder.decode(priors, b, max_shape=(96, 96)) for b in boxes]
    found = head.predict_by_feat(*outputs, batch_img_metas=metas, cfg=EVERYTHING, rescale=False, with_nms=False)
    return [f.bboxes for f in found]


def in_pixels(head, boxes, anchors, strides):
    if head.unit == "strides":
        return boxes * strides[:, None]
    return head.bbox_coder.decode(anchors, boxes)


def nearest(boxes, among):
    """The distance of each box to the nearest of others."""
    return (boxes[:, None] - among[None]).abs().amax(-1).amin(1)


@pytest.mark.parametrize("kind", [*KINDS, "FCOS in strides", "RetinaNet decoded", "RPN"])
def test_boxes_are_those_that_mmdet_decodes(kind, tmp_path):
    MessageHub.get_current_instance().update_info("epoch", 9)  # TOOD asks the Runner's hub which epoch it is
    teacher = entry(kind, width=6)
    settings = dict(head="rpn_head") if kind == "RPN" else {}
    terms = [
        dict(type="BoundedRegression", margin=margin, weight=1.0, name=name, **settings)
        for name, margin in (("bounded", 0.05), ("all", 1e6))
    ]
    model = build(
        distilled(entry(kind, frozen_bn=True), teacher, save_teacher(tmp_path / "teacher.pth", teacher), terms=terms)
    )
    heads = model.distiller.terms["bounded"].predictions.heads
    rows, kept = [], {}
    box_pairs = heads.box_pairs

    def spy(student, teacher, batch):
        rows[:] = box_pairs(student, teacher, batch)
        kept["assignment"] = heads.student.assignment(student, batch)
        return rows

    heads.box_pairs = spy
    found = losses(model, raw_batch())
    (row,), assignment = rows, kept["assignment"]
    chosen, counts = assignment.positive, assignment.num_per_level
    places, image = in_order_of_pick(chosen, counts), in_order_of_pick(chosen, counts, images=True)
    assert sorted(set(image.tolist())) == [0, 1, 2, 3]
    anchors, strides = assignment.anchors[places], assignment.strides[places]
    path = "rpn_head" if kind == "RPN" else "bbox_head"
    both = model, model.distiller.teacher.model
    said = [decoded(m, m.get_submodule(path)) for m in both]
    for side, boxes, head in zip(said, (row.student, row.teacher), (heads.student, heads.teacher), strict=True):
        pixels = in_pixels(head, boxes.detach(), anchors, strides)
        for number in range(4):
            # Some heads cut boxes at the image's edge when they predict.
            assert nearest(pixels[image == number].clamp(0, 96), side[number].clamp(0, 96)).max() < 1e-2
    truth = in_pixels(heads.student, row.target, anchors, strides)
    for number, boxes in enumerate(BOXES):
        assert nearest(truth[image == number], torch.tensor(boxes)).max() < 1e-3
        if kind != "RPN":  # the box of the very object that the assigner gave the place; object i has label i
            labels = assignment.labels[number, places[image == number]]
            torch.testing.assert_close(truth[image == number], torch.tensor(boxes)[labels], atol=1e-3, rtol=0)
    # Then the terms, from these boxes.
    errors, bounds = ((boxes - row.target).square().sum(1) for boxes in (row.student, row.teacher))
    assert found["distill.all.loss"].item() == pytest.approx(errors.mean().item(), rel=1e-4)
    assert found["distill.bounded.loss"].item() == pytest.approx(
        (errors * (errors + 0.05 > bounds)).mean().item(), rel=1e-4
    )
