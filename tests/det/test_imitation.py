"""FocalGlobal, MaskedGeneration and the region fine_grained in real detectors."""

from __future__ import annotations

import copy

import pytest
import torch
from mmdet.registry import MODELS

from kdgraft import DistillError, WiringError
from kdgraft.losses import focal_attention, focal_features, masked_generation
from kdgraft.losses.focal_global import box_scales
from kdgraft_det import TERMS, fgfi
from kdgraft_det.dense import anchor_levels
from kdgraft_mm.configs import load_config
from support.det import BOXES, build, detector, distilled, losses, raw_batch, save_plain
from support.tensors import distillation, gradients

KINDS = {
    "focal_global": dict(type="FocalGlobal"),
    "masked_generation": dict(type="MaskedGeneration"),
    "fine_grained": dict(type="FeatureImitation", tap="neck[*]", region="fine_grained"),
}
every = pytest.mark.parametrize("kind", list(KINDS))


def model_of(teacher_model, teacher_checkpoint, *terms, **student):
    """A student with batch norms that do not change, distilled by terms called term, term_2 …"""
    named = [{"name": "term", **term} for term in terms]
    return build(distilled(detector(frozen_bn=True, **student), teacher_model, teacher_checkpoint, terms=named))


def maps_of(model, batch):
    """What a step sees: the two pyramids, the adapters' outputs, and the batch."""
    model.train()
    data = model.data_preprocessor(copy.deepcopy(batch), True)
    with torch.no_grad():
        student, teacher = (m.extract_feat(data["inputs"]) for m in (model, model.distiller.teacher.model))
        adapted = [a(s, t) for a, s, t in zip(model.distiller.terms["term"].adapters, student, teacher, strict=True)]
    return adapted, teacher, model._batch(**data)


@every
def test_repeating_a_step_lowers_the_loss(teacher_model, teacher_checkpoint, kind):
    model = model_of(teacher_model, teacher_checkpoint, KINDS[kind])
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    state = model.distiller.live_state()["hidden"]
    found = []
    for _ in range(4):
        model.distiller.load_beyond_modules({"hidden": state})  # the same positions are left out
        value = distillation(losses(model, raw_batch()))
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        found.append(value.item())
    assert found[0] > found[1] > found[2] > found[3] > 0
    reached = {name.split(".")[0] for name, gradient in gradients(model).items() if gradient.any()}
    assert reached == {"backbone", "neck", "distiller"}


@every
def test_it_trains_without_an_object_in_the_batch(teacher_model, teacher_checkpoint, kind):
    model = model_of(teacher_model, teacher_checkpoint, KINDS[kind])
    value = distillation(losses(model, raw_batch([[]] * 4)))
    value.backward()
    assert value == 0 if kind == "fine_grained" else value > 0
    assert all(gradient.isfinite().all() for gradient in gradients(model).values())


@every
def test_the_hosts_random_stream_is_left_alone(teacher_model, teacher_checkpoint, kind):
    plain, ours = build(detector()), model_of(teacher_model, teacher_checkpoint, KINDS[kind])
    states = []
    for model in (plain, ours):
        torch.manual_seed(1)
        losses(model, raw_batch())
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def test_focal_global_is_the_sum_over_levels_of_its_parts(teacher_model, teacher_checkpoint):
    settings = dict(temperature=0.7, alpha=0.3, beta=0.2, gamma=0.1, lambda_=0.05)
    model = model_of(teacher_model, teacher_checkpoint, dict(type="FocalGlobal", weight=2.0, **settings))
    expected = 0.0
    adapted, teacher, batch = maps_of(model, raw_batch())
    for s, t in zip(adapted, teacher, strict=True):
        foreground, background = box_scales(batch.boxes, batch.padded_size, t)
        focal = [focal_features(s, t, scale, 0.7) for scale in (foreground, background)]
        relation = (s - t).square().flatten(1).sum(1).mean()  # the blocks start at 0
        expected += 2 * (0.3 * focal[0] + 0.2 * focal[1] + 0.1 * focal_attention(s, t, 0.7) + 0.05 * relation)
    torch.testing.assert_close(losses(model, raw_batch())["distill.term.loss"], expected, rtol=1e-4, atol=1e-7)
    assert [row.adapter for row in model.distiller.rows] == ["ConvAdapter 8→12"] * 3


def test_masked_generation_is_the_sum_over_levels(teacher_model, teacher_checkpoint):
    model = model_of(teacher_model, teacher_checkpoint, dict(type="MaskedGeneration", mask_ratio=0, weight=1.0))
    term = model.distiller.terms["term"]
    adapted, teacher, _ = maps_of(model, raw_batch())
    expected = 0.0
    for s, t, generator in zip(adapted, teacher, term.parts, strict=True):
        expected += masked_generation(s, t, generator, torch.ones_like(s[:, 0]) > 0)
    torch.testing.assert_close(losses(model, raw_batch())["distill.term.loss"], expected, rtol=1e-4, atol=1e-7)


def test_equal_channels_have_no_adapter(teacher_model, teacher_checkpoint):
    for kind in ("focal_global", "masked_generation"):
        model = model_of(teacher_model, teacher_checkpoint, KINDS[kind], channels=12)
        assert [row.adapter for row in model.distiller.rows] == ["NoAdapter"] * 3


def test_what_is_left_out_is_drawn_anew_each_step_and_again_from_the_same_seed(teacher_model, teacher_checkpoint):
    model, twin = (model_of(teacher_model, teacher_checkpoint, KINDS["masked_generation"]) for _ in range(2))
    found = [[distillation(losses(each, raw_batch())).item() for _ in range(3)] for each in (model, twin)]
    assert found[0] == found[1] and len(set(found[0])) == 3
    keep = model.distiller.terms["term"]._keep(torch.zeros(4, 1, 100, 100))
    assert [image.float().mean().item() for image in keep] == pytest.approx([0.35] * 4, abs=0.02)
    assert not torch.equal(keep[0], keep[1])


def test_the_recipe_fine_grained_is_the_papers_loss(teacher_model, teacher_checkpoint):
    # 0.01 · Σ I (r(s) - t)² / (2 ΣI) on one level of C channels, at the weight 0.01 · C / 2.
    (term,) = fgfi(weight=0.01 * 12 / 2, tap="neck[0]")
    model = model_of(teacher_model, teacher_checkpoint, {**term, "name": "term"})
    model.train()
    data = model.data_preprocessor(raw_batch(), True)
    with torch.no_grad():
        s, t = (m.extract_feat(data["inputs"])[0] for m in (model, model.distiller.teacher.model))
        s = model.distiller.terms["term"].adapters[0](s, t)
    mask = model.distiller.terms["term"].region(model._batch(**data), t)
    assert set(mask.unique().tolist()) == {0.0, 1.0}
    expected = 0.01 * ((s - t).square() * mask[:, None]).sum() / (2 * mask.sum())
    torch.testing.assert_close(losses(model, raw_batch())["distill.term.loss"], expected, rtol=1e-4, atol=1e-7)


def test_each_object_marks_levels_that_can_detect_it(teacher_model, teacher_checkpoint):
    # GFL's anchors are squares of 4 strides: 32, 64 and 128. Boxes of 28 and of 88 pixels.
    model = model_of(teacher_model, teacher_checkpoint, KINDS["fine_grained"])
    region = model.distiller.terms["term"].region
    marked = []
    for box in ([30.0, 30.0, 58.0, 58.0], [4.0, 4.0, 92.0, 92.0]):
        model.train()
        data = model.data_preprocessor(raw_batch([[box]]), True)
        batch = model._batch(**data)
        marked.append([region(batch, torch.zeros(1, 1, n, n)).sum().item() > 0 for n in (12, 6, 3)])
    assert marked == [[True, False, False], [False, True, True]]


# --- whose anchors


def test_the_anchors_are_the_first_stages_own():
    levels = anchor_levels(build(detector()))
    assert [stride for stride, _ in levels] == [(8, 8), (16, 16), (32, 32)]
    assert [anchors.tolist() for _, anchors in levels] == [[[-2 * s, -2 * s, 2 * s, 2 * s]] for s in (8, 16, 32)]


def of_mmdet(config, width=8):
    """A detector of mmdet with a thin backbone."""
    model = load_config(f"mmdet::{config}").model
    model.backbone.init_cfg = None
    model.backbone.base_channels = model.backbone.stem_channels = width
    neck = model.neck[0] if isinstance(model.neck, list) else model.neck
    neck.in_channels = [width * channels // 64 for channels in neck.in_channels]
    return model


@pytest.mark.parametrize(
    ("config", "strides", "anchors"),
    [
        ("faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py", [4, 8, 16, 32, 64], 3),
        ("retinanet/retinanet_r50_fpn_1x_coco.py", [8, 16, 32, 64, 128], 9),
        ("fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py", [8, 16, 32, 64, 128], None),
        ("yolo/yolov3_d53_8xb8-320-273e_coco.py", [32, 16, 8], 3),
        ("ssd/ssd300_coco.py", [8, 16, 32, 64, 100, 300], (4, 6, 6, 6, 4, 4)),
        ("detr/detr_r50_8xb2-150e_coco.py", [], None),
    ],
)
def test_other_detectors_have_anchors_points_or_neither(config, strides, anchors):
    model = load_config(f"mmdet::{config}").model
    model.backbone.init_cfg = None
    levels = anchor_levels(MODELS.build(model))
    assert [stride for stride, _ in levels] == [(stride, stride) for stride in strides]
    expected = list(anchors) if isinstance(anchors, tuple) else [anchors] * len(strides)
    assert [None if found is None else len(found) for _, found in levels] == expected


@pytest.mark.parametrize(
    ("config", "tap"),
    [
        ("faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py", "neck[*]"),
        ("retinanet/retinanet_r50_fpn_1x_coco.py", "neck[*]"),
        ("atss/atss_r50_fpn_1x_coco.py", "neck[*]"),
        ("fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py", "neck[*]"),
        ("detr/detr_r50_8xb2-150e_coco.py", "backbone[0]"),
    ],
)
def test_other_detectors_learn_by_all_three(tmp_path, config, tap):
    plain = of_mmdet(config).to_dict()
    terms = [{**term, "tap": tap, "name": name} for name, term in KINDS.items()]
    checkpoint = save_plain(tmp_path / "teacher.pth", build(plain, 7))
    model = build(distilled(plain, plain, checkpoint, terms=terms))
    found = losses(model, raw_batch(BOXES[:2]))
    ours = {name: found[f"distill.{name}.loss"] for name in KINDS}
    assert all(value.isfinite() and value > 0 for value in ours.values()), ours
    sum(ours.values()).backward()
    reached = gradients(model)
    assert all(gradient.isfinite().all() for gradient in reached.values())
    assert any(gradient.any() for name, gradient in reached.items() if name.startswith("backbone"))


# --- mistakes


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (dict(type="FocalGlobal", temperature=0), "temperature must be > 0"),
        (dict(type="FocalGlobal", alpha=-1), "FocalGlobal: alpha must be a number >= 0, got -1"),
        (dict(type="FocalGlobal", lambda_="1"), "FocalGlobal: lambda_ must be a number >= 0, got '1'"),
        (dict(type="FocalGlobal", region="foreground"), "takes no argument 'region'"),
        (dict(type="FocalGlobal", loss="hint"), "takes no argument 'loss'"),
        (dict(type="PearsonImitation", tap="neck[0]", loss="cosine"), "takes no argument 'loss'"),
        (dict(type="LocalizationDistillation", vlr_variant="code"), "vlr_variant says which anchors .*; leave it out"),
        (dict(type="MaskedGeneration", mask_ratio=1.5), r"MaskedGeneration: mask_ratio must be in \[0, 1\], got 1.5"),
        (dict(type="MaskedGeneration", mask_ratio=-1), r"MaskedGeneration: mask_ratio must be in \[0, 1\], got -1"),
        (dict(type="MaskedGeneration", loss="hint"), "takes no argument 'loss'"),
    ],
)
def test_wrong_settings(spec, message):
    with pytest.raises(DistillError, match=message):
        TERMS.build(spec)


@pytest.mark.parametrize("kind", ["FocalGlobal", "MaskedGeneration"])
def test_they_take_maps_alone(tmp_path, kind):
    swin = detector(backbone="SwinTransformer", width=8)
    terms = [dict(type=kind, tap="backbone.stages.0.blocks.0")]
    with pytest.raises(WiringError, match=r"must be maps \(B, C, H, W\)"):
        build(distilled(swin, swin, str(tmp_path / "nowhere.pth"), terms=terms))
