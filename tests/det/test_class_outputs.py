"""Terms on features that are tapped at class outputs: these are known by what the tensor is, not by what its layer is called."""

from __future__ import annotations

import pytest
import torch

from kdgraft.errors import WiringError
from support.det import CLASSES, build, detector, distilled, losses, raw_batch, save_plain
from support.det_families import cornernet, panoptic, solov2, ssd, yolof, yolov3
from support.det_stages import staged, with_masks
from support.det_zoo import zoo

AT_CLASSES = {
    "semantic head's layer": (panoptic, "semantic_head.conv_logits"),
    "semantic head's field": (panoptic, "semantic_head[seg_preds]"),
    "SOLOv2's second output": (solov2, "mask_head[1][*]"),
    "SOLOv2's layer": (solov2, "mask_head.conv_cls"),
    "YOLOF's layer": (yolof, "bbox_head.cls_score"),
    "YOLOF's output": (yolof, "bbox_head[0][*]"),
    "SSD's layer of one level": (ssd, "bbox_head.cls_convs[0]"),
    "SSD's layer of a level with more anchors": (ssd, "bbox_head.cls_convs[1]"),
    "YOLOv3's layer": (yolov3, "bbox_head.convs_pred[*]"),
    "CornerNet's second heat map": (cornernet, "bbox_head[1][*]"),
    "boxes of each class": (lambda **s: staged("Faster R-CNN", **s), "roi_head.bbox_head.fc_reg"),
}
NOT_AT_CLASSES = {
    "semantic head's features": (panoptic, "semantic_head[seg_feats]"),
    "SOLOv2's kernels": (solov2, "mask_head[0][*]"),
    "SOLOv2's tower": (solov2, "mask_head.cls_convs[0]"),
    "YOLOF's tower": (yolof, "bbox_head.cls_subnet"),
    "YOLOF's boxes": (yolof, "bbox_head.bbox_pred"),
    "SSD's boxes": (ssd, "bbox_head.reg_convs[1]"),
    "YOLOv3's features": (yolov3, "bbox_head.convs_bridge[*]"),
    "CornerNet's offsets": (cornernet, "bbox_head[4][*]"),
    "a proposal network": (lambda **s: staged("Faster R-CNN", **s), "rpn_head.rpn_cls"),
    # As many channels as four classes have scores, and yet boxes: the second output of such a head always is.
    "boxes of four classes": (lambda **s: zoo("ATSS", classes=4, **s), "bbox_head[1][*]"),
}
BUILT_ALONE = (panoptic, yolov3, cornernet)
"""Their own losses want other batches or other strides than these."""


def made(tmp_path, family, tap, names):
    """A distilled model of one term tapped there, whose teacher has these names of classes."""
    teacher = family(channels=12)
    checkpoint = save_plain(tmp_path / "teacher.pth", build(teacher), names)
    term = dict(type="FeatureImitation", tap=tap, name="paired")
    return build(distilled(family(), teacher, checkpoint, terms=[term]))


@pytest.mark.parametrize(("family", "tap"), list(AT_CLASSES.values()), ids=list(AT_CLASSES))
def test_class_outputs_of_any_name_are_not_paired_in_another_order(tmp_path, family, tap):
    for names, message in ((CLASSES[::-1], "paired: tapped at class outputs.*use SoftTargets"), ("abc", "lacks")):
        model = made(tmp_path, family, tap, names)
        with pytest.raises(WiringError, match=message) as caught:
            model.start_distilling(CLASSES)
        assert "\n" not in str(caught.value)
    made(tmp_path, family, tap, CLASSES).start_distilling(CLASSES)


@pytest.mark.parametrize(("family", "tap"), list(NOT_AT_CLASSES.values()), ids=list(NOT_AT_CLASSES))
def test_what_knows_no_classes_is_imitated_whatever_their_order(tmp_path, family, tap):
    batch, found = with_masks(raw_batch()), []
    for sample in batch["data_samples"]:
        sample.gt_instances.labels %= 4  # one of these knows four classes
    for names in (CLASSES, CLASSES[::-1], "abc"):
        model = made(tmp_path, family, tap, names)
        model.start_distilling(CLASSES)
        assert model.distill_context.ready and model.distiller.teacher.class_order is None
        if family not in BUILT_ALONE:
            torch.manual_seed(0)
            found.append(losses(model, batch)["distill.paired.loss"].item())
    assert family in BUILT_ALONE or (found[0] > 0 and found[1:] == found[:1] * 2)


def test_outputs_in_the_same_order_are_still_compared(tmp_path):
    model = made(tmp_path, solov2, "mask_head[1][*]", CLASSES)
    model.start_distilling(CLASSES)
    assert losses(model, with_masks(raw_batch()))["distill.paired.loss"] > 0


@pytest.mark.parametrize(("modules", "of_classes"), [("bbox_head.gfl_cls", True), ("neck", False)])
def test_weights_of_class_outputs_are_not_matched_in_another_order(tmp_path, modules, of_classes):
    teacher = detector(channels=12)
    checkpoint = save_plain(tmp_path / "teacher.pth", build(teacher), CLASSES[::-1])
    term = dict(type="WeightMatching", modules=modules, name="paired")
    model = build(distilled(detector(), teacher, checkpoint, terms=[term]))
    if of_classes:
        with pytest.raises(WiringError, match="paired: tapped at class outputs"):
            model.start_distilling(CLASSES)
    else:
        model.start_distilling(CLASSES)
        assert losses(model, raw_batch())["distill.paired.loss"] > 0
