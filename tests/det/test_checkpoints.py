"""What a distilled Runner saves: a plain student, with everything beside it that a resumed run needs."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from mmengine.model import ExponentialMovingAverage
from mmengine.runner import Runner
from mmengine.runner.checkpoint import load_state_dict

from kdgraft.errors import DistillError
from kdgraft.sources.teacher import read_checkpoint
from kdgraft_mm.checkpoints import SAFE_TYPES
from kdgraft_mm.state import KEY
from support.det import EVERY_TERM, build, detector, distilled, momentum, predictions, raw_batch, runner_config
from support.mm import history, loadable, needs_resume, run, weights
from support.tensors import assert_same

EVERY_CHECKPOINT = dict(checkpoint=dict(type="CheckpointHook", by_epoch=False, interval=1))


@pytest.fixture(scope="module")
def model(teacher_model, teacher_checkpoint):
    return distilled(detector(), teacher_model, teacher_checkpoint, **EVERY_TERM)


def read(path: Path) -> dict:
    return read_checkpoint(path, safe_types=SAFE_TYPES)


def adapters(runner: Runner) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in runner.model.distiller.terms.state_dict().items()}


def test_the_state_dict_is_the_plain_students_and_loads_both_ways(model):
    plain, grafted = build(detector(), seed=1), build(model, seed=2)
    assert list(grafted.state_dict()) == list(plain.state_dict())
    assert list(grafted.state_dict()._metadata) == list(plain.state_dict()._metadata)
    own = copy.deepcopy(grafted.distiller.terms.state_dict())

    assert grafted.load_state_dict(plain.state_dict(), strict=True) == ([], [])
    assert_same(dict(grafted.state_dict()), dict(plain.state_dict()))
    assert_same(dict(grafted.distiller.terms.state_dict()), dict(own))  # loading a student touches no adapter

    third = build(detector(), seed=3)
    assert third.load_state_dict(grafted.state_dict(), strict=True) == ([], [])
    # mmengine's own loader walks the children itself.
    load_state_dict(build(detector()), grafted.state_dict(), strict=True)
    load_state_dict(grafted, build(detector(), seed=4).state_dict(), strict=True)
    assert_same(dict(grafted.distiller.terms.state_dict()), dict(own))


def test_a_checkpoint_that_lacks_a_students_key_is_still_refused(model):
    state = build(detector()).state_dict()
    del state["backbone.conv1.weight"]
    grafted = build(model)
    with pytest.raises(RuntimeError, match=r"backbone\.conv1\.weight"):
        grafted.load_state_dict(state, strict=True)
    assert grafted.load_state_dict(state, strict=False).missing_keys == ["backbone.conv1.weight"]


def test_a_saved_student_is_a_plain_student_and_tests_alike(tmp_path, scenes, model, distilled_run):
    checkpoint = distilled_run.checkpoint(4)
    saved = read(checkpoint)
    plain = build(detector())
    assert list(saved["state_dict"]) == list(plain.state_dict())
    plain.load_state_dict(saved["state_dict"], strict=True)

    metrics = []
    for name, entry in (("plain", detector()), ("distilled", model)):
        config = runner_config(entry, scenes, tmp_path / name, load_from=loadable(checkpoint))
        metrics.append(Runner.from_cfg(config).test())
    assert metrics[0] == metrics[1] and "coco/bbox_mAP" in metrics[0]
    # The distilled Runner's own loops, without a checkpoint in between.
    assert distilled_run.runner.test() == metrics[0]
    assert distilled_run.runner.val().keys() == metrics[0].keys()
    found = predictions(plain, raw_batch()), predictions(distilled_run.runner.model, raw_batch())
    assert all(torch.equal(a, b) and len(a) for a, b in zip(*found, strict=True))


def test_the_optimizer_has_the_adapters_and_its_state_is_saved(distilled_run):
    saved = read(distilled_run.checkpoint(4))
    parameters = list(distilled_run.runner.model.named_parameters())
    assert any(name.startswith("distiller.terms.") for name, _ in parameters)
    assert len(saved["optimizer"]["state"]) == len(parameters)
    live = saved["message_hub"]["runtime_info"][KEY]
    assert_same(dict(live["terms"]), adapters(distilled_run.runner))


@needs_resume
@pytest.mark.parametrize("second_runner", [False, True])
def test_kill_and_resume_makes_no_difference(tmp_path, scenes, model, distilled_run, second_runner):
    whole = distilled_run.runner
    resumed = Runner.from_cfg(
        runner_config(model, scenes, tmp_path, resume=True, load_from=str(distilled_run.checkpoint(2)))
    )
    if second_runner:  # its message hub is the current one from now on; it is not ours
        other = Runner.from_cfg(runner_config(model, scenes, tmp_path / "other", iters=2))
    resumed.train()
    assert_same(weights(resumed), weights(whole))
    assert_same(adapters(resumed), adapters(whole))
    assert_same(momentum(resumed), momentum(whole))
    assert history(resumed, "loss") == history(whole, "loss")
    if second_runner:
        before = adapters(other)
        other.train()
        assert any(not torch.equal(before[key], value) for key, value in adapters(other).items())
        assert_same(adapters(resumed), adapters(whole))
        saved = read(tmp_path / "other" / "iter_2.pth")["message_hub"]["runtime_info"][KEY]
        assert_same(dict(saved["terms"]), adapters(other))


@needs_resume
def test_a_weight_that_is_set_by_the_gradient_resumes_exactly(tmp_path, scenes, teacher_model, teacher_checkpoint):
    # Stopped after two of the three batches that are measured; the other one is corrected after every two.
    features = dict(type="FeatureImitation", tap="neck[*]", weight=dict(type="auto", share=0.5, batches=3))
    scores = dict(type="SoftTargets", weight=dict(type="auto", batches=1, every=2, band=0.0))
    model = distilled(detector(), teacher_model, teacher_checkpoint, terms=[features, scores])
    whole = run(runner_config(model, scenes, tmp_path / "whole", default_hooks=EVERY_CHECKPOINT))
    assert history(whole, "distill.feature_imitation.share") and all(history(whole, "distill.soft_targets.share"))
    before = tmp_path / "whole" / "iter_2.pth"
    kept = read(before)["message_hub"]["runtime_info"][KEY]["hidden"]
    assert len(kept["feature_imitation"]["auto_weight"]["ratios"]) == 2 and kept["soft_targets"]["auto_weight"]["set"]
    resumed = run(runner_config(model, scenes, tmp_path / "resumed", resume=True, load_from=str(before)))
    for name, term in whole.model.distiller.terms.items():
        assert resumed.model.distiller.terms[name].weight == term.weight != 1
    assert_same(weights(resumed), weights(whole))
    assert_same(adapters(resumed), adapters(whole))


@needs_resume
def test_the_resumed_adapters_are_the_saved_ones(tmp_path, scenes, model, distilled_run):
    # The same checkpoint with its adapters zeroed gives another run: what is resumed is what was saved, not what the seed built.
    saved = torch.load(distilled_run.checkpoint(2), weights_only=False)
    live = saved["message_hub"]["runtime_info"][KEY]["terms"]
    for value in live.values():
        value.zero_()
    zeroed = tmp_path / "zeroed.pth"
    torch.save(saved, zeroed)
    runner = Runner.from_cfg(runner_config(model, scenes, tmp_path, iters=3, resume=True, load_from=str(zeroed)))
    built = adapters(runner)
    runner.train()
    whole = history(distilled_run.runner, "distill.layer3.loss")
    assert history(runner, "distill.layer3.loss")[:2] == whole[:2]  # the log's own history
    assert history(runner, "distill.layer3.loss")[2] != whole[2]
    # FGD's blocks start with a last convolution of zeros.
    drawn = {name: value for name, value in built.items() if value.ndim == 4 and not name.endswith(".add.3.weight")}
    assert all((value != 0).any() for value in drawn.values())
    # SGD's momentum moved them off zero by a little, nowhere near what the seed built.
    moved = adapters(runner)["layer3.adapters.0.project.weight"].abs().mean()
    assert moved < 0.5 * built["layer3.adapters.0.project.weight"].abs().mean()


@needs_resume
def test_a_run_can_be_killed_again_before_its_first_step(tmp_path, scenes, model, distilled_run):
    # What was resumed is still in the hub, so that a checkpoint saved before the first step passes it on.
    runner = Runner.from_cfg(
        runner_config(model, scenes, tmp_path, iters=2, resume=True, load_from=str(distilled_run.checkpoint(2)))
    )
    runner.train()  # of 2 iterations 2 are done: it resumes and takes no step
    runner.save_checkpoint(str(tmp_path), "again.pth", by_epoch=False)
    again = read(tmp_path / "again.pth")["message_hub"]["runtime_info"][KEY]["terms"]
    assert_same(dict(again), dict(read(distilled_run.checkpoint(2))["message_hub"]["runtime_info"][KEY]["terms"]))


@needs_resume
def test_resuming_with_other_terms_is_refused(tmp_path, scenes, teacher_model, teacher_checkpoint, distilled_run):
    # As many parameters as in the run that is resumed, so that it is not torch's optimizer that complains.
    renamed = [{**term, "name": f"other_{place}"} for place, term in enumerate(EVERY_TERM["terms"])]
    other = distilled(detector(), teacher_model, teacher_checkpoint, recipe="ld", terms=renamed)
    config = runner_config(other, scenes, tmp_path, resume=True, load_from=str(distilled_run.checkpoint(2)))
    with pytest.raises(DistillError, match="made with other distillation terms"):
        Runner.from_cfg(config).train()


@pytest.mark.parametrize("update_buffers", [False, True])
def test_ema_averages_the_student_alone(tmp_path, scenes, model, update_buffers):
    hook = dict(type="EMAHook", momentum=0.5, update_buffers=update_buffers)
    settings = dict(custom_hooks=[hook], train_cfg=dict(type="IterBasedTrainLoop", max_iters=4, val_interval=2))
    averaged = run(runner_config(model, scenes, tmp_path / "a", **settings))
    ema = next(hook for hook in averaged.hooks if type(hook).__name__ == "EMAHook").ema_model
    assert isinstance(ema, ExponentialMovingAverage)
    assert ema.module.distiller.teacher is averaged.model.distiller.teacher  # shared, never copied

    saved = read(tmp_path / "a" / "iter_4.pth")
    plain = build(detector())
    plain.load_state_dict(saved["state_dict"], strict=True)
    assert {key.removeprefix("module.") for key in saved["ema_state_dict"]} == {*plain.state_dict(), "steps"}

    # The same run without the hook trains alike, and its checkpoints average to the same student by hand.
    whole = run(
        runner_config(model, scenes, tmp_path / "b", train_cfg=settings["train_cfg"], default_hooks=EVERY_CHECKPOINT)
    )
    assert_same(weights(averaged), weights(whole))
    assert_same(adapters(averaged), adapters(whole))
    steps = [read(tmp_path / "b" / f"iter_{i}.pth")["state_dict"] for i in (1, 2, 3, 4)]
    name = "bbox_head.gfl_reg.weight"
    mean = steps[0][name]
    for step in steps[1:]:
        mean = 0.5 * mean + 0.5 * step[name]
    torch.testing.assert_close(saved["state_dict"][name], mean)
    # The adapters in the checkpoint are the live ones, not averaged ones.
    assert_same(dict(saved["message_hub"]["runtime_info"][KEY]["terms"]), adapters(averaged))


@needs_resume
@pytest.mark.parametrize("update_buffers", [False, True])
def test_ema_runs_resume_exactly(tmp_path, scenes, model, update_buffers):
    settings = dict(custom_hooks=[dict(type="EMAHook", momentum=0.5, update_buffers=update_buffers)])
    whole = run(runner_config(model, scenes, tmp_path / "whole", **settings))
    resumed = run(
        runner_config(
            model,
            scenes,
            tmp_path / "resumed",
            resume=True,
            load_from=str(tmp_path / "whole" / "iter_2.pth"),
            **settings,
        )
    )
    assert_same(weights(resumed), weights(whole))
    assert_same(adapters(resumed), adapters(whole))
    assert_same(momentum(resumed), momentum(whole))
    last = [read(tmp_path / name / "iter_4.pth")["state_dict"] for name in ("whole", "resumed")]
    assert_same(dict(last[0]), dict(last[1]))


def test_the_best_checkpoint_is_a_plain_student_too(tmp_path, scenes, model):
    hooks = dict(checkpoint=dict(type="CheckpointHook", by_epoch=False, interval=1, save_best="coco/bbox_mAP"))
    cycle = dict(type="IterBasedTrainLoop", max_iters=2, val_interval=1)
    run(runner_config(model, scenes, tmp_path, iters=2, default_hooks=hooks, train_cfg=cycle))
    (best,) = tmp_path.glob("best_*.pth")
    state = dict(read(best)["state_dict"])
    assert_same(state, dict(read(tmp_path / best.name[best.name.index("iter_") :])["state_dict"]))
    plain = build(detector())
    plain.load_state_dict(state, strict=True)
    assert_same(state, dict(plain.state_dict()))
