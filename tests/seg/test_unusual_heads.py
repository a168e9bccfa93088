"""Heads that are not made like the others: without a classifier of pixels, or trained on ground truth that inference has not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from kdgraft.errors import WiringError
from support.seg import CLASSES, batch, build, distilled, losses_of, save_teacher, segmentor

EMBEDDINGS = "decode_head.cls_seg():input"


def segmenter(width: int = 16) -> dict[str, Any]:
    """A small Segmenter, whose head compares patches with learned classes."""
    backbone = dict(
        type="VisionTransformer",
        img_size=(64, 64),
        patch_size=16,
        embed_dims=width,
        num_layers=2,
        num_heads=2,
        out_indices=(0, 1),
        final_norm=True,
    )
    head = dict(
        type="SegmenterMaskTransformerHead",
        in_channels=width,
        channels=width,
        num_classes=11,
        num_layers=1,
        num_heads=2,
        embed_dims=width,
        in_index=1,
        dropout_ratio=0.0,
        loss_decode=dict(type="CrossEntropyLoss", loss_weight=1.0),
    )
    plain = segmentor()
    return dict(
        type="EncoderDecoder",
        data_preprocessor=plain["data_preprocessor"],
        backbone=backbone,
        decode_head=head,
        train_cfg=dict(),
        test_cfg=dict(mode="whole"),
    )


def point_rend(width: int = 4) -> dict[str, Any]:
    """A small PointRend: its last head scores points, which it draws from the coarse head's map and the ground truth."""
    plain = segmentor(width=width)
    point = dict(
        type="PointHead",
        in_channels=[width],
        in_index=[0],
        channels=8,
        num_fcs=1,
        coarse_pred_each_layer=True,
        dropout_ratio=-1,
        num_classes=11,
        align_corners=False,
        loss_decode=dict(type="CrossEntropyLoss", loss_weight=1.0),
    )
    plain.pop("auxiliary_head")
    return plain | dict(
        type="CascadeEncoderDecoder",
        num_stages=2,
        decode_head=[plain["decode_head"], point],
        train_cfg=dict(num_points=16, oversample_ratio=3, importance_sample_ratio=0.75),
        test_cfg=dict(mode="whole", subdivision_steps=1, subdivision_num_points=16, scale_factor=2),
    )


@pytest.mark.parametrize("recipe", ["skd", "ifvd", "cirkd"])
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_a_recipe_that_taps_a_classifier_says_what_to_tap_where_there_is_none(tmp_path, recipe, side):
    plain = segmentor(width=4)
    student, other = (segmenter(), plain) if side == "student" else (plain, segmenter())
    teacher = save_teacher(tmp_path / "teacher.pth", other)
    name = dict(skd="pairwise_affinity", ifvd="class_prototypes", cirkd="cross_image_relations")
    with pytest.raises(WiringError) as caught:
        build(distilled(student, teacher, recipe=recipe))
    message = str(caught.value)
    assert message.startswith(f"{name[recipe]}: the {side}'s SegmenterMaskTransformerHead does not call cls_seg()")
    works = f"{side}_tap='decode_head:input[1]'"
    assert works in message and "\n" not in message
    # And what it says does work.
    term = dict(type="PairwiseAffinity", **{f"{side}_tap": "decode_head:input[1]"})
    model = build(distilled(student, teacher, terms=[term]))
    assert losses_of(model, *batch())["distill.pairwise_affinity.loss"] > 0


def test_scores_of_a_segmenter_are_compared(tmp_path):
    teacher = save_teacher(tmp_path / "teacher.pth", segmenter())
    model = build(distilled(segmenter(), teacher, terms=[dict(type="SoftTargets", temperature=1.0)]))
    inputs, samples = batch(ignored=0.0)
    found = losses_of(model, inputs, samples)["distill.soft_targets.loss"]
    plain = build(segmenter())
    plain.load_state_dict(model.state_dict())
    with torch.no_grad():
        ours, theirs = (each(inputs) for each in (plain.eval(), model.distiller.teacher.model))
    expected = F.kl_div(ours.log_softmax(1), theirs.log_softmax(1), log_target=True, reduction="none").sum(1).mean()
    assert found.item() == pytest.approx(expected.item(), rel=1e-3)


def test_another_tap_that_never_fires_names_its_term(tmp_path):
    teacher = save_teacher(tmp_path / "teacher.pth")
    term = dict(type="FeatureImitation", tap="decode_head.loss_decode", name="mine")
    with pytest.raises(WiringError, match=r"^mine: tap 'decode_head\.loss_decode' of the student never fired"):
        build(distilled(segmentor(), teacher, terms=[term]))


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_a_head_that_needs_ground_truth_is_told_of(tmp_path, side):
    plain = segmentor(width=4)
    student, other = (point_rend(), plain) if side == "student" else (plain, point_rend())
    teacher = save_teacher(tmp_path / "teacher.pth", other)
    tap = dict(student_tap="decode_head.0.conv_seg:input", teacher_tap="decode_head.conv_seg:input")
    if side == "teacher":
        tap = dict(student_tap=tap["teacher_tap"], teacher_tap=tap["student_tap"])
    with pytest.raises(WiringError) as caught:
        build(distilled(student, teacher, terms=[dict(type="FeatureImitation", **tap)]))
    message = str(caught.value)
    assert message.startswith(f"the {side}, a CascadeEncoderDecoder, cannot run without ground truth (")
    assert message.endswith("tap its backbone or neck") and "\n" not in message
    model = build(distilled(student, teacher, terms=[dict(type="FeatureImitation", tap="backbone[2]")]))
    assert losses_of(model, *batch())["distill.feature_imitation.loss"] > 0


@pytest.mark.parametrize(
    ("tap", "by_class"),
    [
        ("decode_head.cls_seg()", True),
        ("decode_head.conv_seg", True),
        ("decode_head[*]", True),
        (EMBEDDINGS, False),
        ("decode_head.convs.0", False),
        ("backbone[3]", False),
    ],
)
def test_class_scores_are_known_by_their_channels(tmp_path, tap, by_class):
    student = segmentor()
    if tap == "decode_head[*]":
        head = {key: student["decode_head"][key] for key in ("num_classes", "norm_cfg", "align_corners", "channels")}
        student["decode_head"] = dict(head, type="DAHead", in_channels=32, in_index=3, pam_channels=4)
    teacher = save_teacher(tmp_path / "teacher.pth", student, classes=CLASSES[::-1])
    model = build(distilled(student, teacher, terms=[dict(type="FeatureImitation", tap=tap, name="paired")]))
    if not by_class:
        model.start_distilling(CLASSES)
        return
    with pytest.raises(WiringError, match=r"paired: tapped at class outputs.*SoftTargets"):
        model.start_distilling(CLASSES)
