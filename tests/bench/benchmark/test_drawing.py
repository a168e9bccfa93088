"""Pictures show what models predict, and detectors with queries learn as a benchmark says."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch
from mmdet.registry import MODELS

from kdgraft.errors import DistillError
from kdgraft_bench.benchmark.planned import plan_of_benchmark
from kdgraft_bench.benchmark.working import carry_out_one
from kdgraft_bench.hosts import bench_host, det_setup, seg_setup
from kdgraft_bench.hosts.det_setup import draw_detections
from kdgraft_bench.spec import read_benchmark
from kdgraft_mm.configs import load_config
from support.bench import write_masks
from support.det import losses, raw_batch, save_teacher

SMALL = dict(seed=0, train=8, val=4, test=5)


def prepared(name, folder, **changes):
    told = read_benchmark(name, seeds=[0], iterations=2, out=str(folder), **changes)
    host = bench_host(told.host)
    dataset = host.dataset(told)
    return told, host, dataset, plan_of_benchmark(told, host, dataset)


def test_boxes_are_drawn_where_they_were_detected(tmp_path, monkeypatch):
    monkeypatch.setattr(det_setup, "DATA", SMALL)
    told, host, _, plan = prepared("det", tmp_path)
    trained = carry_out_one(told, plan, "small-plain", 0).model
    opened, samples = host.all_open({"plain": trained})
    opened["plain"].test_cfg["score_thr"] = opened["plain"].bbox_head.test_cfg["score_thr"] = 0.0
    with host.entered():
        for name, threshold in (("every.png", 0.0), ("none.png", 1.1)):
            draw_detections(opened, samples, [0], tmp_path / name, threshold)
    every, none = (cv2.imread(str(tmp_path / name)) for name in ("every.png", "none.png"))
    # The left half is the ground truth, the right half the model's: boxes of an untrained model cover much of it.
    half = every.shape[1] // 2
    different = (every != none).any(2)
    assert different[:, half:].mean() > 0.05
    assert different[:, :half].mean() < 0.01


def test_masks_are_drawn_in_their_colours(tmp_path, monkeypatch):
    monkeypatch.setattr(seg_setup, "DATA", SMALL)
    monkeypatch.setattr("kdgraft_bench.hosts.seg.DATA", SMALL)
    told, host, dataset, plan = prepared("seg", tmp_path)
    models = {name: carry_out_one(told, plan, name, 0).model for name in ("teacher", "small-plain")}
    host.draw(models, dataset, [0, 1], tmp_path / "masks.png")
    columns = np.array_split(cv2.imread(str(tmp_path / "masks.png")), 4, axis=1)  # image, ground truth, two models
    # The background's colour in BGR: most of the ground truth, and hardly there in the picture itself.
    background = [(np.abs(column.astype(int) - 30).max(2) <= 2).mean() for column in columns]
    assert background[1] > 0.5
    assert background[0] < 0.2


def test_a_set_of_masks_that_is_not_whole_is_one_line(tmp_path):
    root = write_masks(tmp_path)
    (root / "classes.json").unlink()
    told = read_benchmark("seg", data=str(root), out=str(tmp_path / "out"))
    with pytest.raises(DistillError, match=r"no classes\.json; a set has img_dir/\{train,val\}"):
        bench_host("seg").dataset(told)


@pytest.mark.slow
def test_detectors_with_queries_learn_from_a_wider_one(tmp_path, monkeypatch):
    monkeypatch.setattr(det_setup, "DATA", SMALL)
    told, _, _, plan = prepared("det-queries", tmp_path)
    done = {name: carry_out_one(told, plan, name, 0) for name, _, _ in told.trained()}
    states = [torch.load(one.model.weights, weights_only=False)["state_dict"] for one in done.values()]
    assert states[1].keys() == states[2].keys()
    count = [sum(value.numel() for value in state.values()) for state in states]
    assert count[0] > 1.5 * count[1] == 1.5 * count[2]


@pytest.mark.parametrize(("name", "method"), [("det", "bckd"), ("det-queries", "kddetr")])
def test_the_models_fit_the_recipe(name, method, tmp_path, monkeypatch):
    monkeypatch.setattr(det_setup, "DATA", SMALL)
    told, host, _, plan = prepared(name, tmp_path, methods=[method])
    configs = {run.name: load_config(run.config) for run in plan.runs}
    with host.entered():
        save_teacher(tmp_path / "teacher.pth", configs["teacher"].model.to_dict())
        student = configs[f"small-{method}"].model.to_dict()
        taught = dict(
            student,
            type="DistilledDetector",
            student=student["type"],
            teacher=dict(config=configs["teacher"].model.to_dict(), checkpoint=str(tmp_path / "teacher.pth")),
            recipe=dict(told.methods[method])["recipe"],
        )
        model = MODELS.build(taught)
        model.init_weights()  # as the Runner does; DETR leaves its embeddings of levels as they were in memory
        found = losses(model, raw_batch())
    assert found[f"distill.{method}.loss"] > 0
