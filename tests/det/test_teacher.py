"""The teacher of a distilled detector: frozen, unseen by the host, checked against the student's classes, read safely."""

from __future__ import annotations

import copy
import logging
from collections import OrderedDict

import pytest
import torch

from kdgraft.errors import DistillError, UnsafeCheckpoint, WiringError
from kdgraft.recorder import Recorder
from kdgraft.taps import Tap, _tensors
from kdgraft_det import DistilledDetector
from kdgraft_det.heads import reads_classes
from support.det import (
    CLASSES,
    EVERY_TERM,
    build,
    detector,
    distillation_gradients,
    distilled,
    losses,
    raw_batch,
    runner_config,
    save_plain,
    save_teacher,
)
from support.det_stages import detr, staged
from support.det_zoo import zoo
from support.mm import history, run
from support.tensors import Payload, assert_same

SOFT = dict(terms=[dict(type="SoftTargets")])
FEATURES = dict(terms=[dict(type="FeatureImitation", tap="neck[*]")])


def test_training_changes_nothing_of_the_teacher(distilled_run, teacher_checkpoint):
    model = distilled_run.runner.model
    teacher = model.distiller.teacher.model
    # Four iterations of training with batch norm layers in the teacher, and a train() call of the host before each epoch.
    model.train()
    saved = torch.load(teacher_checkpoint, weights_only=True)["state_dict"]
    assert_same(dict(teacher.state_dict()), dict(saved))
    assert not any(module.training for module in teacher.modules())
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in teacher.parameters())


def test_a_teacher_switched_to_training_is_back_in_eval_mode_for_the_next_step(teacher_model, teacher_checkpoint):
    model = build(distilled(detector(), teacher_model, teacher_checkpoint, **FEATURES))
    before = losses(model, raw_batch())
    buffers = copy.deepcopy(dict(model.distiller.teacher.model.named_buffers()))
    model.distiller.teacher.model.train()
    after = losses(model, raw_batch())
    key = "distill.feature_imitation.loss"
    assert torch.equal(before[key], after[key])
    assert_same(dict(model.distiller.teacher.model.named_buffers()), buffers)


def test_the_host_sees_nothing_of_the_teacher(teacher_model, teacher_checkpoint):
    model = build(distilled(detector(), teacher_model, teacher_checkpoint, **EVERY_TERM))
    teacher = model.distiller.teacher.model
    hidden = {id(module) for module in teacher.modules()}
    assert hidden.isdisjoint(id(module) for module in model.modules())
    owned = {id(t) for t in (*teacher.parameters(), *teacher.buffers())}
    assert owned.isdisjoint(id(t) for t in (*model.parameters(), *model.buffers(), *model.state_dict().values()))
    twin = copy.deepcopy(model)
    assert twin.distiller.teacher is model.distiller.teacher
    assert twin.distiller.terms is not model.distiller.terms
    # It moves and converts with the model nevertheless.
    model.double()
    assert all(parameter.dtype == torch.float64 for parameter in teacher.parameters())


def test_a_checkpoint_that_does_not_fit_is_an_error_with_its_keys(tmp_path, teacher_model):
    state = build(teacher_model).state_dict()
    del state["neck.fpn_convs.0.conv.weight"]
    state["extra.weight"] = torch.zeros(1)
    state["backbone.conv1.weight"] = torch.zeros(2, 3, 7, 7)
    path = tmp_path / "wrong.pth"
    torch.save({"state_dict": state}, path)
    with pytest.raises(DistillError) as caught:
        build(distilled(detector(), teacher_model, str(path), **FEATURES))
    message = str(caught.value)
    for part in ("neck.fpn_convs.0.conv.weight", "extra.weight", "backbone.conv1.weight (2, 3, 7, 7)", str(path)):
        assert part in message
    assert "\n" not in message


def test_names_of_an_older_version_load_where_the_hosts_own_modules_convert_them(tmp_path):
    fcos = zoo("FCOS")
    state = build(fcos, seed=5).state_dict()
    older = {key.replace("conv_cls.", "fcos_cls.").replace("conv_reg.", "fcos_reg."): v for key, v in state.items()}
    assert older.keys() != state.keys()
    path = tmp_path / "older.pth"
    torch.save({"state_dict": older}, path)
    model = build(distilled(zoo("FCOS"), fcos, str(path), **FEATURES))
    assert_same(dict(model.distiller.teacher.model.state_dict()), dict(state))
    del older["bbox_head.fcos_cls.weight"]
    torch.save({"state_dict": older}, path)
    with pytest.raises(DistillError, match=r"older\.pth does not fit the teacher FCOS"):
        build(distilled(zoo("FCOS"), fcos, str(path), **FEATURES))


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"state_dict": s}, lambda s: {"model": s}])
def test_checkpoints_of_other_makes_load(tmp_path, teacher_model, prefix, wrap):
    state = OrderedDict((prefix + key, value) for key, value in build(teacher_model, seed=5).state_dict().items())
    path = tmp_path / "teacher.pth"
    torch.save(wrap(state), path)
    model = build(distilled(detector(), teacher_model, str(path), **FEATURES))
    loaded = model.distiller.teacher.model.state_dict()
    assert_same({prefix + key: value for key, value in loaded.items()}, dict(state))


def test_a_checkpoint_of_a_real_run_is_a_teacher_without_a_flag(tmp_path, scenes, distilled_run, plain_run):
    # With log histories, message hub, optimizer state and meta, as every Runner writes them; distilled or plain.
    for trained in (plain_run, distilled_run):
        model = build(distilled(detector(), detector(), str(trained.checkpoint(4)), **SOFT))
        assert_same(dict(model.distiller.teacher.model.state_dict()), dict(trained.runner.model.state_dict()))
        assert list(model.distiller.teacher.meta["dataset_meta"]["classes"]) == list(CLASSES)
    entry = distilled(detector(), detector(), str(distilled_run.checkpoint(4)), **SOFT)
    assert history(run(runner_config(entry, scenes, tmp_path, iters=1)), "distill.soft_targets.loss")[0] > 0


def test_a_checkpoint_with_foreign_objects_needs_the_flag(tmp_path, teacher_model):
    path, trace = tmp_path / "foreign.pth", tmp_path / "trace"
    torch.save({"state_dict": build(teacher_model).state_dict(), "meta": {"what": Payload(trace)}}, path)
    entry = distilled(detector(), teacher_model, str(path), **FEATURES)
    with pytest.raises(UnsafeCheckpoint, match="trusted=True") as caught:
        build(entry)
    assert not trace.exists() and "\n" not in str(caught.value)
    entry["teacher"]["trusted"] = True
    build(entry)
    assert trace.exists()


def _class_weights(model, order):
    """The state of a teacher whose class outputs are reordered."""
    state = {key: value.clone() for key, value in model.state_dict().items()}
    for name in ("bbox_head.gfl_cls.weight", "bbox_head.gfl_cls.bias"):
        state[name] = state[name][list(order)]
    return state


@pytest.mark.parametrize("region", ["all", "main"])
def test_classes_in_another_order_are_compared_by_name(
    tmp_path, scenes, teacher_model, teacher_checkpoint, region, caplog
):
    order = [3, 1, 4, 0, 5, 9, 2, 6, 8, 7]
    teacher = build(teacher_model)
    teacher.load_state_dict(torch.load(teacher_checkpoint, weights_only=True)["state_dict"])
    permuted = tmp_path / "permuted.pth"
    torch.save(
        {
            "state_dict": _class_weights(teacher, order),
            "meta": {"dataset_meta": {"classes": tuple(CLASSES[i] for i in order)}},
        },
        permuted,
    )
    found = []
    for checkpoint in (teacher_checkpoint, str(permuted)):
        model = build(
            distilled(detector(), teacher_model, checkpoint, terms=[dict(type="SoftTargets", anchors=region)])
        )
        model.start_distilling(CLASSES)
        found.append(
            (losses(model, raw_batch())["distill.soft_targets.loss"], distillation_gradients(model, raw_batch()))
        )
    assert found[0][0] > 0
    torch.testing.assert_close(found[0][0], found[1][0])
    for name, gradient in found[0][1].items():
        torch.testing.assert_close(gradient, found[1][1][name], rtol=1e-4, atol=1e-7)

    # Through the Runner, which knows the classes of its training set.
    entry = distilled(detector(), teacher_model, str(permuted), **SOFT)
    plain = distilled(detector(), teacher_model, teacher_checkpoint, **SOFT)
    a, b = (run(runner_config(e, scenes, tmp_path / str(i), iters=1)) for i, e in enumerate((entry, plain)))
    assert history(a, "distill.soft_targets.loss") == pytest.approx(history(b, "distill.soft_targets.loss"), rel=1e-5)


def test_other_classes_are_refused_only_where_classes_are_compared(tmp_path, scenes, teacher_model):
    names = (*CLASSES[:9], "zebra")
    checkpoint = save_plain(tmp_path / "zebra.pth", build(teacher_model), names)
    runner_of = lambda terms, name: runner_config(  # noqa: E731
        distilled(detector(), teacher_model, checkpoint, **terms), scenes, tmp_path / name, iters=1
    )
    with pytest.raises(WiringError, match=r"lacks \['9'\], and has \['zebra'\]"):
        run(runner_of(SOFT, "soft"))
    assert history(run(runner_of(FEATURES, "features")), "distill.feature_imitation.loss")[0] > 0


PAIRED = {
    "ChannelWise": dict(type="ChannelWise", tap="bbox_head[0][*]"),
    "FeatureImitation": dict(type="FeatureImitation", tap="bbox_head[0][1]"),
    "PearsonImitation": dict(type="PearsonImitation", tap="bbox_head.gfl_cls"),
    "one side": dict(type="Hint", student_tap="bbox_head[1][*]", teacher_tap="bbox_head[0][*]"),
}


@pytest.mark.parametrize("kind", list(PAIRED))
def test_class_outputs_are_not_paired_channel_by_channel_in_another_order(
    tmp_path, teacher_model, teacher_checkpoint, kind, caplog
):
    terms = [dict(PAIRED[kind], name="paired"), dict(type="FeatureImitation", tap="neck[*]")]
    plain = build(teacher_model)
    reversed_, zebra, unnamed = (
        save_plain(tmp_path / f"{number}.pth", plain, names)
        for number, names in enumerate((CLASSES[::-1], (*CLASSES[:9], "zebra"), None))
    )
    for checkpoint, message in ((reversed_, "paired: tapped at class outputs.*use SoftTargets"), (zebra, "zebra")):
        model = build(distilled(detector(), teacher_model, checkpoint, terms=terms))
        with pytest.raises(WiringError, match=message) as caught:
            model.start_distilling(CLASSES)
        assert "\n" not in str(caught.value)
    for checkpoint in (teacher_checkpoint, unnamed):
        caplog.clear()
        model = build(distilled(detector(), teacher_model, checkpoint, terms=terms))
        model.start_distilling(CLASSES)
        assert ("does not name its classes" in caplog.text) == (checkpoint == unnamed)
        assert losses(model, raw_batch())["distill.paired.loss"] > 0


def test_what_knows_no_classes_may_come_from_classes_in_another_order(tmp_path, teacher_model):
    checkpoint = save_plain(tmp_path / "reversed.pth", build(teacher_model), CLASSES[::-1])
    taps = ["bbox_head[1][*]", "bbox_head.cls_convs[0]", "bbox_head.gfl_cls:input", "neck[*]"]
    terms = [dict(type="FeatureImitation", tap=taps), dict(type="CrossHead"), dict(type="LocalizationDistillation")]
    model = build(distilled(detector(), teacher_model, checkpoint, terms=terms))
    model.start_distilling(CLASSES)
    assert losses(model, raw_batch())["distill.feature_imitation.loss"] > 0


def known_classes(model, taps):
    """For each tap whether a tensor that it reads in a dry run has classes as its channels."""
    samples = DistilledDetector._example_samples(128)
    with torch.no_grad():
        recording = Recorder(model.eval(), taps).rehearse(
            model, lambda: model(torch.randn(1, 3, 128, 128), samples, mode="tensor")
        )
    return [any(reads_classes(model, tap, tensor) for tensor in _tensors(recording[tap])) for tap in taps]


@pytest.mark.parametrize(
    ("model", "by_class", "not_by_class"),
    [
        (
            staged("Mask R-CNN"),
            "roi_head.bbox_head roi_head.bbox_head[0] roi_head.bbox_head[1] roi_head.bbox_head.fc_cls "
            "roi_head.mask_head roi_head.mask_head.conv_logits",
            "rpn_head[0] rpn_head.rpn_cls roi_head.bbox_head:input roi_head.bbox_head.shared_fcs[0]",
        ),
        (
            staged("Cascade R-CNN"),
            "roi_head.bbox_head[0][0] roi_head.bbox_head.1[0] roi_head.bbox_head[*] roi_head.bbox_head.1.fc_cls",
            "roi_head.bbox_head.0:input roi_head.bbox_head.1.shared_fcs[0]",
        ),
        (
            detr(),
            "bbox_head[0] bbox_head[0][-1] bbox_head.cls_branches[1]",
            "bbox_head[1] bbox_head.reg_branches[1] decoder",
        ),
        (zoo("YOLOX"), "bbox_head[0][*] bbox_head.multi_level_conv_cls[0]", "bbox_head[2][*]"),
    ],
    ids=["Mask R-CNN", "Cascade R-CNN", "DETR", "YOLOX"],
)
def test_taps_at_class_outputs(model, by_class, not_by_class):
    model = build(model)
    for taps, expected in ((by_class, True), (not_by_class, False)):
        parsed = [Tap.parse(tap) for tap in taps.split()]
        assert all(model.get_submodule(tap.path) is not None for tap in parsed)
        assert known_classes(model, parsed) == [expected] * len(parsed)


def test_boxes_and_masks_for_all_classes_at_once_know_no_order():
    model = staged("Mask R-CNN")
    model["roi_head"]["bbox_head"]["reg_class_agnostic"] = True
    model["roi_head"]["mask_head"]["class_agnostic"] = True
    model = build(model)
    for tap, expected in (
        ("roi_head.bbox_head[0]", True),
        ("roi_head.bbox_head[1]", False),
        ("roi_head.mask_head", False),
    ):
        assert known_classes(model, [Tap.parse(tap)]) == [expected]


def test_unnamed_classes_warn_and_are_taken_as_the_same(tmp_path, teacher_model, teacher_checkpoint, caplog):
    unnamed = save_plain(tmp_path / "unnamed.pth", build(teacher_model), None)
    model = build(distilled(detector(), teacher_model, unnamed, **SOFT))
    with caplog.at_level(logging.WARNING, "kdgraft"):
        model.start_distilling(CLASSES)
    assert "the teacher's checkpoint does not name its classes" in caplog.text
    caplog.clear()
    model = build(distilled(detector(), teacher_model, unnamed, **FEATURES))
    with caplog.at_level(logging.WARNING, "kdgraft"):
        model.start_distilling(CLASSES)
    assert not caplog.text


def test_a_distilled_config_as_the_teachers_means_its_plain_student(teacher_model, teacher_checkpoint):
    # As after a first generation: its config is at hand, its own teacher's file need not be.
    first = distilled(teacher_model, detector(width=8), "gone.pth", **EVERY_TERM)
    model = build(distilled(detector(), first, teacher_checkpoint, **FEATURES))
    assert type(model.distiller.teacher.model).__name__ == "GFL"
    assert losses(model, raw_batch())["distill.feature_imitation.loss"] > 0


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_teacher_can_compute_in_its_own_precision(teacher_model, teacher_checkpoint, precision):
    entry = distilled(detector(), teacher_model, teacher_checkpoint, **FEATURES)
    exact = losses(build(entry), raw_batch())["distill.feature_imitation.loss"].item()
    entry["teacher"]["precision"] = precision
    found = losses(build(entry), raw_batch())["distill.feature_imitation.loss"]
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(exact, rel=1e-6 if precision == "fp32" else 0.05)
    assert (found.item() == exact) == (precision == "fp32")


INHERIT = ["neck.fpn_convs", "bbox_head"]


def test_the_student_inherits_what_is_alike(teacher_model, teacher_checkpoint):
    student = copy.deepcopy(teacher_model)
    student["backbone"].update(depth=18)
    made = build(distilled(student, teacher_model, teacher_checkpoint, inherit=INHERIT, **FEATURES))
    teacher = made.distiller.teacher.model
    for path in INHERIT:
        assert_same(made.get_submodule(path).state_dict(), teacher.get_submodule(path).state_dict())
    lateral = "neck.lateral_convs.0"
    assert any(
        not torch.equal(a, b)
        for a, b in zip(
            made.get_submodule(lateral).parameters(), teacher.get_submodule(lateral).parameters(), strict=True
        )
    )
    # A copy, which trains on its own.
    with torch.no_grad():
        for parameter in made.bbox_head.parameters():
            parameter.zero_()
    assert any(parameter.abs().sum() > 0 for parameter in teacher.bbox_head.parameters())


def test_what_is_not_alike_cannot_be_inherited(teacher_model, teacher_checkpoint):
    def make(**settings):
        build(distilled(detector(), teacher_model, teacher_checkpoint, **{**FEATURES, **settings}))

    with pytest.raises(WiringError, match=r"inherit: the student has no module 'bbox_hed'; did you mean 'bbox_head'"):
        make(inherit="bbox_hed")
    with pytest.raises(WiringError, match=r"inherit: 'backbone' differs, .* in the student and .* in the teacher"):
        make(inherit="backbone")
    with pytest.raises(DistillError, match="give it terms or a recipe as well"):
        make(inherit="bbox_head", terms=[])


def test_classes_in_another_order_cannot_be_inherited(tmp_path, teacher_model):
    path = save_teacher(tmp_path / "teacher.pth", teacher_model, classes=tuple(reversed(CLASSES)))
    student = copy.deepcopy(teacher_model)
    made = build(distilled(student, teacher_model, str(path), inherit="bbox_head", **FEATURES))
    with pytest.raises(DistillError, match="its classes stand in another order"):
        made.start_distilling(CLASSES)


@pytest.mark.parametrize("inherit", [None, 3, {"bbox_head": 1}])
def test_what_is_no_path_cannot_be_inherited(teacher_model, teacher_checkpoint, inherit):
    with pytest.raises(DistillError, match=r"^inherit must be a path of a module or a list of them, got "):
        build(distilled(detector(), teacher_model, teacher_checkpoint, inherit=inherit, **FEATURES))
