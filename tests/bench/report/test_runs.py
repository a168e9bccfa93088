"""Runs are read from what the hosts' own trainings leave behind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kdgraft.errors import DistillError
from kdgraft_bench.report import pictures_of, read_runs
from kdgraft_bench.report.runs import main_metric

TRAINED = dict(lr=0.1, loss=2.0, loss_cls=1.5, time=0.25, data_time=0.1, memory=300)


def mm_log(folder: Path, *records: dict, stamp: str = "20260101_000000") -> Path:
    """A log in the layout of MMEngine's LocalVisBackend."""
    path = folder / stamp / "vis_data" / "scalars.json"
    path.parent.mkdir(parents=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def plain(folder: Path) -> str:
    return f"plain={mm_log(folder / 'plain', dict(TRAINED, step=2), dict(mIoU=30.0, step=0))}"


def test_an_evaluation_comes_after_the_iteration_before_it(tmp_path):
    records = [
        dict(TRAINED, iter=50, step=50),
        dict(mIoU=30.0, step=1),
        dict(TRAINED, iter=100, step=100),
        dict(mIoU=40.0, step=2),
    ]
    run, _ = read_runs([f"plain={mm_log(tmp_path / 'a', *records)}", str(mm_log(tmp_path / "b", *records))])
    assert run.validation == {"mIoU": [(50, 30.0), (100, 40.0)]}
    assert run.losses == {"loss": [(50, 2.0), (100, 2.0)], "loss_cls": [(50, 1.5), (100, 1.5)]}
    assert run.metrics == {"mIoU": 40.0, "iteration (ms)": 250.0, "memory (MiB)": 300.0}


def test_what_a_resumed_run_did_again_counts_once(tmp_path):
    folder = mm_log(tmp_path / "x", dict(TRAINED, step=50), dict(TRAINED, step=100, loss=9.0), dict(mIoU=1.0, step=0))
    mm_log(folder, dict(TRAINED, step=100, loss=3.0), dict(mIoU=35.0, step=0), stamp="20260102_000000")
    _, run = read_runs([plain(tmp_path), str(folder)])
    assert run.losses["loss"] == [(50, 2.0), (100, 3.0)]
    assert run.validation["mIoU"] == [(100, 35.0)]


def test_a_log_that_ends_in_the_middle_of_a_line_is_read_up_to_there(tmp_path):
    folder = mm_log(tmp_path / "x", dict(TRAINED, step=50), dict(mIoU=1.0, step=0))
    with (folder / "20260101_000000/vis_data/scalars.json").open("a") as log:
        log.write('{"lr": 0.1, "lo')  # of a run that was killed
    _, run = read_runs([plain(tmp_path), str(folder)])
    assert (run.metrics["mIoU"], run.losses["loss"]) == (1.0, [(50, 2.0)])


def test_pictures_are_those_of_a_benchmark(tmp_path):
    for name in ("bench/runs.jsonl", "bench/masks.png", "work/other.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert pictures_of([str(tmp_path / "bench"), f"plain={tmp_path / 'work'}"]) == [tmp_path / "bench/masks.png"]


def test_figures_that_are_not_finite_are_left_out(tmp_path):
    folder = mm_log(
        tmp_path / "x", dict(TRAINED, step=50, loss=float("nan")), dict(mIoU=1.0, mAcc=float("nan"), step=0)
    )
    _, run = read_runs([plain(tmp_path), str(folder)])
    assert "loss" not in run.losses and "mAcc" not in run.metrics


def test_a_label_that_comes_again_is_another_seed(tmp_path):
    folders = [
        mm_log(tmp_path / f"{name}{seed}", dict(TRAINED, step=1), dict(mIoU=1.0, step=0))
        for name in ("p", "x")
        for seed in (0, 1)
    ]
    found = read_runs(
        [f"{label}={folder}" for label, folder in zip(["plain", "plain", "cwd", "cwd"], folders, strict=True)]
    )
    assert [(run.label, run.seed) for run in found] == [("plain", 0), ("plain", 1), ("cwd", 0), ("cwd", 1)]


def test_runs_of_the_real_runner(tmp_path, request):
    pytest.importorskip("mmdet")
    from mmengine.registry import init_default_scope

    from kdgraft_bench.data.scenes import write_detection_set
    from support.det import build, detector, distilled, runner_config, save_teacher
    from support.mm import run as trained

    init_default_scope("mmdet")  # a segmentor's Runner in this process leaves its own
    scenes = str(write_detection_set(tmp_path / "scenes", size=96, seed=0, train=8, val=2, test=0))
    student, teacher = detector(), detector(width=6, channels=12)
    checkpoint = save_teacher(tmp_path / "teacher.pth", teacher)
    models = dict(plain=student, ld=distilled(student, teacher, checkpoint, recipe="ld"))
    for name, model in models.items():
        settings = dict(iters=4, train_cfg=dict(type="IterBasedTrainLoop", max_iters=4, val_interval=2))
        config = runner_config(
            model,
            scenes,
            tmp_path / name,
            visualizer=dict(type="Visualizer", vis_backends=[dict(type="LocalVisBackend")]),
            **settings,
        )
        config.default_hooks = dict(logger=dict(type="LoggerHook", interval=1))
        trained(config)
    first, second = read_runs([f"plain={tmp_path / 'plain'}", f"{tmp_path / 'ld'}"])
    assert (second.label, second.model, first.model) == ("ld", "GFL", "GFL")
    size = sum(parameter.numel() for parameter in build(student).parameters()) / 1e3
    for run in (first, second):
        assert [at for at, _ in run.validation["coco/bbox_mAP"]] == [2, 4]
        # A distilled student's checkpoint is a plain one; GFL has a buffer of nine numbers.
        assert run.metrics["parameters (k)"] == pytest.approx(size + 0.009)
        assert run.metrics["iteration (ms)"] > 0
        assert len(run.losses["loss_cls"]) == 4
    assert len(second.losses["distill.ld_main.loss"]) == 4
    assert "DistilledDetector" in second.config and "DistilledDetector" not in first.config
    assert main_metric([first, second]) == "coco/bbox_mAP"


@pytest.mark.parametrize("saved", ["save_state", "checkpoints"])
def test_runs_of_the_real_trainer(tmp_path, saved):
    pytest.importorskip("transformers")
    from transformers import Trainer

    from kdgraft_nlp import DistillTrainer
    from support import nlp as support

    for name, kind, more in (
        ("plain", Trainer, {}),
        ("kd", DistillTrainer, dict(teacher=support.model("bert", 32, 4), terms=["SoftTargets"])),
    ):
        settings = dict(max_steps=4, eval_strategy="steps", eval_steps=2, logging_steps=1)
        settings |= dict(save_strategy="steps", save_steps=4) if saved == "checkpoints" else {}
        trainer = kind(
            model=support.model("bert", seed=1),
            args=support.arguments(tmp_path / name, **settings),
            train_dataset=support.samples(12),
            eval_dataset=support.samples(6, seed=5),
            data_collator=support.collate,
            compute_metrics=lambda found: {"accuracy": float((found.predictions.argmax(-1) == found.label_ids).mean())},
            **more,
        )
        trainer.train()
        if saved == "save_state":
            trainer.save_model()
            trainer.save_state()
    first, second = read_runs([f"plain={tmp_path / 'plain'}", f"{tmp_path / 'kd'}"])
    size = sum(parameter.numel() for parameter in support.model("bert").parameters()) / 1e3
    for run in (first, second):
        assert [at for at, _ in run.validation["accuracy"]] == [2, 4]
        assert run.metrics["accuracy"] == run.validation["accuracy"][-1][1]
        assert run.metrics["parameters (k)"] == pytest.approx(size)
        assert len(run.losses["loss"]) == 4
        assert not {"runtime", "samples_per_second", "steps_per_second", "epoch"} & {
            *run.metrics,
            *run.validation,
            *run.losses,
        }
        assert ("iteration (ms)" in run.metrics) == (saved == "save_state")
    assert len(second.losses["distill.soft_targets.loss"]) == 4
    assert main_metric([first, second]) == "accuracy"


@pytest.mark.parametrize(
    ("named", "message"),
    [
        (["{x}"], r"which run is the plain student\? name it as plain=FOLDER; there are x"),
        (["plain={x}"], "name a distilled student beside the plain one, as LABEL=FOLDER; there are plain"),
        (["plain={x}", "teacher={x}"], "name a distilled student"),
        (["plain={x}", "{gone}"], "there is no folder .*gone"),
        (
            ["plain={x}", "{empty}"],
            "empty has no log of a run: neither .*scalars.json .* trainer_state.json .* runs.jsonl",
        ),
        (["plain={x}", "{tested}"], "tested has no log of a run"),
        (["plain={x}", "kd={x}"], "the folder .*x is named twice; each has to be another training"),
        (["plain={x}", "{broken}"], "scalars.json is damaged in line 1: "),
        (["plain={x}", "{hf}"], "trainer_state.json is damaged: "),
        (["{table}"], "cannot read .*results.csv: "),
    ],
)
def test_what_is_missing_is_one_line(tmp_path, named, message):
    folders = {name: tmp_path / name for name in ("x", "gone", "empty", "tested", "broken", "hf", "table")}
    mm_log(folders["x"], dict(TRAINED, step=2), dict(mIoU=30.0, step=0))
    mm_log(folders["tested"], dict(mIoU=30.0, step=0))
    folders["empty"].mkdir()
    (mm_log(folders["broken"]) / "20260101_000000/vis_data/scalars.json").write_text(
        '{"lr": 0.1, \n{"lr": 0.1, "step": 1}\n'
    )
    for name, file in (("hf", "trainer_state.json"), ("table", "results.csv"), ("table", "runs.jsonl")):
        folders[name].mkdir(exist_ok=True)
        (folders[name] / file).write_text("")
    with pytest.raises(DistillError, match=message) as caught:
        read_runs([name.format(**folders) for name in named])
    assert "\n" not in str(caught.value)


def test_metrics_that_not_all_runs_have(tmp_path):
    only = mm_log(tmp_path / "x", dict(TRAINED, step=2), dict(mAcc=30.0, step=0))
    with pytest.raises(DistillError, match=r"no metric of a validation in common \(plain: mIoU; x: mAcc\)"):
        main_metric(read_runs([plain(tmp_path), str(only)]))
    both = mm_log(tmp_path / "y", dict(TRAINED, step=2), dict(mIoU=3.0, mAcc=30.0, step=0))
    found = read_runs([f"plain={tmp_path / 'plain'}", str(both)])
    assert main_metric(found) == "mIoU"
    with pytest.raises(DistillError, match=r"not every run has the metric 'mAcc'.*all have mIoU"):
        main_metric(found, "mAcc")
