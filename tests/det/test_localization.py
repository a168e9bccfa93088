"""Localization distillation: the authors' figures, mmdet's real LDHead, and what the normalisation changes."""

from __future__ import annotations

import copy

import pytest
import torch
from mmdet.models import LDHead
from mmengine.config import ConfigDict

from golden.localization import CASES, HEAD, LABELS, POSITIVES, anchors_and_boxes, head_outputs
from kdgraft import SoftTargets
from kdgraft.batch import Batch
from kdgraft_det import LocalizationDistillation, ld
from kdgraft_det.assignment import Assignment
from kdgraft_det.dense import DenseHeads
from kdgraft_det.dense_heads import dense_head
from kdgraft_det.reader import HeadScores
from support.det import EVERY_TERM, Given, build, detector, distilled, losses, raw_batch
from support.tensors import gradients


def golden(case):
    """A pair of GFL heads, recordings of student and teacher, and the batch, of a golden case."""
    anchors, counts, boxes = anchors_and_boxes(case)
    strides = CASES[case][1]
    gfl = build(detector(classes=3, reg_max=16, strides=strides)).bbox_head
    heads = DenseHeads(*(dense_head(gfl, "bbox_head", owner, "term") for owner in ("student", "teacher")), "term")
    labels = torch.full((1, len(anchors)), 3)
    for anchor, box in POSITIVES[case].items():
        labels[0, anchor] = LABELS[box]
    everywhere = torch.ones_like(labels, dtype=torch.bool)
    no_targets = anchors.new_zeros(1, len(anchors), 4)
    each = torch.tensor(strides).repeat_interleave(torch.tensor(counts))
    assignment = Assignment(labels, everywhere, everywhere, everywhere, anchors, each, counts, 3, no_targets)
    outputs = head_outputs(case)
    for level in (*outputs["cls_s"], *outputs["box_s"]):
        level.requires_grad_()
    student = Given({heads.student.classes: outputs["cls_s"], heads.student.boxes: outputs["box_s"]})
    teacher = Given({heads.teacher.classes: outputs["cls_t"], heads.teacher.boxes: outputs["box_t"]})
    return heads, student, teacher, Batch(boxes=[boxes], extra={("assignment", "student", "bbox_head"): assignment})


@pytest.mark.parametrize("variant", ["code", "paper"])
@pytest.mark.parametrize("case", list(CASES))
def test_the_authors_figures(case, variant):
    heads, student, teacher, batch = golden(case)
    expected = HEAD[case, variant]

    def ratio(term):
        term.heads, term.predictions = heads, HeadScores(heads, "term", "softmax", "main")
        return term(student, teacher, batch)

    # loss_ld = 0.25 · Σ_i w_i · mean over edges; nothing divides it. Ours is that sum over Σ w. Scores are taken in float32.
    main = ratio(LocalizationDistillation(anchors="main", variant="code"))
    assert main.numerator.item() == pytest.approx(sum(expected["ld"]) / 0.25, rel=1e-6)
    assert main.denominator.item() == pytest.approx(sum(expected["weight_sum"]), rel=1e-6)
    # loss_ld_vlr = 0.25 · Σ_i IoU_i · Σ over edges / 16: a quarter of the mean over edges.
    vlr = ratio(LocalizationDistillation(anchors="vlr", variant="code", vlr_variant=variant))
    assert vlr.numerator.item() == pytest.approx(sum(expected["ld_vlr"]) / 0.25 * 4, rel=1e-8)
    # loss_kd = 10 · the mean over the positives *of each level*, added up; ours is the mean over all positives.
    classes = ratio(SoftTargets(2, activation="softmax", classes="mean", anchors="main"))
    counts = anchors_and_boxes(case)[1]
    starts = [sum(counts[:level]) for level in range(len(counts))]
    per_level = [sum(start <= a < start + n for a in POSITIVES[case]) for start, n in zip(starts, counts, strict=True)]
    total = sum(kd / 10 * n for kd, n in zip(expected["kd"], per_level, strict=True))
    assert classes.numerator.item() == pytest.approx(total, rel=1e-8)
    assert classes.denominator.item() == len(POSITIVES[case])


@pytest.fixture(scope="module")
def entry(teacher_model, teacher_checkpoint):
    main, vlr, classes = ld(main=0.25)
    terms = [dict(main, variant="code"), vlr, classes]
    return distilled(detector(frozen_bn=True), teacher_model, teacher_checkpoint, terms=terms)


def _mmdets(model, batch):
    """loss_ld per level of mmdet's LDHead with the student's weights, and the weights' sum; with gradients on the student."""
    head_config = ConfigDict(copy.deepcopy(detector()["bbox_head"]))
    head_config.pop("type")
    head = LDHead(
        **head_config,
        loss_ld=dict(type="KnowledgeDistillationKLDivLoss", loss_weight=0.25, T=10),
        train_cfg=ConfigDict(detector()["train_cfg"]),
        test_cfg=ConfigDict(detector()["test_cfg"]),
    )
    assert not head.load_state_dict(model.bbox_head.state_dict()).missing_keys
    model.train()
    data = model.data_preprocessor(copy.deepcopy(batch), True)
    with torch.no_grad():
        teacher = model.distiller.teacher.model(data["inputs"], mode="tensor")
    features = model.extract_feat(data["inputs"])
    weight_sum = []
    single = head.loss_by_feat_single

    def noting(*args, **kwargs):
        found = single(*args, **kwargs)
        weight_sum.append(found[-1].item())
        return found

    head.loss_by_feat_single = noting
    found = head.loss(features, teacher, data["data_samples"])
    return sum(found["loss_ld"]), sum(weight_sum), head


def test_it_is_what_mmdets_head_computes_but_for_the_normalisation(entry):
    model = build(entry)
    ours = losses(model, raw_batch())["distill.ld_main.loss"]
    theirs, weight_sum, head = _mmdets(model, raw_batch())
    assert ours > 0 and weight_sum > 0
    # LDHead divides loss_bbox and loss_dfl by the weight sum, but not loss_ld.
    torch.testing.assert_close(ours * weight_sum, theirs.detach(), rtol=1e-5, atol=0)

    model.zero_grad()
    ours.backward()
    found = gradients(model)
    model.zero_grad()
    theirs.backward()
    for name, gradient in gradients(model).items():  # backbone and neck
        torch.testing.assert_close(found[name] * weight_sum, gradient, rtol=1e-3, atol=1e-7)
    for name, parameter in head.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(found[f"bbox_head.{name}"] * weight_sum, parameter.grad, rtol=1e-3, atol=1e-7)


def test_it_does_not_grow_with_the_batch_and_mmdets_does(entry):
    model = build(entry)
    once = raw_batch()
    twice = {key: [*values, *copy.deepcopy(values)] for key, values in once.items()}
    small, large = losses(model, once), losses(model, twice)
    for name in ("ld_main", "ld_vlr", "class_main"):
        torch.testing.assert_close(small[f"distill.{name}.loss"], large[f"distill.{name}.loss"], rtol=1e-5, atol=0)
    ratio = _mmdets(model, twice)[0] / _mmdets(model, once)[0]
    assert ratio.item() == pytest.approx(2, rel=1e-5)


def test_a_student_that_is_its_teacher_has_nothing_to_learn(tmp_path, teacher_model, teacher_checkpoint):
    model = build(distilled(teacher_model, teacher_model, teacher_checkpoint, **EVERY_TERM))
    model.load_state_dict(torch.load(teacher_checkpoint, weights_only=True)["state_dict"])
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()  # as the teacher's
    data = model.data_preprocessor(raw_batch(), True)
    found = model(**data, mode="loss")
    for name in ("ld_main", "ld_vlr", "class_main", "soft_targets"):
        assert found[f"distill.{name}.loss"].item() == pytest.approx(0, abs=1e-6)


def test_the_paper_variant_is_bins_times_the_code_variant(teacher_model, teacher_checkpoint):
    terms = [dict(type="LocalizationDistillation", name=v, variant=v) for v in ("code", "paper")]
    model = build(distilled(detector(), teacher_model, teacher_checkpoint, terms=terms))
    found = losses(model, raw_batch())
    assert (found["distill.paper.loss"] / found["distill.code.loss"]).item() == pytest.approx(9, rel=1e-5)  # reg_max 8
