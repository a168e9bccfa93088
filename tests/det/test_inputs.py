"""What may be in a batch: padding, empty images, other normalisations, half precision, values that are not finite."""

from __future__ import annotations

import copy
import logging

import pytest
import torch

from kdgraft import TERMS, Term
from kdgraft.errors import DistillError, WiringError
from kdgraft.losses import Ratio
from support.det import BOXES, EVERY_TERM, TERM_NAMES, build, detector, distilled, losses, raw_batch, runner_config
from support.mm import history, run
from support.steps import watched
from support.tensors import assert_same, distillation, gradients

SIZES = [(96, 96), (64, 96), (96, 64), (70, 74)]
SMALL = [[[8.0, 10.0, 44.0, 50.0]], [[20.0, 4.0, 90.0, 60.0]], [[2.0, 60.0, 30.0, 94.0]], [[12.0, 20.0, 60.0, 64.0]]]


@pytest.fixture(scope="module")
def entry(teacher_model, teacher_checkpoint):
    return distilled(detector(frozen_bn=True), teacher_model, teacher_checkpoint, **EVERY_TERM)


def _scribble(model, batch, amount):
    """The losses, with something added to the recorded maps of both models in the padding."""
    model.train()
    data = model.data_preprocessor(copy.deepcopy(batch), True)
    distiller = model.distiller
    hidden = distiller.live_state()["hidden"]

    def scribble(step):
        for recording in (step.recordings["student"], step.recordings["teacher"]):
            for seen in recording.seen.values():
                outputs = seen.values.get("output", [])
                outputs[:] = [_in_padding(value, data["inputs"].shape[-2:], amount) for value in outputs]

    with watched(scribble):
        found = model(**data, mode="loss")
    distiller.load_beyond_modules({"hidden": hidden})  # the next call leaves out what this one did
    return found


def _in_padding(value, padded, amount):
    if isinstance(value, (list, tuple)):
        return type(value)(_in_padding(entry, padded, amount) for entry in value)
    if not (isinstance(value, torch.Tensor) and value.ndim == 4 and value.is_floating_point()):
        return value
    # Cells that lie in the padding as a whole.
    y = torch.arange(value.shape[2]) * (padded[0] / value.shape[2])
    x = torch.arange(value.shape[3]) * (padded[1] / value.shape[3])
    sizes = torch.tensor(SIZES)
    outside = (y >= sizes[:, :1])[:, None, :, None] | (x >= sizes[:, 1:])[:, None, None, :]
    return torch.where(outside, value + amount, value)


def test_what_is_in_the_padding_of_the_maps_changes_no_loss(entry):
    model = build(entry)
    batch = raw_batch(SMALL, SIZES)
    found = [_scribble(model, batch, amount) for amount in (0.0, 100.0, torch.nan)]
    for name in TERM_NAMES:
        key = f"distill.{name}.loss"
        values = [result[key] for result in found]
        assert values[0] > 0, name
        assert torch.equal(values[0], values[1]), name
        assert torch.equal(values[0], values[2]), name


def test_the_padding_of_the_maps_gets_no_gradient(entry):
    model = build(dict(entry, recipe=None, terms=[dict(type="FeatureImitation", tap="neck[0]")])).train()
    data = model.data_preprocessor(raw_batch(SMALL, SIZES), True)
    kept = []
    handle = model.neck.register_forward_hook(lambda module, args, output: kept.append(output))
    distillation(model(**data, mode="loss")).backward(inputs=list(kept_tensors(kept)))
    handle.remove()
    gradient = kept[0][0].grad  # (4, C, 12, 12), stride 8
    assert gradient.abs().sum() > 0
    for image, (height, width) in zip(gradient, SIZES, strict=True):
        # The centre of cell i is at 8·i + 4: inside for i < (size − 4) / 8.
        rows, columns = -(-(height - 4) // 8), -(-(width - 4) // 8)
        assert (image[:, rows:] == 0).all() and (image[:, :, columns:] == 0).all()
        assert (image[:, :rows, :columns] != 0).any()


def kept_tensors(kept):
    """The first level of every recorded neck output."""
    return [levels[0] for levels in kept if not isinstance(levels[0], bool)]


def test_the_padding_that_the_host_counts_as_image_does_not_count(entry):
    # mmdet's valid flags reach to an image's own padded size (70×74 → 96×96); ours end with the image.
    model = build(entry).train()
    data = model.data_preprocessor(raw_batch(SMALL, SIZES), True)
    with watched() as steps:
        model(**data, mode="loss")
    recording, batch = steps[0].recordings["student"], model._batch(**data)
    assignment = model.distiller.terms["soft_targets"].scores.heads.student.assignment(recording, batch)
    assert (assignment.positive <= assignment.valid).all() and assignment.positive.any()
    # Anchors are at multiples of the stride 8, 16, 32: of 70 rows are 9, 5, 3 in the image; of 74 columns 10, 5, 3.
    assert assignment.valid[3].sum() == 9 * 10 + 5 * 5 + 3 * 3
    assert assignment.assigned[3].sum() == 12 * 12 + 6 * 6 + 3 * 3
    assert assignment.weights("vlr", batch)[~assignment.valid].sum() == 0


@pytest.mark.parametrize(
    "boxes",
    [pytest.param([[], [], [], []], id="none"), pytest.param([[], BOXES[1], [], BOXES[3]], id="some")],
)
def test_images_without_objects_give_finite_losses_with_a_live_graph(entry, boxes):
    model = build(entry)
    found = losses(model, raw_batch(boxes))
    sum(value for key, value in found.items() if "loss" in key).backward()
    for name in TERM_NAMES:
        value = found[f"distill.{name}.loss"]
        assert torch.isfinite(value) and value.requires_grad, name
        if not any(boxes) and name in ("ld_main", "ld_vlr", "class_main", "feature_imitation"):
            assert value == 0, name
    assert found["distill.layer3.loss"] > 0  # needs no objects
    for name, gradient in gradients(model).items():
        assert torch.isfinite(gradient).all(), name
    assert {name for name, _ in model.distiller.named_parameters(prefix="distiller")} <= gradients(model).keys()
    assert not any(model.distiller.dropped.values())


@TERMS.register("TestInfinite")
class Infinite(Term):
    """A third party's term: infinite on its second and third call."""

    calls = 0

    def __init__(self, **settings):
        super().__init__(**settings)
        self.scale = torch.nn.Parameter(torch.ones(()))

    def forward(self, student, teacher, batch):
        self.calls += 1
        value = self.scale * (torch.inf if self.calls in (2, 3) else 1.0)
        return Ratio(value, torch.ones(()))


def test_a_term_that_is_not_finite_is_dropped_and_training_goes_on(
    tmp_path, scenes, teacher_model, teacher_checkpoint, caplog
):
    terms = [dict(type="TestInfinite", name="broken"), dict(type="FeatureImitation", tap="neck[0]")]
    model = distilled(detector(), teacher_model, teacher_checkpoint, terms=terms)
    with caplog.at_level(logging.WARNING, "kdgraft"):
        runner = run(runner_config(model, scenes, tmp_path, iters=4))
    assert history(runner, "distill.broken.loss") == [1, 0, 0, pytest.approx(1, abs=0.1)]
    assert runner.model.distiller.dropped == {"broken": 2, "feature_imitation": 0}
    assert history(runner, "distill.broken.dropped") == [1, 2, 2]
    assert caplog.text.count("broken was not finite or above 1e+30, and was dropped") == 2
    for name in ("loss", "loss_cls", "distill.feature_imitation.loss"):
        values = torch.tensor(history(runner, name))
        assert torch.isfinite(values).all() and (values > 0).all()
    assert all(torch.isfinite(p).all() for p in runner.model.parameters())


def test_an_infinite_teacher_leaves_the_plain_hosts_training(tmp_path, scenes, teacher_model, plain_run):
    teacher = build(teacher_model)
    torch.nn.init.constant_(teacher.bbox_head.gfl_reg.weight, torch.inf)
    torch.save({"state_dict": teacher.state_dict(), "meta": {}}, tmp_path / "inf.pth")
    model = distilled(
        detector(), teacher_model, str(tmp_path / "inf.pth"), terms=[dict(type="LocalizationDistillation")]
    )
    runner = run(runner_config(model, scenes, tmp_path))
    assert runner.model.distiller.dropped == {"localization_distillation": 4}
    assert_same(dict(runner.model.state_dict()), dict(plain_run.runner.model.state_dict()))


def test_amp_trains_and_losses_compute_in_float32(
    tmp_path, scenes, teacher_model, teacher_checkpoint, distilled_run, monkeypatch
):
    # mmengine's wrapper refuses to start without a GPU; what it then does works on a CPU too.
    monkeypatch.setattr("mmengine.optim.optimizer.amp_optimizer_wrapper.is_cuda_available", lambda: True)
    model = distilled(detector(), teacher_model, teacher_checkpoint, **EVERY_TERM)
    wrapper = dict(type="AmpOptimWrapper", dtype="bfloat16", optimizer=dict(type="SGD", lr=0.01, momentum=0.9))
    runner = run(runner_config(model, scenes, tmp_path, iters=2, optim_wrapper=wrapper))
    for name in TERM_NAMES:
        key = f"distill.{name}.loss"
        # bfloat16 has 8 bits: features agree to a few per cent in the first step; a loss in bfloat16 would do worse.
        assert history(runner, key)[0] == pytest.approx(history(distilled_run.runner, key)[0], rel=0.1), name
        assert all(value > 0 for value in history(runner, key))
    assert not any(runner.model.distiller.dropped.values())
    with torch.autocast("cpu", torch.bfloat16):
        found = losses(build(model), raw_batch())
    assert {value.dtype for key, value in found.items() if key.startswith("distill.")} == {torch.float32}


def test_gradient_checkpointing_changes_nothing(teacher_model, teacher_checkpoint):
    taps = ["backbone.layer3", "backbone.layer2.0.conv1", "neck[*]"]
    terms = [dict(type="FeatureImitation", tap=tap, name=f"t{i}") for i, tap in enumerate(taps)]
    results = []
    for checkpointed in (False, True):
        student = detector(frozen_bn=True)
        student["backbone"]["with_cp"] = checkpointed
        model = build(distilled(student, teacher_model, teacher_checkpoint, terms=terms[:1] + terms[2:]))
        found = losses(model, raw_batch())
        sum(value for key, value in found.items() if "loss" in key).backward()
        results.append(({k: v.detach() for k, v in found.items()}, gradients(model)))
    assert results[0][0]["distill.t0.loss"] > 0
    assert_same(results[0][0], results[1][0])
    assert results[0][1].keys() == results[1][1].keys()
    for name, gradient in results[0][1].items():
        torch.testing.assert_close(gradient, results[1][1][name], rtol=1e-5, atol=1e-8)


def test_a_tap_inside_a_checkpointed_block_says_what_to_do(teacher_model, teacher_checkpoint):
    # mmdet checkpoints reentrantly wherever gradients flow, and so in the dry run of the student too.
    student = detector()
    student["backbone"]["with_cp"] = True
    terms = [dict(type="FeatureImitation", tap="backbone.layer2.1.conv1")]
    with pytest.raises(WiringError, match="tap the checkpointed block itself"):
        build(distilled(student, teacher_model, teacher_checkpoint, terms=terms))


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (dict(student="GLF"), r"student: no model of mmdet is called 'GLF'; did you mean 'GFL'"),
        (dict(student=["GFL"]), r"student must be the type of a model or a whole model, got \['GFL'\]"),
        (dict(weight=None), "student: a GFL takes no argument 'weight'"),
        (dict(recpe="ld"), "student: a GFL takes no argument 'recpe'; did you mean 'recipe'"),
        (dict(dry_run_size=10**30), "DistilledDetector: dry_run_size must be at most 8192, got 1000"),
        (dict(teacher=dict(config=dict(type=None), checkpoint="a.pth")), "teacher: the type of a model must be a name"),
        (dict(teacher=dict(config=dict(type="GLF"), checkpoint="a.pth")), "teacher: no model of mmdet is called 'GLF'"),
    ],
)
def test_what_is_no_model_or_no_argument_of_it_is_said(teacher_model, teacher_checkpoint, changed, said):
    entry = distilled(detector(), teacher_model, teacher_checkpoint, terms=["SoftTargets"])
    with pytest.raises(DistillError, match=said):
        build({**entry, **changed})


@pytest.mark.parametrize("checkpoint", [["teacher.pth"], {"path": "teacher.pth"}, 1])
def test_a_checkpoint_that_is_no_path_is_refused(teacher_model, checkpoint):
    with pytest.raises(DistillError, match="teacher checkpoint must be the path of a file, got"):
        build(distilled(detector(), teacher_model, checkpoint, terms=["SoftTargets"]))
