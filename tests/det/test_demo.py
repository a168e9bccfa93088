"""The demo runs end to end: tiny, but with the real Runner, recipes, pictures and files."""

from __future__ import annotations

import csv

import cv2
import pytest

from taskdistill.errors import DistillError
from taskdistill.report import Result, gap_closed
from taskdistill_det import demo


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
    assert {row["metric"] for row in rows} == set(demo.METRICS)
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
        demo.choose("nothing")


def test_gap_closed_by_hand():
    rows = [Result("det", "d", "m", method, 0, "AP", v) for method, v in [("plain", 0.2), ("teacher", 0.6), ("x", 0.3)]]
    assert gap_closed(rows, "AP", "x") == pytest.approx(0.25)
