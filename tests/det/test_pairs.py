"""Pairs of unlike detectors: depth, width, backbone family, head, normalisation and channel order."""

from __future__ import annotations

import copy

import pytest
import torch

from kdgraft import WiringError
from support.det import EVERY_TERM, build, detector, distilled, losses, raw_batch, runner_config, save_teacher
from support.det_stages import STAGED, detr, staged
from support.det_zoo import zoo
from support.mm import run
from support.tensors import distillation, gradients

FEATURES = [
    dict(type="FeatureImitation", tap="neck[*]", region="foreground"),
    dict(type="FeatureImitation", student_tap="backbone[*]", teacher_tap="backbone[*]", name="stages"),
    dict(type="PearsonImitation", tap="neck[*]"),
    dict(type="ChannelWise", tap="neck[*]"),
]
PREDICTIONS = [dict(type="SoftTargets"), dict(type="SoftTargets", name="soft_vlr", anchors="vlr")]
PAIRS = {
    "deeper and wider": (detector(), detector(depth=50, width=4, channels=16, convs=2), "ld"),
    "PVT learns from ResNet": (
        detector(backbone="PyramidVisionTransformer", width=8),
        detector(width=6),
        "ld",
    ),
    "ResNet learns from Swin": (detector(), detector(backbone="SwinTransformer", width=8, channels=12), "ld"),
    "GFL learns from ATSS": (detector(), detector("ATSS", width=6), None),
    "ATSS learns from GFL": (detector("ATSS"), detector(width=6), None),
}


@pytest.mark.parametrize("pair", list(PAIRS))
def test_the_pair_learns(tmp_path, pair):
    student, teacher, recipe = PAIRS[pair]
    checkpoint = save_teacher(tmp_path / "teacher.pth", teacher)
    model = build(distilled(student, teacher, checkpoint, recipe=recipe, terms=[*FEATURES, *PREDICTIONS]))
    found = losses(model, raw_batch())
    ours = {name: value for name, value in found.items() if name.startswith("distill.")}
    assert len(ours) == len(FEATURES) + len(PREDICTIONS) + (3 if recipe else 0)
    for name, value in ours.items():
        assert torch.isfinite(value) and value > 0, name
    sum(value for name, value in found.items() if "loss" in name).backward()
    for name, parameter in model.distiller.named_parameters():
        assert parameter.grad.abs().sum() > 0, name
    assert all(torch.isfinite(gradient).all() for gradient in gradients(model).values())


ACROSS = {
    "RetinaNet learns from FCOS": ("RetinaNet", "FCOS"),
    "one stage learns from two": ("GFL", "Faster R-CNN"),
    "two stages learn from one": ("Faster R-CNN", "GFL"),
    "RTMDet learns from one stage": ("RTMDet", "ATSS"),
    "YOLOX learns from GFL": ("YOLOX", "GFL"),
    "one stage learns from queries": ("ATSS", "Deformable DETR"),
}
ONE_POSITION = [dict(type="SoftTargets", name="classes"), dict(type="SoftTargets", name="classes_main", anchors="main")]


def any_model(kind, **settings):
    if kind in STAGED:
        return staged(kind, **settings)
    return detr(kind.replace(" ", ""), **settings) if kind == "Deformable DETR" else zoo(kind, **settings)


@pytest.mark.parametrize("pair", list(ACROSS))
def test_features_cross_families(tmp_path, pair):
    student, teacher = ACROSS[pair]
    other = any_model(teacher, width=6)
    checkpoint = save_teacher(tmp_path / "teacher.pth", other)
    terms = [*FEATURES[:1], *FEATURES[2:], dict(type="FocalGlobal"), dict(type="MaskedGeneration", weight=1e-3)]
    model = build(distilled(any_model(student, frozen_bn=True), other, checkpoint, terms=terms))
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    values = []
    for _ in range(3):
        found = losses(model, raw_batch())
        values.append(distillation(found))
        optimizer.zero_grad()
        values[-1].backward()
        optimizer.step()
    assert values[-1] < values[0] and torch.isfinite(values[-1])


@pytest.mark.parametrize(("student", "teacher"), [("FCOS", "ATSS"), ("RTMDet", "GFL"), ("GFL", "YOLOX")])
def test_classes_cross_heads_that_predict_once_a_position(tmp_path, student, teacher):
    other = any_model(teacher, width=6)
    checkpoint = save_teacher(tmp_path / "teacher.pth", other)
    model = build(distilled(any_model(student), other, checkpoint, terms=ONE_POSITION))
    found = losses(model, raw_batch())
    assert found["distill.classes.loss"] > 0 and found["distill.classes_main.loss"] > 0


# Its default loss_ld is in no registry.
LD_HEAD = dict(type="LDHead", loss_ld=dict(type="KnowledgeDistillationKLDivLoss", loss_weight=0.25, T=10))


def test_a_teacher_that_was_trained_by_other_losses_teaches_as_its_kind_does(tmp_path):
    plain = zoo("GFL", width=6)
    checkpoint = save_teacher(tmp_path / "teacher.pth", plain)  # an LDHead has the same weights
    student, terms = zoo("GFL", frozen_bn=True), [dict(type="LocalizationDistillation"), dict(type="SoftTargets")]
    found = []
    for head in (dict(type="GFLHead"), LD_HEAD):
        teacher = zoo("GFL", width=6, head=head)
        model = build(distilled(student, teacher, checkpoint, terms=terms))
        assert type(model.distiller.teacher.model.bbox_head).__name__ == head["type"]
        found.append({key: value.item() for key, value in losses(model, raw_batch()).items() if "distill." in key})
    assert found[0] == found[1]
    assert len(found[0]) == 2 and min(found[0].values()) > 0


@pytest.mark.parametrize(
    ("kind", "head"),
    [
        ("ATSS", "PAAHead"),  # predicts in a way of its own
        ("RetinaNet", "RetinaSepBNHead"),  # has a forward of its own
    ],
)
def test_a_teacher_that_predicts_otherwise_is_refused(kind, head):
    settings = dict(type=head) | (dict(num_ins=3) if head == "RetinaSepBNHead" else {})
    entry = distilled(zoo(kind), zoo(kind, head=settings), "unread.pth", terms=[dict(type="SoftTargets")])
    with pytest.raises(WiringError, match=f"the teacher's {head} is not one that this term can read"):
        build(entry)


def test_a_student_with_losses_of_its_own_is_refused():
    student = zoo("GFL", head=LD_HEAD)
    with pytest.raises(WiringError, match="the student's LDHead is not one that this term can read"):
        build(distilled(student, zoo("GFL"), "unread.pth", terms=[dict(type="SoftTargets")]))


def test_boxes_of_unlike_units_are_refused(tmp_path):
    other = any_model("ATSS", width=6)
    checkpoint = save_teacher(tmp_path / "teacher.pth", other)
    entry = distilled(any_model("FCOS"), other, checkpoint, terms=[dict(type="BoundedRegression")])
    with pytest.raises(WiringError, match="FCOSHead predicts boxes in strides, the teacher's ATSSHead in deltas"):
        build(entry)


def test_a_transformer_student_trains_through_the_runner(tmp_path, scenes, teacher_model, teacher_checkpoint):
    student = detector(backbone="SwinTransformer", width=8)
    entry = distilled(student, teacher_model, teacher_checkpoint, recipe="ld", terms=FEATURES[:1])
    runner = run(runner_config(entry, scenes, tmp_path, iters=1))
    build(student).load_state_dict(runner.model.state_dict(), strict=True)
    logged = {name: log.data[0].sum() for name, log in runner.message_hub.log_scalars.items() if "distill." in name}
    assert len(logged) >= 4 and all(value > 0 for value in logged.values()), logged


def test_taps_on_grids_of_other_sizes_are_resized(teacher_model, teacher_checkpoint):
    term = dict(type="FeatureImitation", student_tap="neck[0]", teacher_tap="neck[1]")
    model = build(distilled(detector(), teacher_model, teacher_checkpoint, terms=[term]))
    assert model.distiller.rows[0].adapter == "ConvAdapter 8→12, resize"
    found = losses(model, raw_batch())["distill.feature_imitation.loss"]
    found.backward()
    assert found > 0 and all(p.grad.abs().sum() > 0 for p in model.distiller.parameters())


def other_view(model, **preprocessor):
    model = copy.deepcopy(model)
    model["data_preprocessor"].update(preprocessor)
    return model


@pytest.mark.parametrize(
    "preprocessor",
    [
        dict(mean=[0.0, 0.0, 0.0], std=[255.0, 255.0, 255.0], bgr_to_rgb=True),
        dict(mean=[103.53, 116.28, 123.675], std=[1.0, 1.0, 1.0], bgr_to_rgb=False),  # caffe
        dict(pad_value=3),
        dict(mean=[10.0, 20.0, 30.0], std=[40.0, 50.0, 60.0], bgr_to_rgb=False, pad_value=-1),
    ],
)
def test_the_teacher_sees_the_batch_as_its_own_preprocessor_makes_it(teacher_model, teacher_checkpoint, preprocessor):
    # The oracle is the teacher's own data_preprocessor on the raw images.
    teacher = other_view(teacher_model, **preprocessor)
    model = build(distilled(detector(frozen_bn=True), teacher, teacher_checkpoint, **EVERY_TERM))
    batch = raw_batch(sizes=[(96, 96), (90, 96), (96, 94), (92, 93)])
    seen = []
    inner = model.distiller.teacher.model
    original = inner.extract_feat
    inner.extract_feat = lambda inputs: seen.append(inputs) or original(inputs)
    losses(model, batch)
    expected = inner.data_preprocessor(copy.deepcopy(batch), True)["inputs"]
    torch.testing.assert_close(seen[0], expected, rtol=1e-4, atol=1e-4)
    for image, (height, width) in zip(seen[0], [(96, 96), (90, 96), (96, 94), (92, 93)], strict=True):
        fill = preprocessor.get("pad_value", 0)
        assert (image[:, height:] == fill).all() and (image[:, :, width:] == fill).all()


def test_the_same_preprocessing_is_the_very_same_tensor(teacher_model, teacher_checkpoint):
    model = build(distilled(detector(), teacher_model, teacher_checkpoint, terms=FEATURES[:1]))
    seen = []
    for inner in (model, model.distiller.teacher.model):
        original = inner.extract_feat
        inner.extract_feat = lambda inputs, original=original: seen.append(inputs) or original(inputs)
    losses(model, raw_batch())
    assert len(seen) == 2 and seen[0] is seen[1]
