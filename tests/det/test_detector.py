"""DistilledDetector on the real Runner: without terms it is the plain host; with terms the student starts as the plain one."""

from __future__ import annotations

import copy
import random

import numpy as np
import pytest
import torch
from mmdet.models import GFL
from mmdet.registry import MODELS
from mmengine.config import ConfigDict
from mmengine.optim import OptimWrapper
from mmengine.runner import Runner

from support.det import (
    EVERY_TERM,
    TERM_NAMES,
    build,
    detector,
    distilled,
    losses,
    momentum,
    part,
    raw_batch,
    runner_config,
)
from support.mm import history, run, weights
from support.tensors import assert_same, gradients, random_states


def test_without_terms_a_run_is_the_plain_hosts_bit_for_bit(tmp_path, scenes, plain_run):
    student = detector()
    model = dict(student, type="DistilledDetector", student=student["type"])
    runner = run(runner_config(model, scenes, tmp_path))

    assert runner.model.distiller is None
    assert_same(weights(runner), weights(plain_run.runner))
    assert_same(momentum(runner), momentum(plain_run.runner))
    for name in ("loss", "loss_cls", "loss_bbox", "loss_dfl", "grad_norm"):
        if f"train/{name}" in plain_run.runner.message_hub.log_scalars:
            assert history(runner, name) == history(plain_run.runner, name)
    logged = {key for key in runner.message_hub.log_scalars if "time" not in key}
    assert logged == {key for key in plain_run.runner.message_hub.log_scalars if "time" not in key}


def test_without_terms_losses_and_gradients_of_one_step_are_the_plain_hosts():
    student = detector()
    found = []
    for model in (student, dict(type="DistilledDetector", student=student)):
        built = build(model)
        result = losses(built, raw_batch())
        sum(result.values()).backward()
        found.append((result, gradients(built)))
    assert found[0][0].keys() == found[1][0].keys()
    for a, b in zip(found[0], found[1], strict=True):
        assert_same({k: v.detach() for k, v in a.items()}, {k: v.detach() for k, v in b.items()})


def test_the_distiller_takes_no_part_in_the_hosts_initialisation(teacher_model, teacher_checkpoint):
    # An init_cfg of the whole detector reaches every convolution below it, and draws for each.
    student = detector(init_cfg=dict(type="Kaiming", layer="Conv2d"))
    found = []
    for model in (student, distilled(student, teacher_model, teacher_checkpoint, **EVERY_TERM)):
        made = MODELS.build(ConfigDict(model))
        adapters = {} if model is student else dict(made.distiller.named_parameters())
        before = {name: p.detach().clone() for name, p in adapters.items()}
        torch.manual_seed(2)
        made.init_weights()
        found.append((dict(made.state_dict()), torch.random.get_rng_state()))
        assert_same(before, {name: p.detach() for name, p in adapters.items()})
    assert before
    assert_same(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


@pytest.mark.parametrize("backbone", ["ResNet", "SwinTransformer"])
def test_any_terms_leave_the_seeds_weights_and_random_stream_alone(backbone, teacher_model, teacher_checkpoint):
    student = detector(backbone=backbone, width=8)
    terms = EVERY_TERM if backbone == "ResNet" else dict(recipe="ld", terms=EVERY_TERM["terms"][:1])
    states, built = [], []
    for model in (student, distilled(student, teacher_model, teacher_checkpoint, **terms)):
        torch.manual_seed(11), np.random.seed(11), random.seed(11)
        made = MODELS.build(model)
        after_build = random_states()
        made.init_weights()
        states.append([*after_build, *random_states()])
        built.append(made.state_dict())
    assert_same(dict(built[0]), dict(built[1]))
    assert states[0] == states[1]


def test_a_distilled_step_leaves_the_random_stream_and_the_hosts_losses_alone(teacher_model, teacher_checkpoint):
    # Dropout in the student would draw other numbers if the teacher drew any.
    student = detector()
    results = []
    for model in (student, distilled(student, teacher_model, teacher_checkpoint, **EVERY_TERM)):
        built = build(model)
        torch.manual_seed(1)
        result = losses(built, raw_batch())
        results.append((result, torch.random.get_rng_state(), dict(built.state_dict())))
    for name, value in results[0][0].items():
        assert torch.equal(value, results[1][0][name]), name
    assert torch.equal(results[0][1], results[1][1])
    assert_same(results[0][2], results[1][2])  # batch norm's running statistics moved alike


def test_raw_values_and_weights_are_logged_apart(distilled_run):
    scalars = distilled_run.runner.message_hub.log_scalars
    for name in TERM_NAMES:
        loss, raw, weight = (scalars[f"train/distill.{name}.{key}"].data[0] for key in ("loss", "raw", "weight"))
        assert len(loss) == len(raw) == len(weight) == 4
        np.testing.assert_allclose(raw * weight, loss, rtol=1e-5)
    term = distilled_run.runner.model.distiller.terms["class_main"]
    assert set(scalars["train/distill.class_main.weight"].data[0]) == {term.weight} == {0.125}


def test_the_log_says_once_what_is_distilled(tmp_path, scenes, teacher_model, teacher_checkpoint):
    model = distilled(detector(), teacher_model, teacher_checkpoint, recipe="ld")
    run(runner_config(model, scenes, tmp_path, iters=2, log_level="INFO"))
    (log,) = tmp_path.rglob("*.log")
    (line,) = (line for line in log.read_text().splitlines() if "distilling" in line)
    assert f"distilling GFL ({teacher_checkpoint}) into GFL with ld: ld_main, ld_vlr, class_main" in line


def test_every_term_trains_through_the_runner(distilled_run):
    runner = distilled_run.runner
    logged = {key.removeprefix("train/") for key in runner.message_hub.log_scalars}
    assert {f"distill.{name}.loss" for name in TERM_NAMES} <= logged
    assert not any(key.endswith(".dropped") for key in logged)
    for name in TERM_NAMES:
        assert all(value > 0 for value in history(runner, f"distill.{name}.loss"))
    # What the host sums is what it logs: its own losses and ours.
    parts = [history(runner, name) for name in logged if name.startswith("loss_") or name.endswith(".loss")]
    np.testing.assert_allclose(np.sum(parts, 0), history(runner, "loss"), rtol=1e-5)
    found = momentum(runner)
    for name, parameter in runner.model.named_parameters():
        if parameter.requires_grad:
            assert torch.isfinite(found[name]).all(), name
            if name.startswith("distiller."):
                assert found[name].abs().sum() > 0, name


def test_the_built_model_is_an_instance_of_the_students_class(teacher_model, teacher_checkpoint):
    model = build(distilled(detector(), teacher_model, teacher_checkpoint, **EVERY_TERM))
    assert isinstance(model, GFL)
    assert type(model).__name__ == "DistilledGFL"
    assert isinstance(model, MODELS.get("DistilledDetector"))


def test_a_student_given_as_a_whole_model_is_the_same_student(teacher_model, teacher_checkpoint):
    student = detector()
    whole = dict(
        type="DistilledDetector",
        student=student,
        teacher=dict(config=teacher_model, checkpoint=teacher_checkpoint),
        **EVERY_TERM,
    )
    a, b = build(whole), build(distilled(student, teacher_model, teacher_checkpoint, **EVERY_TERM))
    found = losses(a, raw_batch()), losses(b, raw_batch())
    assert_same({k: v.detach() for k, v in found[0].items()}, {k: v.detach() for k, v in found[1].items()})


def test_a_schedule_follows_the_runners_iterations(tmp_path, scenes, teacher_model, teacher_checkpoint):
    terms = [
        dict(type="FeatureImitation", tap="neck[0]", name="stops", schedule=dict(type="Stop", end=2)),
        dict(type="FeatureImitation", tap="neck[0]", name="warms", schedule=dict(type="WarmUp", end=2)),
        dict(type="FeatureImitation", tap="neck[0]", name="late", schedule=dict(type="WarmUp", begin=50, end=60)),
    ]
    model = distilled(detector(), teacher_model, teacher_checkpoint, terms=terms)
    # Another Runner that has trained, and a model built outside of any Runner, must not confuse the count.
    runner = run(runner_config(model, scenes, tmp_path, iters=4))
    assert [value > 0 for value in history(runner, "distill.stops.loss")] == [True, True, False, False]
    assert [value > 0 for value in history(runner, "distill.warms.loss")] == [False, True, True, True]
    assert history(runner, "distill.late.loss") == [0, 0, 0, 0]
    # A term that is not active keeps its parameters in the graph, with a gradient of 0.
    late = {name: value for name, value in momentum(runner).items() if ".late." in name}
    assert late and all((value == 0).all() for value in late.values())


def test_a_model_built_outside_a_runner_counts_with_the_runner_that_trains_it(
    tmp_path, scenes, plain_run, teacher_model, teacher_checkpoint
):
    # plain_run's hub stands at iteration 4 when this model is built; that is not this model's count.
    terms = [dict(type="FeatureImitation", tap="neck[0]", schedule=dict(type="Stop", end=1))]
    model = build(distilled(detector(), teacher_model, teacher_checkpoint, terms=terms))
    config = runner_config(detector(), scenes, tmp_path, iters=2)
    kept = ("train_dataloader", "train_cfg", "optim_wrapper", "default_hooks", "log_processor", "experiment_name")
    runner = Runner(model, str(tmp_path), default_scope="mmdet", **{key: config[key] for key in kept})
    runner.train()
    assert [value > 0 for value in history(runner, "distill.feature_imitation.loss")] == [True, False]


def test_accumulated_gradients_keep_the_ratio_of_distillation_to_host(teacher_model, teacher_checkpoint):
    # mmengine steps with the mean of the micro-batches' gradients: of the host's losses and of ours alike.
    entry = distilled(detector(frozen_bn=True), teacher_model, teacher_checkpoint, **EVERY_TERM)
    halves = [part(raw_batch(), slice(0, 2)), part(raw_batch(), slice(2, 4))]

    model = build(entry)
    expected: dict[str, torch.Tensor] = {}
    for half in halves:
        model.zero_grad()
        found = losses(model, half)
        sum(value for name, value in found.items() if "loss" in name).backward()
        for name, gradient in gradients(model).items():
            expected[name] = expected.get(name, 0) + gradient / 2

    model = build(entry).train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    wrapper = OptimWrapper(torch.optim.SGD(model.parameters(), lr=1.0), accumulative_counts=2)
    wrapper.initialize_count_status(model, 0, 2)
    for half in halves:
        model.train_step(copy.deepcopy(half), wrapper)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(before[name] - parameter.detach(), expected[name], rtol=1e-4, atol=1e-6)
