"""Plans of real detectors: teacher, assistant, student, through the Runner; what is finished stays, what was killed goes on."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from mmengine.config import Config

from kdgraft.cli import main
from kdgraft.hosts import Job
from kdgraft_bench.hosts import det_setup
from kdgraft_bench.plans import SCHEMES, measure
from kdgraft_bench.results import read_results
from kdgraft_mm.configs import plain_config
from kdgraft_mm.trainer import DET as TRAINER
from support.commands import refused
from support.det import CLASSES, build, detector, distilled, runner_config
from support.forking import python
from support.mm import needs_resume, run, weights
from support.tensors import assert_same

TERMS = [dict(type="SoftTargets"), dict(type="FeatureImitation", tap="neck[*]", region="foreground")]
PLAN = """
[runs.student]
config = "small.py"
teacher = "assistant"
terms = [{ type = "SoftTargets" }, { type = "FeatureImitation", tap = "neck[*]", region = "foreground" }]

[runs.assistant]
config = "middle.py"
teacher = "teacher"
terms = [{ type = "SoftTargets" }]

[runs.teacher]
config = "large.py"
"""
ENTRIES = dict(small=detector(), middle=detector(width=6, channels=8), large=detector(width=8, channels=12))
HOOK = """
import os
from mmengine.hooks import Hook
from mmengine.registry import HOOKS


@HOOKS.register_module()
class DieInPlan(Hook):
    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if os.environ.get("DIE_AT") == f"{os.path.basename(os.path.dirname(runner.work_dir))} {runner.iter + 1}":
            os._exit(9)
"""
SETTINGS = dict(
    train_cfg=dict(type="IterBasedTrainLoop", max_iters=4, val_interval=4), custom_hooks=[dict(type="DieInPlan")]
)


@pytest.fixture
def folder(tmp_path, scenes, monkeypatch) -> Path:
    """Configs of three detectors that die where the environment says so."""
    (tmp_path / "dying_in_plans.py").write_text(HOOK)
    monkeypatch.syspath_prepend(str(tmp_path))
    for name, model in ENTRIES.items():
        config = runner_config(model, scenes, tmp_path / "unused", **SETTINGS)
        config.custom_imports = dict(imports=["dying_in_plans"])
        config.pop("experiment_name")  # each run has a hub of its own
        config.dump(tmp_path / f"{name}.py")
    return tmp_path


def plan(folder: Path, out: str = "out", text: str = PLAN) -> Path:
    path = folder / f"{out}.toml"
    path.write_text(f'out = "{folder / out}"\n{text}')
    return path


def record(folder: Path, run: str, out: str = "out") -> dict:
    return json.loads((folder / out / run / "seed0/finished.json").read_text())["model"]


VISUALIZED = """
[runs.first]
config = "seen.py"
[runs.second]
config = "seen.py"
options = { "optim_wrapper.optimizer.lr" = 0.002, "train_dataloader.dataset.pipeline.2.scale" = [96, 64] }
"""


def test_every_run_logs_to_its_own_folder_and_lists_stand_for_tuples(folder, scenes):
    """Configs of MMDetection name their visualizer, and a process keeps one visualizer of a name."""
    config = Config.fromfile(folder / "small.py")
    config.visualizer = dict(type="DetLocalVisualizer", name="visualizer", vis_backends=[dict(type="LocalVisBackend")])
    config.train_dataloader.dataset.pipeline[2] = dict(type="Resize", scale=(96, 96), keep_ratio=False)
    config.dump(folder / "seen.py")
    assert main(["plan", str(plan(folder, "seen", VISUALIZED))]) == 0
    logged = {}
    for name in ("first", "second"):
        (log,) = (folder / "seen" / name / "seed0").glob("*/vis_data/scalars.json")
        logged[name] = [json.loads(line) for line in log.read_text().splitlines()]
    lengths = [max(record["step"] for record in records if "lr" in record) for records in logged.values()]
    assert lengths == [4, 4] and logged["first"] != logged["second"]
    options = {
        "train_dataloader.dataset.pipeline.2.scale": [96, 64],
        "train_dataloader.absent": [1],
        "val_evaluator": [],
    }
    config = TRAINER.config_of(Job(str(folder / "seen.py"), options, folder, 0))
    assert config.train_dataloader.dataset.pipeline[2].scale == (96, 64)
    assert config.train_dataloader.absent == [1] and config.val_evaluator == []


def test_runs_replay_their_views_and_a_plain_student_does_not_know_of_it(folder):
    replay = dict(type="ReplayViews", seed=None)
    config = TRAINER.config_of(Job(str(folder / "small.py"), {}, folder, 0))
    assert [dict(hook) for hook in config.custom_hooks] == [dict(type="DieInPlan"), replay]
    own = {"custom_hooks": [dict(type="ReplayViews", views=2)]}
    chosen = TRAINER.config_of(Job(str(folder / "small.py"), own, folder, 0))
    assert [dict(hook) for hook in chosen.custom_hooks] == own["custom_hooks"]
    assert [dict(hook) for hook in plain_config(config).custom_hooks] == [dict(type="DieInPlan")]
    assert "custom_hooks" not in plain_config(chosen)


def state(folder: Path, run: str, out: str = "out") -> dict[str, torch.Tensor]:
    return dict(torch.load(record(folder, run, out)["weights"], weights_only=True)["state_dict"])


def verbs(said: str) -> dict[str, str]:
    """What was said of each run first."""
    lines = [line for line in said.splitlines() if " (seed 0, det): " in line and ": done" not in line]
    return {line.split(" ")[0]: line.split("): ")[1].split(",")[0].split(" after")[0] for line in lines}


@needs_resume
def test_teacher_assistant_student(folder, scenes, capsys, tmp_path):
    path = plan(folder)
    assert main(["plan", str(path)]) == 0
    assert verbs(capsys.readouterr().out) == dict.fromkeys(("teacher", "assistant", "student"), "trains")
    for name, width in (("teacher", 8), ("assistant", 6), ("student", 4)):
        made = record(folder, name)
        assert "coco/bbox_mAP" in made["metrics"]
        config = Config.fromfile(made["config"])
        assert config.model.type == "GFL" and config.model.backbone.base_channels == width
        build(config.model.to_dict()).load_state_dict(state(folder, name), strict=True)

    # The student by hand, from the assistant's files.
    assistant = record(folder, "assistant")
    model = distilled(detector(), assistant["config"], assistant["weights"], terms=TERMS)
    settings = dict(SETTINGS, custom_hooks=[], randomness=dict(seed=0, deterministic=True))
    alone = run(runner_config(model, scenes, tmp_path / "alone", **settings))
    assert_same(weights(alone), state(folder, "student"))
    assert any(not torch.equal(value, build(detector()).state_dict()[key]) for key, value in weights(alone).items())
    meta = torch.load(assistant["weights"], weights_only=True)["meta"]
    assert tuple(meta["dataset_meta"]["classes"]) == CLASSES

    # The same student, by a plan that is given the assistant's weights.
    text = PLAN[PLAN.index("[runs.student]") :].split("[runs.", 2)
    given = f'[runs.assistant]\nconfig = "middle.py"\ncheckpoint = "{assistant["weights"]}"\n\n[runs.{text[1]}'
    assert main(["plan", str(plan(folder, "given", given))]) == 0
    assert verbs(capsys.readouterr().out)["assistant"].startswith("takes ")
    assert_same(state(folder, "student", "given"), state(folder, "student"))
    wrong = given.replace('config = "middle.py"', 'config = "large.py"')
    refused(capsys, ["plan", str(plan(folder, "wrong", wrong))], assistant["weights"], progress=True)

    # Again: nothing is repeated.
    files = {file: file.stat().st_mtime_ns for file in (folder / "out").rglob("*") if file.is_file()}
    assert main(["plan", str(path)]) == 0
    assert verbs(capsys.readouterr().out) == dict.fromkeys(("teacher", "assistant", "student"), "finished")
    assert files == {file: file.stat().st_mtime_ns for file in (folder / "out").rglob("*") if file.is_file()}

    # A run whose record and last checkpoint are lost goes on from the one before, to the same weights.
    before = {name: state(folder, name) for name in ("assistant", "student")}
    metrics = record(folder, "assistant")["metrics"]
    (folder / "out/assistant/seed0/finished.json").unlink()
    (folder / "out/assistant/seed0/iter_4.pth").unlink()
    assert main(["plan", str(path)]) == 0
    found = capsys.readouterr().out
    assert verbs(found) == {"teacher": "finished", "assistant": "goes on", "student": "finished"}
    assert_same(state(folder, "assistant"), before["assistant"])
    assert record(folder, "assistant")["metrics"] == metrics

    # Killed after its last iteration, before its record was written: nothing is left to train, the metrics are measured.
    (folder / "out/student/seed0/finished.json").unlink()
    metrics_of = record(folder, "teacher")["metrics"]
    (folder / "out/teacher/seed0/finished.json").unlink()
    assert main(["plan", str(path)]) == 0
    assert verbs(capsys.readouterr().out) == {"teacher": "goes on", "assistant": "finished", "student": "goes on"}
    assert_same(state(folder, "student"), before["student"])
    assert record(folder, "teacher")["metrics"] == metrics_of


@needs_resume
def test_a_plan_that_was_killed_goes_on_to_the_same_weights(folder, capsys):
    text = (
        PLAN.partition("[runs.assistant]")[0].replace("assistant", "teacher") + '[runs.teacher]\nconfig = "large.py"\n'
    )
    whole, path = plan(folder, "whole", text), plan(folder, "killed", text)
    assert main(["plan", str(whole)]) == 0
    # Here and there one thread: sums depend on their number.
    places = os.pathsep.join([str(folder), *filter(None, sys.path)])
    killed = python("-m", "kdgraft", "plan", str(path), host="mmdet", PYTHONPATH=places, DIE_AT="student 3")
    assert killed.returncode == 9, killed.stderr[-2000:]
    assert (folder / "killed/teacher/seed0/finished.json").exists()
    assert not (folder / "killed/student/seed0/finished.json").exists()
    capsys.readouterr()
    assert main(["plan", str(path)]) == 0
    assert verbs(capsys.readouterr().out) == {"teacher": "finished", "student": "goes on"}
    assert_same(state(folder, "student", "killed"), state(folder, "student", "whole"))
    assert record(folder, "student", "killed")["metrics"] == record(folder, "student", "whole")["metrics"]


def test_a_config_that_is_distilled_already_is_one_line(folder, scenes, teacher_model, teacher_checkpoint, capsys):
    model = distilled(detector(), teacher_model, teacher_checkpoint, terms=["SoftTargets"])
    runner_config(model, scenes, folder / "unused").dump(folder / "small.py")
    text = '[runs.student]\nconfig = "small.py"\nteacher = { config = "large.py", checkpoint = "x.pth" }\nterms = ["SoftTargets"]\n'
    line = refused(capsys, ["plan", str(plan(folder, text=text))])
    assert "is distilled already; give the plan the plain student's config" in line


def student_by_hand(folder: Path, scenes: str, name: str, teacher: dict, change=lambda config: None, terms=None):
    """The weights of the student that a Runner trains from the files of a plan's teacher."""
    model = distilled(detector(), teacher["config"], teacher["weights"], terms=terms or [dict(type="SoftTargets")])
    settings = dict(SETTINGS, custom_hooks=[], randomness=dict(seed=0, deterministic=True))
    config = runner_config(model, scenes, folder / name, **settings)
    change(config)
    return weights(run(config))


TAKD = """
[runs.teacher]
config = "large.py"
[runs.alone]
config = "small.py"
[runs.assistant]
config = "middle.py"
teacher = "teacher"
terms = ["SoftTargets"]
each = { config = ["middle.py", "between.py"] }
choose = { by = "coco/bbox_mAP", midway = ["teacher", "alone"] }
[runs.student]
config = "small.py"
teacher = "assistant"
terms = ["SoftTargets"]
"""


@pytest.mark.slow
def test_the_assistant_midway_is_chosen_and_teaches(folder, scenes, capsys, tmp_path):
    between = Config.fromfile(folder / "middle.py")
    between.model.backbone.base_channels = between.model.backbone.stem_channels = 5
    between.model.neck.in_channels = [5, 10, 20, 40]
    between.dump(folder / "between.py")
    path = plan(folder, text=TAKD)
    assert main(["plan", str(path)]) == 0
    said = capsys.readouterr().out
    chosen = json.loads((folder / "out/assistant/seed0/finished.json").read_text())
    assert f"{chosen['chosen']} is chosen" in said
    values = chosen["values"]
    assert set(values) == {"assistant-middle", "assistant-between", "teacher", "alone"}
    middle = (values["teacher"] + values["alone"]) / 2
    assert chosen["chosen"] == min(list(values)[:2], key=lambda name: abs(values[name] - middle))
    assistant = record(folder, chosen["chosen"])
    assert chosen["model"] == assistant
    assert_same(student_by_hand(tmp_path, scenes, "by_hand", assistant), state(folder, "student"))
    build(detector()).load_state_dict(state(folder, "student"), strict=True)
    assert main(["plan", str(path)]) == 0
    assert set(verbs(capsys.readouterr().out).values()) == {"finished"}


BORN_AGAIN = """
[runs.teacher]
config = "small.py"
stop = 2
[runs.ban]
config = "small.py"
teacher = "teacher"
terms = ["SoftTargets"]
generations = 2
[runs.student]
config = "small.py"
teacher = ["ban-*"]
terms = ["SoftTargets"]
"""


@pytest.mark.slow
def test_generations_of_detectors_and_their_ensemble(folder, scenes, capsys, tmp_path):
    assert main(["plan", str(plan(folder, text=BORN_AGAIN))]) == 0
    # The teacher that was stopped early is the checkpoint of that iteration of the whole training.
    settings = dict(SETTINGS, custom_hooks=[], randomness=dict(seed=0, deterministic=True))
    run(runner_config(detector(), scenes, tmp_path / "whole", **settings))
    early = torch.load(tmp_path / "whole/iter_2.pth", weights_only=False)["state_dict"]
    assert_same(dict(early), state(folder, "teacher"))
    assert "coco/bbox_mAP" in record(folder, "teacher")["metrics"]
    assert_same(student_by_hand(tmp_path, scenes, "second", record(folder, "ban-1")), state(folder, "ban-2"))
    config = Config.fromfile(record(folder, "student")["config"])
    assert config.model.type == "GFL"

    def taught_by_both(config):
        both = {f"teacher_{i}": record(folder, f"ban-{i + 1}") for i in range(2)}
        sources = {name: dict(config=r["config"], checkpoint=r["weights"]) for name, r in both.items()}
        config.model.pop("teacher")
        config.model.teachers = {**sources, "teacher": dict(type="Ensemble", members=list(both))}

    taught = student_by_hand(tmp_path, scenes, "both", record(folder, "ban-2"), taught_by_both)
    assert_same(taught, state(folder, "student"))
    # An ensemble of detectors is measured nowhere.
    text = BORN_AGAIN + '[runs.together]\nconfig = "small.py"\nensemble = ["ban-*"]\n'
    refused(
        capsys, ["plan", str(plan(folder, text=text))], "together: ensemble means nothing in the host det: boxes of"
    )


@pytest.mark.slow
def test_a_transfer_set_of_detection(folder, scenes, capsys, tmp_path):
    text = """
[runs.teacher]
config = "large.py"
[runs.student]
config = "small.py"
teacher = "teacher"
terms = ["SoftTargets"]
data = { set = "large.py", share = 0.5, labels = false }
"""
    assert main(["plan", str(plan(folder, text=text))]) == 0
    kept = sorted(torch.randperm(16, generator=torch.Generator().manual_seed(0))[:8].tolist())
    made = Config.fromfile(record(folder, "student")["config"]).train_dataloader.dataset
    assert made.indices == kept and json.loads(Path(made.ann_file).read_text())["annotations"] == []

    def without_boxes(config):
        dataset = config.train_dataloader.dataset
        file = tmp_path / "no_boxes.json"
        found = json.loads((Path(scenes) / dataset.ann_file).read_text())
        file.write_text(json.dumps({**found, "annotations": []}))
        dataset.update(ann_file=str(file), filter_cfg=dict(filter_empty_gt=False), indices=kept)

    terms = ["SoftTargets", "TaskShare"]
    by_hand = student_by_hand(tmp_path, scenes, "by_hand", record(folder, "teacher"), without_boxes, terms)
    assert_same(by_hand, state(folder, "student"))
    several = Config.fromfile(folder / "small.py")
    several.train_dataloader.dataset = dict(type="ConcatDataset", datasets=[several.train_dataloader.dataset] * 2)
    several.dump(folder / "small.py")
    other = text.replace('set = "large.py", ', "")
    refused(capsys, ["plan", str(plan(folder, "other", other))], "data: the training set is of several", progress=True)
    other = text.replace('data = { set = "large.py", share = 0.5, labels = false }', "stop = 5")
    refused(
        capsys,
        ["plan", str(plan(folder, "other2", other))],
        "stop must be at most train_cfg.max_iters=4, got 5",
        progress=True,
    )


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_plan_that_ships_says_what_it_will_do(tmp_path, monkeypatch, capsys, scheme: str):
    monkeypatch.chdir(tmp_path)
    assert measure(scheme, "det", dry_run=True) == []
    said = [line for line in capsys.readouterr().out.splitlines() if " (seed 0" in line]
    assert len(said) == dict(takd=10, born_again=5)[scheme] and not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_plan_that_ships_is_measured(tmp_path, monkeypatch, capsys, scheme: str):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("kdgraft_bench.hosts.det_setup.DATA", dict(seed=0, train=16, val=4, test=4))
    plain = det_setup.detector

    def lenient(*sizes):  # after two iterations no box is certain, and without boxes COCO's metric says nothing
        model = plain(*sizes)
        return {**model, "test_cfg": {**model["test_cfg"], "score_thr": 0.0}}

    monkeypatch.setattr(det_setup, "detector", lenient)
    found = measure(scheme, "det", iterations=2)
    runs = dict(takd=10, born_again=5)[scheme]
    assert len(found) == 2 * runs and read_results(f"runs/plans/{scheme}_det/results.csv") == found
    assert all(0 <= result.value <= 1 for result in found)
    table = capsys.readouterr().out.partition(f"{scheme} in det: ")[2]
    assert [line.split()[0] for line in table.splitlines()[1:] if line] == ["run", *(r.model for r in found[::2])]
