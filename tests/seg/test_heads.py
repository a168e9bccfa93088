"""Decode heads of other kinds: cascades, several outputs in training, binary ones, and those that score no pixels."""

from __future__ import annotations

import copy

import pytest
import torch

from kdgraft.errors import WiringError
from kdgraft_seg import recipes
from support.seg import CLASSES, batch, build, distilled, losses_of, save_teacher, segmentor, total

EVERY_RECIPE = ("skd", "cwd", "ifvd", "cirkd")


def cascade(width: int = 4) -> dict:
    """An OCRNet: a coarse FCN head and the OCR head that refines it."""
    model = segmentor("FCN", width=width)
    coarse = model["decode_head"]
    fine = {key: coarse[key] for key in ("num_classes", "dropout_ratio", "norm_cfg", "align_corners", "channels")}
    fine |= dict(type="OCRHead", in_channels=8 * width, in_index=3, ocr_channels=2 * width)
    model |= dict(type="CascadeEncoderDecoder", num_stages=2, decode_head=[coarse, fine])
    model.pop("auxiliary_head")
    return model


def recipe(name: str) -> dict:
    small = dict(critic=dict(channels=(8, 16), attention=1))
    settings = {"skd": dict(critic=small), "ifvd": dict(critic=small)}
    return dict(type=name, **settings.get(name, {}))


@pytest.mark.parametrize("name", EVERY_RECIPE)
def test_every_recipe_distils_a_cascade_from_its_last_head(tmp_path, name):
    teacher = save_teacher(tmp_path / "teacher.pth", cascade(8))
    model = build(distilled(cascade(), teacher, recipe=recipe(name)))
    assert {row.student_tap.split(".")[1] for row in model.distiller.rows} == {"1"}
    losses = losses_of(model, *batch())
    total(losses).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.decode_head[1].parameters())


def test_a_plain_student_learns_from_a_cascade_with_its_classes_in_order(tmp_path):
    turned = (*CLASSES[1:], CLASSES[0])
    values = {}
    for name, classes in (("same", CLASSES), ("turned", turned)):
        teacher = save_teacher(tmp_path / f"{name}.pth", cascade(8), classes=classes)
        terms = [dict(type="ChannelWise"), dict(type="SoftTargets")]
        model = build(distilled(segmentor(dropout=0.0), teacher, terms=terms))
        model.start_distilling(CLASSES)
        losses = losses_of(model, *batch())
        values[name] = [float(value.detach()) for key, value in losses.items() if key.startswith("distill.")]
    # The same teacher whose classes are called otherwise teaches something else.
    assert all(abs(a - b) > 1e-6 for a, b in zip(values["same"], values["turned"], strict=True))
    explicit = build(
        distilled(
            segmentor(),
            save_teacher(tmp_path / "e.pth", cascade(8)),
            terms=[dict(type="ChannelWise", teacher_tap="decode_head[-1]")],
        )
    )
    assert explicit.distiller.terms["channel_wise"].compares_classes


def test_a_head_that_returns_several_maps_is_read_at_the_one_that_counts(tmp_path):
    student = segmentor(dropout=0.0)
    head = {key: student["decode_head"][key] for key in ("num_classes", "norm_cfg", "align_corners", "channels")}
    student["decode_head"] = dict(head, type="DAHead", in_channels=32, in_index=3, dropout_ratio=0.0, pam_channels=4)
    teacher = save_teacher(tmp_path / "teacher.pth")
    model = build(distilled(student, teacher, recipe="cwd"))
    outputs = []
    forward = model.decode_head.forward

    def remember(inputs):
        outputs.append([score.clone() for score in forward(inputs)])
        for score in outputs[-1]:
            score.retain_grad()
        return tuple(outputs[-1])

    model.decode_head.forward = remember
    losses_of(model, *batch())["distill.channel_wise.loss"].backward()
    main, *others = outputs[-1]
    assert main.grad.abs().sum() > 0
    assert all(score.grad is None or not score.grad.any() for score in others)


def test_binary_scores_in_the_other_order_are_their_negative(tmp_path):
    def binary(width: int) -> dict:
        model = segmentor("FCN", width=width, classes=2, dropout=0.0)
        for head in (model["decode_head"], model["auxiliary_head"]):
            head.update(out_channels=1, threshold=0.5, loss_decode=dict(type="CrossEntropyLoss", use_sigmoid=True))
        return model

    values = []
    for name, classes, sign in (("same", ("no", "yes"), 1), ("swapped", ("yes", "no"), -1)):
        spec = save_teacher(tmp_path / f"{name}.pth", binary(8), classes=classes)
        saved = torch.load(spec["checkpoint"])
        for key in ("decode_head.conv_seg.weight", "decode_head.conv_seg.bias"):
            saved["state_dict"][key] = saved["state_dict"][key] * sign
        torch.save(saved, spec["checkpoint"])
        model = build(distilled(binary(4), spec, terms=[dict(type="SoftTargets"), dict(type="ChannelWise")]))
        model.start_distilling(("no", "yes"))
        inputs, samples = batch(classes=2)
        losses = losses_of(model, inputs, copy.deepcopy(samples))
        values.append({k: float(v.detach()) for k, v in losses.items() if k.startswith("distill.")})
    assert values[0] == pytest.approx(values[1])
    assert values[0]["distill.soft_targets.loss"] > 0


def test_a_head_that_scores_no_pixels_is_refused_before_it_runs(tmp_path):
    teacher = dict(config="mmseg::mask2former/mask2former_r50_8xb2-90k_cityscapes-512x1024.py", checkpoint="none.pth")
    with pytest.raises(WiringError, match="Mask2FormerHead returns no map of class scores"):
        build(distilled(segmentor(classes=19), teacher, recipe="cwd"))


def test_recipes_refuse_nothing_that_their_terms_take():
    assert recipes.skd(critic=dict(weight=0.2))[-1]["weight"] == 0.2
    assert recipes.cirkd(relations=dict(pixel=2.0))[-1]["pixel"] == 2.0
