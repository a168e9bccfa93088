"""The teacher of a distilled segmentor: frozen, unseen by the host, checked against the student's classes, read safely."""

from __future__ import annotations

import copy
import logging

import pytest
import torch

from kdgraft.errors import DistillError, UnsafeCheckpoint, WiringError
from support.mm import history, run
from support.seg import (
    CLASSES,
    EVERY_TERM,
    SMALL_CRITIC,
    TERM_NAMES,
    batch,
    build,
    config,
    distilled,
    losses_of,
    save_teacher,
    segmentor,
)
from support.tensors import Payload, assert_same, distillation, gradients

SCORES = [
    dict(type="SoftTargets"),
    dict(type="SoftTargets", grid="labels", name="on_labels"),
    dict(type="DIST"),
    dict(type="ChannelWise"),
    dict(type="AdversarialMask", critic=SMALL_CRITIC),
]
EMBEDDINGS = [dict(type="FeatureImitation", tap="backbone[3]"), dict(type="ClassPrototypes")]


def test_training_changes_nothing_of_the_teacher(distilled_run, teacher):
    # Four iterations and two validations, with batch norms in the teacher and the host's train() calls in between.
    model = distilled_run.runner.model.train()
    frozen = model.distiller.teacher.model
    assert_same(dict(frozen.state_dict()), dict(torch.load(teacher["checkpoint"], weights_only=True)["state_dict"]))
    assert not any(module.training for module in frozen.modules())
    assert not any(p.requires_grad or p.grad is not None for p in frozen.parameters())


def test_a_teacher_switched_to_training_is_back_in_eval_mode_for_the_next_step(teacher):
    models = [build(distilled(segmentor(), teacher, **EVERY_TERM)) for _ in range(2)]
    models[1].distiller.teacher.model.train()
    found = [{k: v.detach() for k, v in losses_of(model, *batch()).items()} for model in models]
    assert_same(*found)
    assert_same(*(dict(model.distiller.teacher.model.named_buffers()) for model in models))


def test_the_host_sees_nothing_of_the_teacher(teacher):
    model = build(distilled(segmentor(), teacher, **EVERY_TERM))
    frozen = model.distiller.teacher.model
    assert {id(m) for m in frozen.modules()}.isdisjoint(id(m) for m in model.modules())
    owned = {id(t) for t in (*frozen.parameters(), *frozen.buffers())}
    assert owned.isdisjoint(id(t) for t in (*model.parameters(), *model.buffers(), *model.state_dict().values()))
    twin = copy.deepcopy(model)
    assert twin.distiller.teacher is model.distiller.teacher and twin.distiller.terms is not model.distiller.terms
    model.double()
    assert all(p.dtype == torch.float64 for p in frozen.parameters())


def test_the_teacher_runs_no_further_than_what_is_tapped(teacher):
    model = build(distilled(segmentor(), teacher, terms=[dict(type="FeatureImitation", tap="backbone[3]")]))
    model.distiller.teacher.model.decode_head.forward = None  # whoever calls it fails
    assert losses_of(model, *batch())["distill.feature_imitation.loss"] > 0


def test_a_checkpoint_that_does_not_fit_is_an_error_with_its_keys(tmp_path):
    entry = segmentor("PSPNet", width=8)
    state = build(entry).state_dict()
    del state["decode_head.bottleneck.conv.weight"]
    state["extra.weight"] = torch.zeros(1)
    state["decode_head.conv_seg.weight"] = torch.zeros(7, 32, 1, 1)
    path = tmp_path / "wrong.pth"
    torch.save({"state_dict": state}, path)
    with pytest.raises(DistillError) as caught:
        build(distilled(segmentor(), dict(config=entry, checkpoint=str(path)), **EVERY_TERM))
    for part in (
        "decode_head.bottleneck.conv.weight",
        "extra.weight",
        "decode_head.conv_seg.weight (7, 32, 1, 1)",
        str(path),
    ):
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_checkpoint_with_foreign_objects_needs_the_flag(tmp_path):
    entry, path, trace = segmentor("PSPNet", width=8), tmp_path / "foreign.pth", tmp_path / "trace"
    torch.save({"state_dict": build(entry).state_dict(), "meta": {"what": Payload(trace)}}, path)
    spec = dict(config=entry, checkpoint=str(path))
    with pytest.raises(UnsafeCheckpoint, match="trusted=True"):
        build(distilled(segmentor(), spec, terms=EMBEDDINGS))
    assert not trace.exists()
    build(distilled(segmentor(), dict(spec, trusted=True), terms=EMBEDDINGS))
    assert trace.exists()


def test_a_checkpoint_of_a_real_run_is_a_teacher_without_a_flag(plain_run, distilled_run):
    for trained in (plain_run, distilled_run):
        spec = dict(config=segmentor(), checkpoint=str(trained.checkpoint(4)))
        model = build(distilled(segmentor(), spec, terms=SCORES))
        assert_same(dict(model.distiller.teacher.model.state_dict()), dict(trained.runner.model.state_dict()))
        assert list(model.distiller.teacher.meta["dataset_meta"]["classes"]) == list(CLASSES)


def test_classes_in_another_order_are_compared_by_name(tmp_path, scenes, teacher):
    order = [3, 1, 4, 0, 10, 5, 9, 2, 6, 8, 7]
    saved = torch.load(teacher["checkpoint"], weights_only=True)
    for name in ("decode_head.conv_seg.weight", "decode_head.conv_seg.bias"):
        saved["state_dict"][name] = saved["state_dict"][name][order]
    saved["meta"]["dataset_meta"]["classes"] = tuple(CLASSES[i] for i in order)
    # The auxiliary head's classes are not looked at.
    permuted = dict(teacher, checkpoint=str(tmp_path / "permuted.pth"))
    torch.save(saved, permuted["checkpoint"])
    found = []
    for spec, names in ((teacher, CLASSES), (permuted, CLASSES), (permuted, tuple(CLASSES[i] for i in order))):
        model = build(distilled(segmentor(dropout=0.0), spec, terms=SCORES))
        model.start_distilling(names)
        for head in (model.decode_head, model.distiller.teacher.model.decode_head):
            head.conv_seg.weight.data.mul_(50)  # a new model is sure of nothing: all classes look alike
        losses = losses_of(model, *batch())
        model.zero_grad()
        distillation(losses).backward()
        found.append((losses, gradients(model)))
    (losses, slopes), (same, same_slopes), (wrong, _) = found
    for name in ("soft_targets", "on_labels", "dist", "channel_wise"):
        key = f"distill.{name}.loss"
        torch.testing.assert_close(losses[key], same[key], rtol=1e-4, atol=1e-7)
        assert abs(losses[key] - wrong[key]) > 1e-4 * abs(losses[key]), name
    torch.testing.assert_close(
        losses["distill.adversarial_mask.gap"], same["distill.adversarial_mask.gap"], rtol=1e-3, atol=1e-6
    )
    for name, slope in slopes.items():
        torch.testing.assert_close(slope, same_slopes[name], rtol=1e-3, atol=1e-5)

    # Through the Runner, which knows the classes of its training set.
    terms = dict(terms=SCORES[:1])
    a, b = (
        run(config(distilled(segmentor(), spec, **terms), scenes, tmp_path / str(place), iterations=1))
        for place, spec in enumerate((teacher, permuted))
    )
    name = "distill.soft_targets.loss"
    assert history(a, name) == pytest.approx(history(b, name), rel=1e-4)


def test_other_classes_are_refused_only_where_classes_are_compared(tmp_path, scenes):
    other = save_teacher(tmp_path / "zebra.pth", classes=(*CLASSES[:10], "zebra"))

    def config_of(terms, name):
        return config(distilled(segmentor(), other, terms=terms), scenes, tmp_path / name, iterations=1)

    with pytest.raises(WiringError, match=r"lacks \['9'\], and has \['zebra'\]"):
        run(config_of(SCORES, "scores"))
    for term in SCORES:
        with pytest.raises(WiringError, match="other classes"):
            build(distilled(segmentor(), other, terms=[term])).start_distilling(CLASSES)
    runner = run(config_of(EMBEDDINGS, "features"))
    assert history(runner, "distill.feature_imitation.loss")[0] > 0


@pytest.mark.parametrize(
    "term",
    [
        dict(type="FeatureImitation", tap="decode_head"),
        dict(type="PearsonImitation", tap="decode_head"),
        dict(type="ChannelWise", tap="decode_head.conv_seg"),
    ],
    ids=["FeatureImitation", "PearsonImitation", "layer"],
)
def test_features_at_class_scores_are_refused_in_another_order(tmp_path, teacher, term):
    terms = [dict(term, name="paired"), *EMBEDDINGS]
    other = save_teacher(tmp_path / "reversed.pth", classes=CLASSES[::-1])
    with pytest.raises(WiringError, match=r"paired: tapped at class outputs.*SoftTargets") as caught:
        build(distilled(segmentor(), other, terms=terms)).start_distilling(CLASSES)
    assert "\n" not in str(caught.value)
    build(distilled(segmentor(), other, terms=EMBEDDINGS)).start_distilling(CLASSES)
    model = build(distilled(segmentor(), teacher, terms=terms))
    model.start_distilling(CLASSES)
    assert losses_of(model, *batch())["distill.paired.loss"] > 0


def test_unnamed_classes_warn_and_are_taken_as_the_same(tmp_path, caplog):
    unnamed = save_teacher(tmp_path / "unnamed.pth", classes=None)
    for terms, warned in ((SCORES, True), (EMBEDDINGS, False)):
        model = build(distilled(segmentor(), unnamed, terms=terms))
        with caplog.at_level(logging.WARNING, "kdgraft"):
            model.start_distilling(CLASSES)
        assert ("the teacher's checkpoint does not name its classes" in caplog.text) == warned
        caplog.clear()


def test_a_teacher_of_another_normalisation_sees_its_own_view(tmp_path):
    # The same pixels to a teacher with other statistics and channel order: its first convolution undoes both.
    student, other = segmentor(dropout=0.0), segmentor(dropout=0.0)
    own = save_teacher(tmp_path / "own.pth", student)
    other["data_preprocessor"].update(mean=[100.0, 110.0, 120.0], std=[50.0, 60.0, 70.0], bgr_to_rgb=False)
    spec = save_teacher(tmp_path / "other.pth", other)
    saved = torch.load(spec["checkpoint"], weights_only=True)
    state = torch.load(own["checkpoint"], weights_only=True)["state_dict"]
    saved["state_dict"] = state
    torch.save(saved, spec["checkpoint"])
    model = build(distilled(student, spec, terms=EMBEDDINGS[:1]))
    seen = []
    frozen = model.distiller.teacher.model
    stem = frozen.backbone.forward
    frozen.backbone.forward = lambda inputs: (seen.append(inputs), stem(inputs))[1]
    inputs, samples = batch(content=(64, 48))
    losses_of(model, inputs, samples)
    rgb = inputs * torch.tensor([58.395, 57.12, 57.375]).view(3, 1, 1) + torch.tensor([123.675, 116.28, 103.53]).view(
        3, 1, 1
    )
    bgr = (rgb.flip(1) - torch.tensor([100.0, 110.0, 120.0]).view(3, 1, 1)) / torch.tensor([50.0, 60.0, 70.0]).view(
        3, 1, 1
    )
    torch.testing.assert_close(seen[0][:, :, :, :48], bgr[:, :, :, :48], rtol=1e-4, atol=1e-4)
    assert (seen[0][:, :, :, 48:] == 0).all()  # padding is the teacher's own fill value


def test_the_teacher_can_compute_in_its_own_precision(teacher):
    found = {}
    for precision in ("inherit", "fp32", "bf16"):
        model = build(distilled(segmentor(dropout=0.0), dict(teacher, precision=precision), terms=EMBEDDINGS))
        found[precision] = losses_of(model, *batch())["distill.feature_imitation.loss"]
        assert found[precision].dtype == torch.float32
    assert found["fp32"] == found["inherit"] != found["bf16"]
    assert found["bf16"].item() == pytest.approx(found["fp32"].item(), rel=0.05)


def test_a_distilled_config_as_the_teachers_means_its_plain_student(teacher):
    first = distilled(segmentor("PSPNet", width=8), dict(config=segmentor(), checkpoint="gone.pth"), **EVERY_TERM)
    model = build(distilled(segmentor(), dict(teacher, config=first), **EVERY_TERM))
    assert type(model.distiller.teacher.model).__name__ == "EncoderDecoder"
    assert all(torch.isfinite(losses_of(model, *batch())[f"distill.{name}.loss"]) for name in TERM_NAMES)


def test_a_teacher_that_draws_at_inference_moves_none_of_the_students_draws(tmp_path):
    # SegNeXt's head factorises its features from bases that it draws anew in each pass.
    head = dict(type="LightHamHead", in_channels=[32, 64], in_index=[2, 3], channels=16, ham_channels=16)
    head |= dict(ham_kwargs=dict(MD_R=4), num_classes=11, norm_cfg=dict(type="GN", num_groups=4))
    drawing = segmentor(width=8, dropout=0.0)
    drawing["decode_head"] = head
    spec = save_teacher(tmp_path / "drawing.pth", drawing)
    frozen = build(drawing).eval()
    inputs, samples = batch()
    with torch.no_grad():
        assert not torch.equal(frozen(inputs), frozen(inputs))
    distilling = build(distilled(segmentor(dropout=0.5), spec, terms=[dict(type="SoftTargets")]))
    plain = build(segmentor(dropout=0.5))
    found = [losses_of(model, inputs, samples)["decode.loss_ce"] for model in (distilling, plain)]
    assert torch.equal(*found)
