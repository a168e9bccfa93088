"""The demo runs end to end: tiny, but with the real Runner, recipes, pictures and files; on scenes and on a real set's layout."""

from __future__ import annotations

import csv
import json
import shutil

import cv2
import numpy as np
import pytest
import torch

from kdgraft.errors import DistillError
from kdgraft_bench.data.scenes import write_segmentation_set
from kdgraft_bench.demos import seg as demo


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "DATA", dict(seed=0, train=24, val=4, test=5))
        for name, value in dict(BATCH=4, EVALUATIONS=2, ROUNDS=2).items():
            patch.setattr(demo, name, value)
        results = demo.main(seeds=1, recipes="skd,cwd", out=str(out), iterations=4)
    return out, results


def test_demo_writes_every_figure_it_prints(finished):
    out, results = finished
    with (out / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["task", "dataset", "model", "method", "seed", "metric", "value"]
    assert {row["method"] for row in rows} == {"teacher", "plain", "skd", "cwd"}
    assert {row["metric"] for row in rows} == {"mIoU", "mAcc", "parameters (k)", "MFLOPs", "step (ms)"}
    assert len(rows) == len(results)
    size = {row["method"]: float(row["value"]) for row in rows if row["metric"] == "parameters (k)"}
    assert size["teacher"] > 3 * size["plain"]
    assert size["skd"] == size["cwd"] == size["plain"]  # a distilled student costs what a plain one does


def test_demo_checkpoints_are_plain_students(finished):
    out, _ = finished
    keys = [
        list(torch.load(out / "seed0" / method / "iter_4.pth", weights_only=False)["state_dict"])
        for method in ("plain", "skd")
    ]
    assert keys[0] == keys[1]


def test_demo_draws_masks_in_their_colours(finished):
    out, _ = finished
    picture = cv2.imread(str(out / "masks.png"))
    columns = np.array_split(picture, 6, axis=1)  # image, ground truth, teacher, plain and two recipes
    # The background's colour in BGR: most of the ground truth, and hardly there in the picture itself.
    background = [(np.abs(column.astype(int) - 30).max(2) <= 2).mean() for column in columns]
    assert background[1] > 0.5
    assert background[0] < 0.2


def test_demo_draws_the_critic_beside_the_losses(finished):
    out, _ = finished
    assert cv2.imread(str(out / "curves.png")).shape[1] > 2000  # a fourth plot


@pytest.mark.slow
def test_finished_trainings_are_taken_as_they_are(finished, monkeypatch):
    out, results = finished
    monkeypatch.setattr(demo, "DATA", dict(seed=0, train=24, val=4, test=5))
    monkeypatch.setattr(demo, "BATCH", 4)
    monkeypatch.setattr(demo, "EVALUATIONS", 2)

    def refuse(comparison, training):
        raise AssertionError(f"{training.method} was trained")

    monkeypatch.setattr(demo.Segmentation, "train", refuse)
    same = demo.main(seeds=1, recipes="skd,cwd", out=str(out), iterations=4)
    assert [r for r in same if r.metric != "step (ms)"] == [r for r in results if r.metric != "step (ms)"]
    assert cv2.imread(str(out / "curves.png")).shape[1] > 2000  # the critic's figures too
    monkeypatch.setattr(demo, "LR", 1e-3)
    with pytest.raises(AssertionError, match="teacher was trained"):
        demo.main(seeds=1, recipes="none", out=str(out), iterations=4)


@pytest.mark.slow
def test_demo_takes_a_real_set(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "REAL_BATCH", 2)
    monkeypatch.setattr(demo, "EVALUATIONS", 1)
    scenes = write_segmentation_set(tmp_path / "scenes", seed=0, train=4, val=2, test=0)
    real = tmp_path / "real"
    for split in ("train", "val"):
        shutil.copytree(scenes / "images" / split, real / "img_dir" / split)
        shutil.copytree(scenes / "masks" / split, real / "ann_dir" / split)
    (real / "classes.json").write_text(json.dumps({"classes": ["background", *"0123456789"]}))
    results = demo.main(out=str(tmp_path / "out"), data=str(real), recipes="none", iterations=2)
    assert {result.dataset for result in results} == {"real"}
    assert {result.method for result in results} == {"teacher", "plain"}
    shutil.rmtree(real / "img_dir")
    with pytest.raises(DistillError, match=r"no img_dir/train"):
        demo.main(out=str(tmp_path / "out"), data=str(real))


def test_unknown_recipe_is_one_line():
    with pytest.raises(DistillError, match="no recipe 'nothing'"):
        demo.main(recipes="nothing")
