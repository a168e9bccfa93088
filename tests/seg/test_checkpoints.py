"""What a distilled Runner saves: a plain student, with the critic, the memory and the adapters beside it for a resumed run."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.runner import Runner
from mmengine.runner.checkpoint import load_state_dict
from mmseg.apis import inference_model, init_model

from kdgraft.errors import DistillError
from kdgraft.sources.teacher import read_checkpoint
from kdgraft_mm.checkpoints import SAFE_TYPES, export_student
from kdgraft_mm.state import KEY
from support.mm import history, loadable, needs_resume, run, weights
from support.seg import CLASSES, EVERY_TERM, batch, build, config, distilled, losses_of, save_teacher, segmentor, total
from support.tensors import assert_same


@pytest.fixture(scope="module")
def model(teacher):
    return distilled(segmentor(dropout=0.0), teacher, **EVERY_TERM)


def read(path: Path) -> dict:
    return read_checkpoint(path, safe_types=SAFE_TYPES)


def flat(value, prefix=""):
    """Every tensor and number of a nested state by its path."""
    if isinstance(value, dict):
        return {name: v for key, entry in value.items() for name, v in flat(entry, f"{prefix}/{key}").items()}
    if isinstance(value, (list, tuple)):
        return {name: v for i, entry in enumerate(value) for name, v in flat(entry, f"{prefix}/{i}").items()}
    return {} if value is None else {prefix: value}


def live(runner: Runner) -> dict:
    """All that a distiller needs to go on: adapters, memory, critic, its optimizer, random states, counters."""
    return flat(copy.deepcopy(runner.model.distiller.live_state()))


def moments(runner: Runner) -> dict[str, torch.Tensor]:
    state = runner.optim_wrapper.optimizer.state
    return {name: state[p]["exp_avg_sq"] for name, p in runner.model.named_parameters() if p in state}


def resumed(entry, scenes, work_dir, checkpoint, **settings) -> Runner:
    return Runner.from_cfg(config(entry, scenes, work_dir, resume=True, load_from=str(checkpoint), **settings))


def test_the_state_dict_is_the_plain_students_and_loads_both_ways(model):
    plain, grafted = build(segmentor(dropout=0.0), seed=1), build(model, seed=2)
    assert list(grafted.state_dict()) == list(plain.state_dict())
    assert list(grafted.state_dict()._metadata) == list(plain.state_dict()._metadata)
    own = copy.deepcopy(dict(grafted.distiller.terms.state_dict()))
    assert grafted.load_state_dict(plain.state_dict(), strict=True) == ([], [])
    assert_same(dict(grafted.state_dict()), dict(plain.state_dict()))
    assert build(segmentor(), seed=3).load_state_dict(grafted.state_dict(), strict=True) == ([], [])
    # mmengine's own loader walks the children itself.
    load_state_dict(build(segmentor()), grafted.state_dict(), strict=True)
    load_state_dict(grafted, build(segmentor(), seed=4).state_dict(), strict=True)
    assert_same(dict(grafted.distiller.terms.state_dict()), own)  # loading a student touches no adapter and no memory


def test_a_checkpoint_that_lacks_a_students_key_is_still_refused(model):
    state = build(segmentor()).state_dict()
    del state["decode_head.conv_seg.weight"]
    with pytest.raises(RuntimeError, match=r"decode_head\.conv_seg\.weight"):
        build(model).load_state_dict(state, strict=True)


def test_a_saved_student_is_a_plain_student_with_everything_else_beside_it(distilled_run):
    runner = distilled_run.runner
    saved = read(distilled_run.checkpoint(4))
    assert list(saved["state_dict"]) == list(build(segmentor()).state_dict())
    build(segmentor()).load_state_dict(saved["state_dict"], strict=True)
    beside = saved["message_hub"]["runtime_info"][KEY]
    assert_same(flat(beside), live(runner))
    hidden = beside["hidden"]
    assert set(hidden) == {"adversarial_mask", "cross_image_relations", "masked_generation"}
    assert set(hidden["adversarial_mask"]["critic"]) == {"network", "optimizer", "random", "skipped"}
    assert int(beside["terms"]["cross_image_relations.seen"].sum()) > 0
    # The student's optimizer has the adapters and nothing of the critic.
    assert len(saved["optimizer"]["state"]) == len(list(runner.model.parameters()))


@needs_resume
@pytest.mark.parametrize("second_runner", [False, True])
def test_kill_and_resume_makes_no_difference(tmp_path, scenes, model, distilled_run, second_runner):
    whole = distilled_run.runner
    again = resumed(model, scenes, tmp_path, distilled_run.checkpoint(2))
    if second_runner:  # its message hub is the current one from now on; it is not ours
        Runner.from_cfg(config(model, scenes, tmp_path / "other", iterations=2))
    again.train()
    assert_same(weights(again), weights(whole))
    assert_same(live(again), live(whole))
    assert_same(moments(again), moments(whole))
    assert history(again, "loss") == history(whole, "loss")
    assert history(again, "distill.adversarial_mask.gap") == history(whole, "distill.adversarial_mask.gap")


@needs_resume
def test_resuming_with_another_critic_or_other_terms_is_refused(tmp_path, scenes, teacher, distilled_run):
    other = copy.deepcopy(EVERY_TERM)
    other["recipe"]["critic"]["critic"]["channels"] = (8, 8)
    entry = distilled(segmentor(dropout=0.0), teacher, **other)
    with pytest.raises(DistillError, match="holds another critic") as caught:
        resumed(entry, scenes, tmp_path / "critic", distilled_run.checkpoint(2)).train()
    assert "\n" not in str(caught.value)
    # As many parameters as in the run that is resumed, so that it is not torch's optimizer that complains.
    renamed = [{**term, "name": f"other_{place}"} for place, term in enumerate(EVERY_TERM["terms"])]
    entry = distilled(segmentor(dropout=0.0), teacher, **{**EVERY_TERM, "terms": renamed})
    with pytest.raises(DistillError, match="made with other distillation terms"):
        resumed(entry, scenes, tmp_path / "terms", distilled_run.checkpoint(2)).train()


def test_live_state_makes_the_round_trip_through_a_file(tmp_path, model):
    first, second = build(model, seed=0), build(model, seed=5)
    for seed in range(2):
        total(losses_of(first, *batch(seed=seed))).backward()
    torch.save(copy.deepcopy(first.distiller.live_state()), tmp_path / "live.pth")
    second.distiller.load_live_state(torch.load(tmp_path / "live.pth", weights_only=True))
    assert_same(flat(second.distiller.live_state()), flat(first.distiller.live_state()))
    second.load_state_dict(first.state_dict())
    ours = [{k: v.detach() for k, v in losses_of(m, *batch(seed=7)).items()} for m in (first, second)]
    assert_same(*ours)


@pytest.mark.parametrize("update_buffers", [False, True])
def test_ema_averages_the_student_alone_and_resumes(tmp_path, scenes, model, distilled_run, update_buffers):
    hooks = [dict(type="EMAHook", momentum=0.5, update_buffers=update_buffers)]
    averaged = run(config(model, scenes, tmp_path / "a", custom_hooks=hooks))
    ema = next(hook for hook in averaged.hooks if type(hook).__name__ == "EMAHook").ema_model.module
    assert ema.distiller.teacher is averaged.model.distiller.teacher  # shared, never copied
    opponents = [m.distiller.terms["adversarial_mask"].opponent for m in (ema, averaged.model)]
    assert opponents[0] is opponents[1]

    saved = read(tmp_path / "a" / "iter_4.pth")
    plain = build(segmentor())
    plain.load_state_dict(saved["state_dict"], strict=True)
    assert {key.removeprefix("module.") for key in saved["ema_state_dict"]} == {*plain.state_dict(), "steps"}
    # The run trains as it does without the hook, and what is beside the student is live, not averaged.
    assert_same(weights(averaged), weights(distilled_run.runner))
    assert_same(flat(saved["message_hub"]["runtime_info"][KEY]), live(distilled_run.runner))
    assert not torch.equal(
        saved["state_dict"]["decode_head.conv_seg.weight"], averaged.model.decode_head.conv_seg.weight
    )


@needs_resume
@pytest.mark.parametrize("update_buffers", [False, True])
def test_ema_runs_resume_exactly(tmp_path, scenes, model, update_buffers):
    hooks = [dict(type="EMAHook", momentum=0.5, update_buffers=update_buffers)]
    whole = run(config(model, scenes, tmp_path / "whole", iterations=2, custom_hooks=hooks))
    again = resumed(
        model, scenes, tmp_path / "again", tmp_path / "whole" / "iter_1.pth", iterations=2, custom_hooks=hooks
    )
    again.train()
    assert_same(weights(again), weights(whole))
    assert_same(live(again), live(whole))
    last = [read(tmp_path / name / "iter_2.pth")["state_dict"] for name in ("whole", "again")]
    assert_same(dict(last[0]), dict(last[1]))


def test_the_best_checkpoint_is_a_plain_student_too(tmp_path, scenes, model):
    cfg = config(model, scenes, tmp_path, iterations=2)
    cfg.default_hooks.checkpoint.save_best = "mIoU"
    run(cfg)
    (best,) = tmp_path.glob("best_*.pth")
    state = dict(read(best)["state_dict"])
    assert_same(state, dict(read(tmp_path / best.name[best.name.index("iter_") :])["state_dict"]))
    plain = build(segmentor())
    plain.load_state_dict(state, strict=True)
    assert_same(state, dict(plain.state_dict()))


@pytest.fixture(scope="module")
def trained(tmp_path_factory, scenes):
    """A distilled run of two iterations, its config as a file, and its teacher's checkpoint deleted."""
    folder = tmp_path_factory.mktemp("inference")
    teacher = save_teacher(folder / "teacher.pth")
    imports = dict(imports=["kdgraft_seg"])
    cfg = config(
        distilled(segmentor(), teacher, **EVERY_TERM), scenes, folder / "work", iterations=2, custom_imports=imports
    )
    cfg.test_pipeline = [dict(type="LoadImageFromFile"), dict(type="PackSegInputs")]
    runner = run(cfg)
    cfg.dump(folder / "distilled.py")
    Path(teacher["checkpoint"]).unlink()
    return folder, runner


def test_an_exported_student_tests_alike_in_the_hosts_own_run(tmp_path, trained):
    folder, runner = trained
    weights_file, described = export_student(folder / "work" / "iter_2.pth", tmp_path / "student.pth")
    text = described.read_text()
    assert "kdgraft" not in text and "Distilled" not in text and "teacher" not in text
    plain = Config.fromfile(described)
    assert plain.model.type == "EncoderDecoder"
    plain.update(load_from=str(weights_file), work_dir=str(tmp_path / "test"), experiment_name="exported student")
    tester = Runner.from_cfg(plain)
    assert type(tester.model).__name__ == "EncoderDecoder"
    exported, ours = tester.test(), runner.test()
    assert exported == ours and 0 <= ours["mIoU"] <= 100
    assert_same(dict(tester.model.state_dict()), dict(runner.model.state_dict()))


def test_inference_needs_nothing_of_the_teacher(trained, scenes):
    folder, runner = trained
    image = str(sorted((scenes / "images" / "test").iterdir())[0])
    found = []
    for where in ("its own", "gone"):
        cfg = Config.fromfile(folder / "distilled.py")
        if where == "gone":
            cfg.model.teacher = dict(config="gone/teacher.py", checkpoint="gone/teacher.pth")
        model = init_model(cfg, loadable(folder / "work" / "iter_2.pth"), device="cpu")
        assert list(model.dataset_meta["classes"]) == list(CLASSES)
        found.append(inference_model(model, image).seg_logits.data)
    plain = Config.fromfile(folder / "distilled.py")
    plain.model = segmentor()
    model = init_model(plain, None, device="cpu")
    model.load_state_dict(runner.model.state_dict(), strict=True)
    expected = inference_model(model, image).seg_logits.data
    assert expected.shape == (11, 96, 96) and np.isfinite(expected.numpy()).all()
    assert torch.equal(found[0], expected) and torch.equal(found[1], expected)


def test_training_without_the_teacher_says_so(trained):
    cfg = Config.fromfile(trained[0] / "distilled.py")
    cfg.experiment_name = "no teacher"
    with pytest.raises(DistillError, match=r"checkpoint not found: .*teacher\.pth"):
        Runner.from_cfg(cfg).train()
