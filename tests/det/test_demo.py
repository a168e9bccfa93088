"""The demo runs end to end: tiny, but with the real Runner, recipes, pictures and files."""

from __future__ import annotations

import copy
import csv

import cv2
import pytest

from taskdistill.errors import DistillError
from taskdistill.report import Result, gap_closed
from taskdistill_det import demo
from taskdistill_mm.demo import train


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo")
    small = dict(seed=0, train=32, val=10, test=10)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "DATA", small)
        patch.setattr(demo, "EVALUATIONS", 2)
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


def test_demo_draws_what_was_detected(finished, tmp_path, monkeypatch):
    runs = []
    monkeypatch.setattr(demo, "DATA", dict(seed=0, train=32, val=10, test=10))
    monkeypatch.setattr(demo, "run", lambda settings, **_: runs.append(settings))
    demo.main()
    data = demo.write_detection_set(tmp_path / "data", size=demo.SIZE, **demo.DATA)
    model = copy.deepcopy(demo.STUDENT[1])
    model["test_cfg"]["score_thr"] = 0.0
    trained = train(runs[0], "plain", model, data, tmp_path / "plain", seed=0, iterations=2)
    for name, threshold in (("every.png", 0.0), ("none.png", 1.1)):
        demo.draw_detections([trained], tmp_path / name, scenes=1, threshold=threshold)
    every, none = (cv2.imread(str(tmp_path / name)) for name in ("every.png", "none.png"))
    # The left half is the ground truth, the right half the model's: boxes of an untrained model cover much of it.
    half = every.shape[1] // 2
    different = (every != none).any(2)
    assert different[:, half:].mean() > 0.05
    assert different[:, :half].mean() < 0.01


def test_demo_checkpoints_are_plain_students(finished):
    import torch

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
