"""Teachers of segmentors whose outputs are in a store."""

from __future__ import annotations

import copy

import pytest

from kdgraft.cli import main
from kdgraft.store import Store
from kdgraft_mm.run import train_config
from support.commands import refused
from support.mm import history, needs_resume, weights
from support.seg import EVERY_TERM, config, distilled, save_teacher, scenes, segmentor
from support.tensors import assert_same

PIPELINE = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations"),
    dict(type="RandomResize", scale=(96, 96), ratio_range=(0.75, 1.5), keep_ratio=True),
    dict(type="RandomCrop", crop_size=(64, 64), cat_max_ratio=0.75),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PhotoMetricDistortion"),
    dict(type="PackSegInputs"),
]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The data (12 images), the teacher, a store of two views of each image, and the run of a teacher that runs."""
    folder = tmp_path_factory.mktemp("stored")
    data, teacher = scenes(folder / "data"), save_teacher(folder / "teacher.pth")
    path = folder / "config.py"
    training(data, teacher, folder / "work").dump(path)
    assert main(["cache", str(path), "--out", str(folder / "store"), "--values", "float32"]) == 0
    running = training(data, teacher, folder / "running", hooks=[dict(type="ReplayViews", views=2)])
    return data, teacher, str(folder / "store"), train_config(running, "config.py")


def training(data, teacher, work_dir, *, iterations=8, hooks=(), settings=EVERY_TERM, **more):
    """A run of 16 images, more than one pass over the 12 of the data."""
    found = config(distilled(segmentor(dropout=0.1), dict(teacher, **more), **settings), data, work_dir, iterations)
    found.custom_imports = dict(imports=["kdgraft_seg"])
    found.custom_hooks = list(hooks)
    found.train_dataloader.dataset.pipeline = copy.deepcopy(PIPELINE)
    found.train_dataloader.sampler.shuffle = True
    return found


def test_a_run_with_the_store_is_the_run_with_the_teacher_bit_for_bit(made, tmp_path):
    data, teacher, store, running = made
    runner = train_config(training(data, teacher, tmp_path / "run", store=store), "config.py")
    assert_same(weights(runner), weights(running))
    for term in runner.model.distiller.terms:
        assert history(runner, f"distill.{term}.loss") == history(running, f"distill.{term}.loss"), term
    assert Store(store).about["views"] == 2


@needs_resume
def test_a_run_that_is_resumed_goes_on_with_the_same_views(made, tmp_path):
    data, teacher, store, running = made
    train_config(training(data, teacher, tmp_path / "run", iterations=4, store=store), "config.py")
    resumed = training(data, teacher, tmp_path / "run", store=store)
    resumed.resume = True
    assert_same(weights(train_config(resumed, "config.py", True)), weights(running))


def test_mixed_images_are_refused(made, tmp_path, capsys):
    data, teacher, _, _ = made
    path = tmp_path / "config.py"
    training(data, teacher, tmp_path / "work", settings=dict(recipe="funmatch", mixup=True)).dump(path)
    refused(capsys, ["cache", str(path), "--out", str(tmp_path / "s")], "mixup changes whole batches")


def test_views_of_the_runs_own_seed_are_not_stored(made, tmp_path, capsys):
    data, teacher, _, _ = made
    path = tmp_path / "config.py"
    training(data, teacher, tmp_path / "work", hooks=[dict(type="ReplayViews", seed=None)]).dump(path)
    refused(capsys, ["cache", str(path), "--out", str(tmp_path / "s")], "give ReplayViews a seed of its own, such as 0")
    assert not (tmp_path / "s").exists()
