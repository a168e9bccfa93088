"""Teachers of detectors whose outputs are in a store: the same training as with a teacher that runs, and what cannot be stored."""

from __future__ import annotations

import copy
import json
import shutil

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.runner import Runner

from kdgraft.cli import main
from kdgraft.errors import DistillError
from kdgraft.store import Store
from kdgraft_mm.replaying import ReplayViews
from kdgraft_mm.run import train_config
from support.commands import refused
from support.det import CLASSES, EVERY_TERM, detector, distilled, runner_config, save_teacher, scenes
from support.killing import assert_kills_change_nothing
from support.mm import history, needs_resume, weights
from support.tensors import assert_same
from support.vits import by_file

STORABLE = dict(recipe="ld", terms=[term for term in EVERY_TERM["terms"] if term["type"] != "CrossHead"])
PIPELINE = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", with_bbox=True),
    dict(type="RandomResize", scale=[(48, 48), (176, 144)], keep_ratio=False),
    dict(type="RandomCrop", crop_size=(0.6, 0.9), crop_type="relative_range", allow_negative_crop=True),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PhotoMetricDistortion"),
    dict(type="PackDetInputs", meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor", "flip")),
]
TEACHER = detector(width=6, channels=12)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return scenes(tmp_path_factory.mktemp("scenes"))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_teacher(tmp_path_factory.mktemp("teacher") / "teacher.pth", TEACHER)


def training(data, checkpoint, folder, *, iters=8, pipeline=PIPELINE, hooks=(), terms=STORABLE, **teacher):
    """A config: two passes over 16 images by default, in another order each time."""
    model = distilled(detector(), TEACHER, checkpoint, **terms)
    model["teacher"] |= teacher
    config = runner_config(model, data, folder, iters=iters, custom_hooks=list(hooks))
    config.train_dataloader.dataset.pipeline = copy.deepcopy(pipeline)
    config.train_dataloader.sampler.shuffle = True
    config.default_hooks.checkpoint.interval = 3
    return config


def dumped(config, path):
    config.dump(path)
    return str(path)


@pytest.fixture(scope="module")
def filled(data, checkpoint, tmp_path_factory):
    """A store in fp32 of two views of each image."""
    folder = tmp_path_factory.mktemp("filled")
    path = dumped(training(data, checkpoint, folder / "work", store=str(folder / "store")), folder / "config.py")
    assert main(["cache", path, "--values", "float32"]) == 0
    return folder / "store"


def trained(config):
    return train_config(config, "config.py", bool(config.get("resume")))


@pytest.fixture(scope="module")
def running(data, checkpoint, tmp_path_factory):
    """A run whose teacher runs, on the views of the store."""
    return trained(training(data, checkpoint, tmp_path_factory.mktemp("running"), hooks=[dict(type="ReplayViews")]))


# --- what training with it gives


def test_a_run_with_the_store_is_the_run_with_the_teacher_bit_for_bit(running, filled, data, tmp_path):
    config = training(data, "", tmp_path / "run", store=str(filled))  # without a checkpoint
    config.model.teacher.pop("checkpoint")
    runner = trained(config)
    assert_same(weights(runner), weights(running))
    for term in runner.model.distiller.terms:
        assert history(runner, f"distill.{term}.loss") == history(running, f"distill.{term}.loss"), term
    assert any(value > 0 for value in history(runner, "distill.ld_vlr.loss"))
    sizes = {tuple(size) for size in Store(filled).whole(0, "sizes").tolist()}
    assert len(sizes) > 1  # the batches were padded to several sizes


@needs_resume
def test_a_run_that_is_resumed_goes_on_with_the_same_views(running, filled, data, checkpoint, tmp_path):
    trained(training(data, checkpoint, tmp_path / "run", iters=3, store=str(filled)))
    config = training(data, checkpoint, tmp_path / "run", store=str(filled))
    config.resume = True
    assert_same(weights(trained(config)), weights(running))


def test_views_depend_neither_on_workers_nor_on_the_seed_of_the_run(data, tmp_path):
    seen = []
    for place, (workers, seed) in enumerate(((0, 3), (2, 3), (0, 4))):
        config = training(data, "", tmp_path / str(place))
        config.model = detector()
        config.custom_hooks = [dict(type="ReplayViews", views=1)]
        config.train_dataloader.num_workers = workers
        config.randomness.seed = seed
        runner = Runner.from_cfg(config)
        (hook,) = [hook for hook in runner.hooks if isinstance(hook, ReplayViews)]
        hook.before_train(runner)
        views = {}
        for batch in runner.train_loop.dataloader:
            for image, sample in zip(batch["inputs"], batch["data_samples"], strict=True):
                views[sample.metainfo["view"]] = image
        assert len(views) == 16
        seen.append({str(view): views[view] for view in sorted(views)})
    for other in seen[1:]:
        assert_same(other, seen[0])
    assert len({image.shape for image in seen[0].values()}) > 4


def test_passes_beyond_the_views_see_the_first_ones_again(filled, data, checkpoint, tmp_path):
    runner = trained(training(data, checkpoint, tmp_path / "run", iters=13, store=str(filled)))
    assert len(history(runner, "loss")) == 13
    (hook,) = [hook for hook in runner.hooks if isinstance(hook, ReplayViews)]
    assert hook.views == 2


@pytest.mark.parametrize(("values", "bound"), [pytest.param("float16", 2e-3, marks=pytest.mark.slow), ("int8", 3e-2)])
def test_smaller_numbers_have_the_error_that_is_told(
    values, bound, data, checkpoint, running, filled, tmp_path, capsys
):
    path = dumped(training(data, checkpoint, tmp_path / "work"), tmp_path / "config.py")
    assert main(["cache", path, "--out", str(tmp_path / "store"), "--values", values]) == 0
    said = capsys.readouterr().out
    assert f"2 views of 16 images in {tmp_path / 'store'}" in said and f"error of {values}" in said
    small, exact = Store(tmp_path / "store"), Store(filled)
    assert small.size() < exact.size() * (0.56 if values == "float16" else 0.36)
    name = "0/neck[*]/0"
    ours, theirs = small.whole(0, name), exact.whole(0, name)
    if values == "int8":
        unit = small.whole(0, f"{name}/unit")
        assert unit.shape == (12, 1, 1)
        np.testing.assert_allclose(unit[:, 0, 0], np.abs(theirs).max((1, 2)) / 127, rtol=1e-6)
        assert (np.abs(ours * unit - theirs) <= unit * 0.5001).all()
    else:
        assert (ours == theirs.astype(np.float16)).all()
    kept = ours * unit if values == "int8" else ours.astype(np.float32)
    tap = list(small.about["taps"]).index("neck[*]")
    assert small.whole(0, "errors")[0, tap] >= 0.99 * np.linalg.norm(kept - theirs) / np.linalg.norm(theirs)
    runner = trained(training(data, checkpoint, tmp_path / "run", store=str(tmp_path / "store")))
    for term in ("ld_main", "feature_imitation", "soft_targets"):
        ours, theirs = (history(each, f"distill.{term}.loss")[0] for each in (runner, running))
        assert abs(ours - theirs) <= bound * theirs, term  # the students of later steps differ


def test_a_teacher_of_features_is_stored_like_any_other(data, tmp_path):
    terms = dict(terms=[dict(type="FeatureImitation", tap="neck[1]")])
    vit = by_file(tmp_path / "vit.pth")
    flips = [*PIPELINE[:2], dict(type="Resize", scale=(96, 96)), *PIPELINE[4:]]

    def config(folder, **more):
        found = training(data, "", folder, iters=4, pipeline=flips, terms=terms, hooks=[dict(type="ReplayViews")])
        found.model.teacher = dict(vit, **more)
        return found

    expected = weights(trained(config(tmp_path / "running")))
    store = str(tmp_path / "store")
    path = dumped(config(tmp_path / "work"), tmp_path / "config.py")
    assert main(["cache", path, "--out", store, "--values", "float32"]) == 0
    runner = trained(config(tmp_path / "run", store=store))
    assert_same(weights(runner), expected)
    assert all(parameter.is_meta for parameter in runner.model.distiller.teacher.model.parameters())


# --- filling it


def test_an_interrupted_store_is_completed_byte_for_byte(filled, data, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("kdgraft_mm.filling.PART", 1)  # a part for each batch
    path = dumped(training(data, checkpoint, tmp_path / "work"), tmp_path / "config.py")
    for name in ("whole", "broken"):
        assert main(["cache", path, "--out", str(tmp_path / name), "--values", "float32"]) == 0
    parts = sorted(path.name for path in (tmp_path / "whole").glob("part-*"))
    assert len(parts) == 16  # 8 parts, each with its checksum
    (tmp_path / "broken" / "part-000002.safetensors").unlink()
    (tmp_path / "broken" / "part-000005.sha256").unlink()
    with pytest.raises(DistillError, match="not complete: 2 of 8 parts"):
        trained(training(data, checkpoint, tmp_path / "run", store=str(tmp_path / "broken")))
    assert main(["cache", path, "--out", str(tmp_path / "broken"), "--values", "float32"]) == 0
    for name in parts:
        assert (tmp_path / "broken" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_several_processes_share_the_parts(data, checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("kdgraft_mm.filling.PART", 1)
    path = dumped(training(data, checkpoint, tmp_path / "work", iters=4), tmp_path / "config.py")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        assert main(["cache", path, "--out", str(tmp_path / "store"), "--epochs", "1"]) == 0
        assert len(Store(tmp_path / "store").missing()) == 2 * int(rank)
    assert "1 views of 16 images" in capsys.readouterr().out


# --- what cannot be meant


def test_views_of_other_pixels_are_refused(filled, data, checkpoint, tmp_path):
    other = copy.deepcopy(PIPELINE)
    other[4]["prob"] = 1.0
    with pytest.raises(DistillError, match="other pixels than the teacher saw") as caught:
        trained(training(data, checkpoint, tmp_path / "run", pipeline=other, store=str(filled)))
    assert "\n" not in str(caught.value)
    hooks = [dict(type="ReplayViews", seed=1)]
    with pytest.raises(DistillError, match="other pixels than the teacher saw"):
        trained(training(data, checkpoint, tmp_path / "seed", hooks=hooks, store=str(filled)))


def test_views_that_are_not_there_are_refused(filled, data, checkpoint, tmp_path):
    hooks = [dict(type="ReplayViews")]
    with pytest.raises(DistillError, match="has 2 views of each image, and this is number 3; set ReplayViews' views=2"):
        trained(training(data, checkpoint, tmp_path / "run", iters=9, hooks=hooks, store=str(filled)))


def test_a_host_that_replays_nothing_is_refused(filled, data, checkpoint, tmp_path):
    config = training(data, checkpoint, tmp_path / "run", store=str(filled))
    with pytest.raises(DistillError, match=r"add custom_hooks = \[dict\(type='ReplayViews'\)\]"):
        Runner.from_cfg(config).train()  # as tools/train.py does


def test_another_data_set_is_refused(filled, checkpoint, tmp_path):
    from kdgraft_bench.data.scenes import write_detection_set

    other = str(write_detection_set(tmp_path / "other", seed=6, train=24, val=4, test=4, size=96))
    with pytest.raises(DistillError, match=r"filled from another data set|other pixels"):
        trained(training(other, checkpoint, tmp_path / "run", store=str(filled)))


def test_another_teacher_is_refused(filled, data, checkpoint, tmp_path):
    config = training(data, checkpoint, tmp_path / "run", store=str(filled))
    config.model.teacher.config.backbone.depth = 34
    with pytest.raises(DistillError, match=r"outputs of another teacher \(model differs\)"):
        trained(config)


def test_taps_that_are_not_there_are_refused(filled, data, checkpoint, tmp_path):
    terms = dict(terms=[dict(type="FeatureImitation", tap="backbone[1]")])
    with pytest.raises(DistillError, match=r"has bbox_head.*neck\[\*\].* of the teacher, not backbone\[1\]"):
        trained(training(data, checkpoint, tmp_path / "run", terms=terms, store=str(filled)))


def test_damage_is_refused(filled, data, checkpoint, tmp_path):
    shutil.copytree(filled, tmp_path / "store")
    part = tmp_path / "store" / "part-000000.safetensors"
    content = bytearray(part.read_bytes())
    content[-5] ^= 1
    part.write_bytes(bytes(content))
    with pytest.raises(DistillError, match=r"part-000000\.safetensors is damaged; remove it"):
        trained(training(data, checkpoint, tmp_path / "run", store=str(tmp_path / "store")))


@pytest.mark.parametrize("term", [dict(type="CrossHead"), dict(type="WeightMatching", modules="neck")])
def test_terms_that_run_the_teacher_are_refused(term, filled, data, checkpoint, tmp_path, capsys):
    told = ("in each step, or reads its weights, and",)
    config = training(data, checkpoint, tmp_path / "run", terms=dict(terms=[term]), store=str(filled))
    refused(capsys, ["check", dumped(config, tmp_path / "train.py")], *told, "its outputs come from a store")
    path = dumped(training(data, checkpoint, tmp_path / "run", terms=dict(terms=[term])), tmp_path / "fill.py")
    refused(capsys, ["cache", path, "--out", str(tmp_path / "store")], *told)


def test_terms_on_proposals_are_refused(data, tmp_path, capsys):
    from support.det_stages import staged

    teacher = staged("Faster R-CNN")
    model = distilled(staged("Faster R-CNN"), teacher, save_teacher(tmp_path / "t.pth", teacher), terms=["SoftTargets"])
    path = dumped(runner_config(model, data, tmp_path / "work"), tmp_path / "config.py")
    refused(capsys, ["cache", path, "--out", str(tmp_path / "store")], "would run on the student's proposals")


def test_a_pipeline_that_remembers_images_is_refused(data, checkpoint, tmp_path, capsys):
    pipeline = [*PIPELINE[:2], dict(type="CachedMosaic", img_scale=(96, 96), max_cached_images=6), *PIPELINE[4:]]
    path = dumped(training(data, checkpoint, tmp_path / "work", pipeline=pipeline), tmp_path / "config.py")
    refused(capsys, ["cache", path, "--out", str(tmp_path / "store")], "another view when one is replayed", "Mosaic")


def test_batches_that_are_drawn_after_the_pipeline_are_refused(data, checkpoint, tmp_path, capsys):
    config = training(data, checkpoint, tmp_path / "work")
    config.model.data_preprocessor.batch_augments = [
        dict(type="BatchSyncRandomResize", random_size_range=(64, 128), size_divisor=32, interval=1)
    ]
    path = dumped(config, tmp_path / "config.py")
    refused(capsys, ["cache", path, "--out", str(tmp_path / "store")], "BatchSyncRandomResize changes whole batches")


def test_mistakes_of_the_command_are_said(data, checkpoint, tmp_path, capsys):
    path = dumped(training(data, checkpoint, tmp_path / "work"), tmp_path / "config.py")
    refused(capsys, ["cache", path], "name a folder: --out FOLDER")
    refused(
        capsys, ["cache", path, "--out", str(tmp_path / "s"), "--epochs", "0"], "--epochs must be a whole number >= 1"
    )
    refused(capsys, ["cache", path, "--out", str(tmp_path / "s"), "--top-k", "5"], "--top-k is for language models")
    plain = training(data, checkpoint, tmp_path / "work")
    plain.model = detector()
    refused(
        capsys,
        ["cache", dumped(plain, tmp_path / "plain.py"), "--out", str(tmp_path / "s")],
        "nothing is read of a teacher",
    )
    inherits = training(data, checkpoint, tmp_path / "work", store=str(tmp_path / "s"))
    inherits.model.inherit = "bbox_head"
    refused(capsys, ["check", dumped(inherits, tmp_path / "i.py")], "there is no store in", progress=True)


def test_the_store_says_whose_outputs_it_holds(filled):
    about = json.loads((filled / "store.json").read_text())
    assert about["teacher"]["classes"] == list(CLASSES) and about["views"] == 2 and about["images"] == 16
    neck = about["taps"]["neck[*]"]["leaves"]
    assert [leaf["axes"] for leaf in neck] == [["image", "fixed", ["height", s], ["width", s]] for s in (8, 16, 32)]


def test_check_prints_the_wiring_with_a_store(filled, data, checkpoint, tmp_path, capsys):
    path = dumped(training(data, checkpoint, tmp_path / "work", store=str(filled)), tmp_path / "config.py")
    assert main(["check", path]) == 0
    assert "distill.ld_vlr.loss" in capsys.readouterr().out


def test_a_student_is_exported_from_such_a_run(filled, data, checkpoint, tmp_path):
    trained(training(data, checkpoint, tmp_path / "run", iters=3, store=str(filled)))
    assert main(["export", str(tmp_path / "run" / "iter_3.pth"), str(tmp_path / "student.pth")]) == 0
    assert Config.fromfile(tmp_path / "student.py").model.type == "GFL"
    assert not any("distiller" in key for key in torch.load(tmp_path / "student.pth")["state_dict"])


def test_outputs_of_queries_have_their_images_on_another_axis(data, tmp_path):
    from support.det_stages import detr

    teacher, fixed = detr("DeformableDETR"), [*PIPELINE[:2], dict(type="Resize", scale=(96, 96)), *PIPELINE[4:]]
    weights_of_teacher = save_teacher(tmp_path / "teacher.pth", teacher)

    def config(folder, **more):
        model = distilled(detr("DeformableDETR"), teacher, weights_of_teacher, terms=["SoftTargets"])
        model["teacher"] |= more
        found = runner_config(model, data, folder, iters=3, custom_hooks=[dict(type="ReplayViews", views=1)])
        found.train_dataloader.dataset.pipeline = copy.deepcopy(fixed)
        return found

    expected = trained(config(tmp_path / "running"))
    store = str(tmp_path / "store")
    path = dumped(config(tmp_path / "work"), tmp_path / "config.py")
    assert main(["cache", path, "--out", store, "--values", "float32"]) == 0
    axes = [leaf["axes"] for tap in Store(store).about["taps"].values() for leaf in tap["leaves"]]
    assert ["fixed", "image", "fixed", "fixed"] in axes
    found = trained(config(tmp_path / "run", store=store))
    assert history(found, "distill.soft_targets.loss") == history(expected, "distill.soft_targets.loss")
    assert_same(weights(found), weights(expected))


def test_a_teacher_of_its_own_resolution_is_stored_in_it(data, checkpoint, tmp_path):
    terms = dict(terms=[dict(type="FeatureImitation", tap="neck[*]")])

    def config(folder, **more):
        hooks = [dict(type="ReplayViews", views=1)]
        return training(data, checkpoint, folder, iters=3, hooks=hooks, terms=terms, scale=2.0, **more)

    expected = weights(trained(config(tmp_path / "running")))
    store = str(tmp_path / "store")
    path = dumped(config(tmp_path / "work"), tmp_path / "config.py")
    assert main(["cache", path, "--out", store, "--values", "float32"]) == 0
    assert_same(weights(trained(config(tmp_path / "run", store=store))), expected)
    half = config(tmp_path / "half", store=store)
    half.model.teacher.pop("scale")
    with pytest.raises(DistillError, match=r"another teacher \(scale differs\)"):
        trained(half)


def mosaics(loader):
    """Images of four, as YOLOX and RTMDet learn from."""
    inner = copy.deepcopy(dict(loader["dataset"], pipeline=PIPELINE[:2]))
    steps = [dict(type="Mosaic", img_scale=(64, 64)), dict(type="RandomFlip", prob=0.5), PIPELINE[-1]]
    loader["dataset"] = dict(type="MultiImageMixDataset", dataset=inner, pipeline=copy.deepcopy(steps))


def alike(loader):
    """Batches of images of one orientation, as in most configs of MMDetection."""
    loader["batch_sampler"] = dict(type="AspectRatioBatchSampler")


@pytest.mark.parametrize("change", [mosaics, alike])
def test_loaders_of_the_host_are_replayed(change, data, checkpoint, tmp_path):
    terms = dict(terms=[dict(type="FeatureImitation", tap="neck[*]")])

    def config(folder, **more):
        found = training(data, checkpoint, folder, hooks=[dict(type="ReplayViews", views=2)], terms=terms, **more)
        change(found.train_dataloader)
        return found

    expected = trained(config(tmp_path / "running"))
    store = str(tmp_path / "store")
    path = dumped(config(tmp_path / "work"), tmp_path / "config.py")
    assert main(["cache", path, "--out", store, "--values", "float32"]) == 0
    assert_same(weights(trained(config(tmp_path / "run", store=store))), weights(expected))


SCRIPT = """
import kdgraft_mm.filling
kdgraft_mm.filling.PART = 1
from kdgraft.cli import main
sys.exit(main(["cache", "config.py", "--out", sys.argv[1]]))
"""


@pytest.mark.slow
def test_ten_kills_leave_the_same_store_byte_for_byte(data, checkpoint, tmp_path):
    config = training(data, checkpoint, tmp_path / "work")
    config.train_dataloader.batch_size = 1
    dumped(config, tmp_path / "config.py")
    assert_kills_change_nothing(SCRIPT, tmp_path)
