"""The demo runs end to end: tiny, but with the real Runner, recipes, pictures and files; on scenes and on a real set's layout."""

from __future__ import annotations

import copy
import csv
import json
import shutil
import subprocess
import sys

import cv2
import numpy as np
import pytest
import torch

from kdgraft.errors import DistillError
from kdgraft_bench import comparison as runner
from kdgraft_bench.comparison import Outcome, Training, train_once
from kdgraft_bench.data.coco import RealSet
from kdgraft_bench.data.scenes import write_detection_set
from kdgraft_bench.demos import det as demo
from kdgraft_bench.finished import alone
from kdgraft_bench.results import Result, gap_closed
from kdgraft_det import DistilledDetector


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo")
    small = dict(seed=0, train=32, val=10, test=10)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "DATA", small)
        for name, value in dict(BATCH=4, EVALUATIONS=2, ROUNDS=2).items():
            patch.setattr(demo, name, value)
        results = demo.main(seeds=1, recipes="default", out=str(out), iterations=6)
    return out, results


def test_demo_writes_every_figure_it_prints(finished):
    out, results = finished
    with (out / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["task", "dataset", "model", "method", "seed", "metric", "value"]
    assert {row["method"] for row in rows} == {"teacher", "plain", *demo.DEFAULT}
    assert {row["metric"] for row in rows} == {*demo.SCORES, "parameters (k)", "MFLOPs", "step (ms)"}
    assert len(rows) == len(results)
    parameters = {row["method"]: float(row["value"]) for row in rows if row["metric"] == "parameters (k)"}
    assert parameters["teacher"] > 3 * parameters["plain"]
    for name in demo.DEFAULT:  # a distilled student costs what a plain one does
        assert parameters[name] == parameters["plain"]


def test_demo_draws_pictures_with_something_on_them(finished):
    out, _ = finished
    for name in ("detections.png", "curves.png"):
        picture = cv2.imread(str(out / name))
        assert picture.shape[1] > 400
        assert picture.std() > 20


def test_demo_draws_what_was_detected(tmp_path):
    data = write_detection_set(tmp_path / "data", size=demo.SIZE, seed=0, train=32, val=10, test=10)
    comparison = demo.scenes()
    comparison.student[1]["test_cfg"]["score_thr"] = 0.0
    with comparison.entered("cpu"):
        trained = comparison.train(Training("plain", 0, 2, "test", "cpu", data, tmp_path))
        for name, threshold in (("every.png", 0.0), ("none.png", 1.1)):
            comparison.draw([trained], tmp_path / name, scenes=1, threshold=threshold)
    every, none = (cv2.imread(str(tmp_path / name)) for name in ("every.png", "none.png"))
    # The left half is the ground truth, the right half the model's: boxes of an untrained model cover much of it.
    half = every.shape[1] // 2
    different = (every != none).any(2)
    assert different[:, half:].mean() > 0.05
    assert different[:, :half].mean() < 0.01


def test_demo_checkpoints_are_plain_students(finished):
    out, _ = finished
    keys = [
        list(torch.load(out / "seed0" / method / "iter_6.pth", weights_only=False)["state_dict"])
        for method in ("plain", demo.DEFAULT[0])
    ]
    assert keys[0] == keys[1]


def test_unknown_recipe_is_one_line():
    with pytest.raises(DistillError, match="no recipe 'nothing'"):
        demo.main(recipes="nothing")


def test_gap_closed_by_hand():
    rows = [Result("det", "d", "m", method, 0, "AP", v) for method, v in [("plain", 0.2), ("teacher", 0.6), ("x", 0.3)]]
    assert gap_closed(rows, "AP", "x") == pytest.approx(0.25)


METRICS = {*demo.SCORES, "parameters (k)", "MFLOPs"}


def figures(results):
    """Every figure but the time, which is measured anew."""
    return {(r.method, r.metric): r.value for r in results if r.metric in METRICS}


@pytest.fixture
def no_training(monkeypatch):
    def refuse(comparison, training):
        raise AssertionError(f"{training.method} was trained")

    monkeypatch.setattr(demo.Detection, "train", refuse)


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """A small set in COCO's format."""
    return write_detection_set(tmp_path_factory.mktemp("set") / "digits", seed=0, train=8, val=5, test=0)


@pytest.fixture(scope="module")
def real(tmp_path_factory, digits):
    """The demo's files and results of it."""
    out = tmp_path_factory.mktemp("out")
    with pytest.MonkeyPatch.context() as patch:
        small(patch)
        results = demo.main(out=str(out), data=str(digits), recipes="combined,mmdet_ld", iterations=4)
    return out, results


def small(patch):
    patch.setattr(demo, "REAL_SIZE", (64, 64))
    patch.setattr(demo, "REAL_BATCH", 4)
    patch.setattr(demo, "REAL_ROUNDS", 1)


@pytest.fixture
def again(digits, monkeypatch):
    """Runs the demo on the real set once more, in the folder ``out``; other settings can be given."""
    small(monkeypatch)
    plain = dict(data=str(digits), recipes="combined,mmdet_ld", iterations=4)
    return lambda **settings: demo.main(**{**plain, **settings})


@pytest.mark.slow
def test_demo_takes_a_real_set(real):
    out, results = real
    assert {result.dataset for result in results} == {"digits"}
    assert {result.method for result in results} == {"teacher", "plain", "combined", "mmdet_ld"}
    size = {result.method: result.value for result in results if result.metric == "parameters (k)"}
    assert size["teacher"] > 3 * size["plain"]
    assert size["plain"] == size["combined"] == size["mmdet_ld"]
    assert cv2.imread(str(out / "detections.png")).std() > 20
    assert "mmdet_ld" in (out / "table.md").read_text()


def test_mmdets_own_distillation_learns_from_the_demos_teacher(real):
    out, _ = real
    curves = json.loads((out / "seed0/mmdet_ld/finished.json").read_text())["curves"]
    assert all(value > 0 for _, value in curves["loss_ld"])
    assert "loss_ld" not in json.loads((out / "seed0/plain/finished.json").read_text())["curves"]
    weights = {name: state(out / "seed0" / name / "iter_4.pth") for name in ("teacher", "plain", "mmdet_ld")}
    told = state(out / "seed0/teacher/weights.pth")
    assert told.keys() == weights["teacher"].keys()
    assert all(torch.equal(told[key], value) for key, value in weights["teacher"].items())
    assert weights["mmdet_ld"].keys() == weights["plain"].keys()


def state(path):
    return torch.load(path, weights_only=False)["state_dict"]


def test_finished_trainings_are_taken_as_they_are(real, again, no_training, capsys):
    out, results = real
    for name in ("table.md", "results.csv", "detections.png", "curves.png"):
        (out / name).unlink()
    same = again(out=str(out))
    assert figures(same) == figures(results)
    assert len(same) == len(results) and all(r.value > 0 for r in same if r.metric == "step (ms)")
    assert capsys.readouterr().out.count("taken from") == 4
    assert cv2.imread(str(out / "curves.png")).std() > 20
    assert cv2.imread(str(out / "detections.png")).std() > 20


def test_the_folder_may_move_and_other_recipes_may_be_asked_for(digits, real, again, no_training, tmp_path):
    out, results = real
    shutil.copytree(digits, tmp_path / "digits")
    shutil.copytree(out, tmp_path / "out")
    moved = again(out=str(tmp_path / "out"), data=str(tmp_path / "digits"), recipes="mmdet_ld")
    assert figures(moved) == {key: value for key, value in figures(results).items() if key[0] != "combined"}


@pytest.fixture
def decided(tmp_path, again, monkeypatch):
    """Runs the demo without any training, in a folder of its own: which methods would be trained, each time."""
    trained = []

    def note(comparison, training):
        trained.append(training.method)
        training.folder.mkdir(parents=True, exist_ok=True)
        comparison.weights(training).write_text("weights")
        return Outcome(training, dict.fromkeys(comparison.scores, 0.5))

    monkeypatch.setattr(demo.Detection, "train", note)
    for name in ("restore", "draw"):
        monkeypatch.setattr(demo.Detection, name, lambda *_: None)
    monkeypatch.setattr(runner, "time_steps", lambda comparison, outcomes: [1.0] * len(outcomes))
    monkeypatch.setattr(runner, "draw_curves", lambda *_: None)

    def run(**settings):
        trained.clear()
        again(out=str(tmp_path / "out"), **settings)
        return list(trained)

    return run


EVERYTHING = ["teacher", "plain", "combined", "mmdet_ld"]
CHANGES = {
    "a weight": (
        lambda patch: patch.setitem(demo.REAL_RECIPES, "combined", dict(recipe=dict(type="combined", features=3.0))),
        ["combined"],
    ),
    "what a recipe means": (
        lambda patch: patch.setattr(DistilledDetector, "expand", lambda recipe: [dict(type="SoftTargets")]),
        ["combined"],
    ),
    "the student": (lambda patch: patch.setattr(demo, "REAL_STUDENT", (5, 48)), ["plain", "combined", "mmdet_ld"]),
    "the teacher": (lambda patch: patch.setattr(demo, "REAL_TEACHER", (20, 48)), ["teacher", "combined", "mmdet_ld"]),
    "the rate": (lambda patch: patch.setattr(demo, "REAL_LR", 2e-3), EVERYTHING),
    "the size": (lambda patch: patch.setattr(demo, "REAL_SIZE", (32, 32)), EVERYTHING),
}


@pytest.mark.parametrize(("change", "expected"), CHANGES.values(), ids=CHANGES)
def test_what_changed_is_trained_anew(decided, monkeypatch, change, expected):
    assert decided() == EVERYTHING
    assert decided() == []
    change(monkeypatch)
    assert decided() == expected
    assert decided() == []


def test_other_iterations_seeds_pictures_and_lost_files_are_trained_anew(digits, decided, tmp_path):
    shutil.copytree(digits, tmp_path / "digits")
    data = str(tmp_path / "digits")
    assert decided(data=data) == EVERYTHING
    assert decided(data=data, first_seed=1) == EVERYTHING
    assert decided(data=data, seeds=2) == []
    assert decided(data=data, split="val") == []  # a real set has no third split
    assert decided(data=data, iterations=3) == EVERYTHING
    cv2.imwrite(str(tmp_path / "digits/train/000001.png"), np.zeros((96, 96, 3), np.uint8))
    assert decided(data=data, iterations=3) == EVERYTHING
    work = tmp_path / "out/seed0"
    (work / "plain/finished.json").write_text('{"settings": "')  # the machine went down
    (work / "mmdet_ld/iter_3.pth").unlink()
    assert decided(data=data, iterations=3) == ["plain", "mmdet_ld"]


def test_a_distiller_is_restored_with_its_adapters(digits, monkeypatch, tmp_path, capsys):
    """The losses of a student that was taken are those of the one that was trained, on one batch."""
    small(monkeypatch)
    real = RealSet.read(digits)
    comparison, data = demo.own_set(real), real.shrunk(tmp_path / "data", demo.REAL_SIZE)

    def fit(method):
        with comparison.entered("cpu"):
            return train_once(comparison, Training(method, 0, 4, "test", "cpu", data, tmp_path), None)

    fit("teacher")
    trained, taken = fit("combined"), fit("combined")
    assert capsys.readouterr().out.count("taken from") == 1
    # Made within one second, and each with a hub of its own, in which a distiller keeps its state.
    assert fit("teacher").run.message_hub is not taken.run.message_hub
    batch = next(iter(trained.run.train_dataloader))
    losses = []
    for model in (trained.run.model, taken.run.model):
        model.train()
        data = model.data_preprocessor(copy.deepcopy(batch), True)
        losses.append({key: value.item() for key, value in model.parse_losses(model(**data, mode="loss"))[1].items()})
    assert losses[0] == losses[1]
    assert sum(key.startswith("distill.") for key in losses[0]) >= 3


def test_two_processes_do_not_train_one_model_at_once(tmp_path):
    """The second waits, says so, and goes on when the first is done."""
    program = (
        "import sys; from pathlib import Path; from kdgraft_bench.finished import alone\n"
        "with alone(Path(sys.argv[1]), 'plain (seed 0)'): print('in', flush=True)"
    )
    with alone(tmp_path / "plain.lock", "plain (seed 0)"):
        command = [sys.executable, "-c", program, str(tmp_path / "plain.lock")]
        other = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert "another process is at it" in other.stdout.readline()
        assert other.poll() is None
    assert other.communicate(timeout=60)[0] == "in\n"
