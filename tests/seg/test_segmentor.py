"""DistilledSegmentor in the real host: without terms it is the plain host; with terms the student starts as the plain one."""

from __future__ import annotations

import copy
import random

import numpy as np
import pytest
import torch
from mmengine.config import ConfigDict
from mmengine.optim import OptimWrapper
from mmseg.models import EncoderDecoder
from mmseg.registry import MODELS

from support.mm import history, run, weights
from support.seg import (
    EVERY_TERM,
    FAMILIES,
    TERM_NAMES,
    batch,
    build,
    config,
    distilled,
    losses_of,
    save_teacher,
    segmentor,
    total,
)
from support.tensors import assert_same, distillation, gradients, random_states


def test_without_terms_a_run_is_the_plain_hosts_bit_for_bit(tmp_path, scenes, plain_run):
    student = segmentor()
    runner = run(config(dict(student, type="DistilledSegmentor", student=student["type"]), scenes, tmp_path))
    assert runner.model.distiller is None
    assert_same(weights(runner), weights(plain_run.runner))
    logged = {key.removeprefix("train/") for key in runner.message_hub.log_scalars if "time" not in key}
    assert logged == {
        key.removeprefix("train/") for key in plain_run.runner.message_hub.log_scalars if "time" not in key
    }
    for name in ("loss", "decode.loss_ce", "decode.acc_seg", "aux.loss_ce"):
        assert history(runner, name) == history(plain_run.runner, name)
    assert len(history(runner, "loss")) == 4


@pytest.mark.parametrize("family", FAMILIES)
def test_without_terms_losses_and_gradients_of_one_step_are_the_plain_hosts(family):
    student = segmentor(family)
    found = []
    for model in (student, dict(type="DistilledSegmentor", student=student)):
        built = build(model)
        initial = copy.deepcopy(dict(built.state_dict()))
        losses = losses_of(built, *batch())
        total(losses).backward()
        found.append((initial, {k: v.detach() for k, v in losses.items()}, gradients(built)))
    for plain, ours in zip(*found, strict=True):
        assert_same(plain, ours)


@pytest.mark.parametrize("family", FAMILIES)
def test_any_terms_leave_the_seeds_weights_and_random_stream_alone(family, teacher):
    student = segmentor(family)
    states, built = [], []
    for model in (student, distilled(student, teacher, **EVERY_TERM)):
        torch.manual_seed(11), np.random.seed(11), random.seed(11)
        made = MODELS.build(ConfigDict(model))
        after_build = random_states()
        made.init_weights()
        states.append([*after_build, *random_states()])
        built.append(dict(made.state_dict()))
    assert_same(*built)
    assert states[0] == states[1]


def test_the_distiller_takes_no_part_in_the_hosts_initialisation(teacher):
    # An init_cfg of the whole segmentor reaches every convolution below it, and draws for each.
    student = segmentor(init_cfg=dict(type="Kaiming", layer="Conv2d"))
    found = []
    for model in (student, distilled(student, teacher, **EVERY_TERM)):
        torch.manual_seed(2)
        made = MODELS.build(ConfigDict(model))
        own = {} if model is student else {n: p.detach().clone() for n, p in made.distiller.named_parameters()}
        torch.manual_seed(2)
        made.init_weights()
        found.append((dict(made.state_dict()), torch.random.get_rng_state()))
        if own:
            assert_same(own, {name: p.detach() for name, p in made.distiller.named_parameters()})
    assert own
    assert_same(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


@pytest.mark.parametrize("family", ["FCN", "BiSeNetV2", "UPerNet"])
def test_a_distilled_step_leaves_the_random_stream_and_the_hosts_losses_alone(family, teacher):
    # Dropout in the student would draw other numbers if the teacher, the critic or the memory drew any before it. Auxiliary
    # heads are among the host's losses.
    results = []
    for model in (segmentor(family), distilled(segmentor(family), teacher, **EVERY_TERM)):
        built = build(model)
        losses = losses_of(built, *batch(), seed=1)
        results.append((losses, torch.random.get_rng_state(), dict(built.state_dict())))
    plain, ours = results
    assert any("aux" in name for name in plain[0]) == (family != "UPerNet")
    for name, value in plain[0].items():
        assert torch.equal(value, ours[0][name]), name
    assert {name for name in ours[0] if not name.startswith("distill.")} == set(plain[0])
    assert torch.equal(plain[1], ours[1])
    assert_same(plain[2], ours[2])  # batch norm's running statistics moved alike


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_trains_a_step_with_every_term(family, teacher):
    model = build(distilled(segmentor(family), teacher, **EVERY_TERM)).train()
    plain = build(segmentor(family))
    assert isinstance(model, EncoderDecoder) and isinstance(model, MODELS.get("DistilledSegmentor"))
    losses = losses_of(model, *batch())
    for name in TERM_NAMES:
        value = losses[f"distill.{name}.loss"]
        assert torch.isfinite(value) and value.dtype == torch.float32, name
        assert name == "adversarial_mask" or value > 0, name
        assert f"distill.{name}.dropped" not in losses
    total(losses).backward()
    found = gradients(model)
    assert found.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    assert all(torch.isfinite(gradient).all() for gradient in found.values())
    assert [name for name in found if not name.startswith("distiller.")] == [n for n, _ in plain.named_parameters()]
    for name, gradient in found.items():
        if name.startswith("distiller."):
            assert gradient.abs().sum() > 0, name

    before = copy.deepcopy(dict(model.state_dict()))
    wrapper = OptimWrapper(torch.optim.AdamW(model.parameters(), 1e-3))
    inputs, samples = batch(seed=1)
    images = [(image * 50 + 120).clamp(0, 255).byte() for image in inputs]
    logged = model.train_step(dict(inputs=images, data_samples=samples), wrapper)
    assert torch.isfinite(logged["loss"])
    after = model.state_dict()
    moved = [name for name, p in plain.named_parameters() if not torch.equal(before[name], after[name])]
    # A residual branch starts at 0, and so does the gradient of what it multiplies.
    assert len(moved) > 0.7 * len(list(plain.parameters()))


@pytest.mark.parametrize(
    ("student", "other"), [("SegFormer", "UPerNet"), ("BiSeNetV2", "DeepLabV3+"), ("FCN", "SegFormer")]
)
def test_teachers_of_another_family_reach_the_students_trunk(tmp_path, student, other):
    entry = distilled(segmentor(student), save_teacher(tmp_path / "t.pth", segmentor(other, width=8)), **EVERY_TERM)
    model = build(entry)
    losses = losses_of(model, *batch())
    distillation(losses).backward()
    # The whole backbone learns from the distillation alone.
    for name, parameter in model.backbone.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
    assert sum(float(p.grad.abs().sum()) for p in model.backbone.parameters()) > 0
    # Auxiliary heads learn nothing from it: they are left untouched.
    auxiliary = [p for name, p in model.named_parameters() if name.startswith("auxiliary_head")]
    assert not auxiliary or all(p.grad is None for p in auxiliary)


def test_every_term_trains_through_the_runner(distilled_run):
    runner = distilled_run.runner
    logged = {key.removeprefix("train/") for key in runner.message_hub.log_scalars}
    assert {f"distill.{name}.loss" for name in TERM_NAMES} <= logged
    assert {f"distill.adversarial_mask.{name}" for name in ("critic", "gap", "penalty")} <= logged
    assert not any(key.endswith((".dropped", ".skipped")) for key in logged)
    # What the host minimises is what it logs: its own losses and ours, and none of the critic's figures.
    parts = [history(runner, name) for name in logged if "loss" in name and name != "loss"]
    np.testing.assert_allclose(np.sum(parts, 0), history(runner, "loss"), rtol=1e-5)
    state = runner.optim_wrapper.optimizer.state
    for name, parameter in runner.model.named_parameters():
        assert torch.isfinite(state[parameter]["exp_avg"]).all(), name
        if name.startswith("distiller."):
            assert state[parameter]["exp_avg"].abs().sum() > 0, name


def test_a_student_given_as_a_whole_model_is_the_same_student(teacher):
    whole = dict(type="DistilledSegmentor", student=segmentor(), teacher=teacher, **EVERY_TERM)
    a, b = build(whole), build(distilled(segmentor(), teacher, **EVERY_TERM))
    assert type(a).__name__ == type(b).__name__ == "DistilledEncoderDecoder"
    found = losses_of(a, *batch()), losses_of(b, *batch())
    assert_same(*({k: v.detach() for k, v in losses.items()} for losses in found))


def test_a_schedule_follows_the_runners_iterations(tmp_path, scenes, teacher):
    terms = [
        dict(type="SoftTargets", name="stops", schedule=dict(type="Stop", end=2)),
        dict(
            type="AdversarialMask",
            name="late",
            critic=dict(channels=(4, 4)),
            schedule=dict(type="WarmUp", begin=2, end=4),
        ),
    ]
    runner = run(config(distilled(segmentor(), teacher, terms=terms), scenes, tmp_path))
    assert [value > 0 for value in history(runner, "distill.stops.loss")] == [True, True, False, False]
    assert [value != 0 for value in history(runner, "distill.late.loss")] == [False, False, False, True]
    # A critic rests while its term does.
    assert len(history(runner, "distill.late.gap")) == 1


def test_validation_and_prediction_run_the_student_alone(teacher):
    model, plain = build(distilled(segmentor(), teacher, **EVERY_TERM)).eval(), build(segmentor()).eval()
    inputs, samples = batch()
    critic = model.distiller.terms["adversarial_mask"].opponent.state()
    model.distiller.teacher.model.forward = None  # whoever runs it fails
    with torch.no_grad():
        found = [m(inputs, copy.deepcopy(samples), mode="predict") for m in (plain, model)]
        losses = model(inputs, samples, mode="loss")
    for a, b in zip(*found, strict=True):
        assert torch.equal(a.seg_logits.data, b.seg_logits.data)
    assert not any(name.startswith("distill.") for name in losses)
    after = model.distiller.terms["adversarial_mask"].opponent.state()
    assert_same(dict(critic["network"]), dict(after["network"]))


def test_accumulated_gradients_keep_the_ratio_of_distillation_to_host(teacher):
    # mmengine steps with the mean of the micro-batches' gradients: of the host's losses and of ours alike; the critic steps
    # on each of them.
    settings = dict(recipe=EVERY_TERM["recipe"])
    entry = distilled(segmentor(frozen_bn=True, dropout=0.0), teacher, **settings)
    halves = [batch(1, seed=seed) for seed in (0, 1)]
    model = build(entry)
    expected = {}
    for half in halves:
        model.zero_grad()
        total(losses_of(model, *half)).backward()
        for name, gradient in gradients(model).items():
            expected[name] = expected.get(name, 0) + gradient / 2
    opponent = model.distiller.terms["adversarial_mask"].opponent

    model = build(entry).train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    wrapper = OptimWrapper(torch.optim.SGD(model.parameters(), lr=1.0), accumulative_counts=2)
    wrapper.initialize_count_status(model, 0, 2)
    for inputs, samples in halves:
        torch.manual_seed(0)
        with wrapper.optim_context(model):
            losses, _ = model.parse_losses(model(inputs.clone(), samples, mode="loss"))
        wrapper.update_params(losses)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(before[name] - parameter.detach(), expected[name], rtol=1e-4, atol=1e-6)
    again = model.distiller.terms["adversarial_mask"].opponent
    assert_same(dict(again.critic.state_dict()), dict(opponent.critic.state_dict()))
    assert {int(state["step"]) for state in again.optimizer.state.values()} == {2}
