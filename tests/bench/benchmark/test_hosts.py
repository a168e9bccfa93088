"""What the benchmark asks of each host: configs that train, figures of finished runs, costs and pictures, all on real models."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from mmdet.registry import DATASETS
from mmengine.config import Config

import support.nlp  # noqa: F401  quiet, one thread
from kdgraft.errors import DistillError
from kdgraft.plans import carry_out
from kdgraft_bench.benchmark.costs import latency_of, measure_costs, step_of
from kdgraft_bench.benchmark.forecast import forecast
from kdgraft_bench.benchmark.planned import plan_of_benchmark
from kdgraft_bench.benchmark.working import CALIBRATION, DECISIONS, carry_out_one
from kdgraft_bench.decisions import Decisions
from kdgraft_bench.hosts import bench_host
from kdgraft_bench.spec import Model, read_benchmark
from kdgraft_mm.configs import load_config
from kdgraft_nlp.settings import load
from support.bench import write_masks, write_scenes, write_texts

SETS = {"det": write_scenes, "seg": write_masks, "nlp": write_texts}
METHODS = {"det": "ld", "seg": "cwd", "nlp": "soft_targets"}
METRICS = {"det": "AP", "seg": "boundary F", "nlp": "accuracy"}


@pytest.fixture(scope="module", params=list(SETS))
def made(request, tmp_path_factory):
    """Carry out teacher, plain and one distilled student of a benchmark that ships, on a tiny set in the place of its own."""
    folder = tmp_path_factory.mktemp(request.param)
    data = folder / "data"
    data.mkdir()
    told = read_benchmark(
        request.param,
        data=str(SETS[request.param](data)),
        methods=[METHODS[request.param]],
        seeds=[0],
        iterations=2,
        out=str(folder / "out"),
        batches=[1, 2],
    )
    if request.param == "nlp":
        tiny = Model(settings=dict(model="bert", width=8, layers=1))
        told = replace(told, teacher=tiny, students={"small": tiny})
    else:
        told = replace(told, batch=2)
    host = bench_host(told.host)
    dataset = host.dataset(told)
    plan = plan_of_benchmark(told, host, dataset)
    done = {name: carry_out_one(told, plan, name, 0) for name, _, _ in told.trained()}
    return told, host, dataset, plan, done


def test_every_run_is_tested(made):
    told, _, _, plan, done = made
    for name, one in done.items():
        assert METRICS[told.host] in one.metrics, name
        assert all(math.isfinite(value) for key, value in one.metrics.items() if key != CALIBRATION)
        decided = Decisions.read(plan.folder(name, 0) / DECISIONS)
        assert len(decided.label) == len(decided.predicted) == len(decided.sample) > 0
        assert decided.label.max() < len(decided.names) and decided.predicted.max() <= len(decided.names)


def test_all_models_decide_on_the_same_items(made):
    *_, plan, done = made
    first, *others = (Decisions.read(plan.folder(name, 0) / DECISIONS) for name in done)
    for other in others:
        assert np.array_equal(first.label, other.label) and np.array_equal(first.sample, other.sample)


def test_the_host_s_own_metric_is_that_of_its_own_test(made):
    told, host, _, plan, done = made
    if told.host == "nlp":
        decided = Decisions.read(plan.folder("teacher", 0) / DECISIONS)
        assert done["teacher"].metrics["accuracy"] == pytest.approx((decided.label == decided.predicted).mean())
    else:
        trained = done["teacher"].model
        found = __import__("kdgraft_mm.evaluation", fromlist=["evaluate"]).evaluate(trained.config, trained.weights)
        assert host.named(found).items() <= {**done["teacher"].metrics, "boundary F": 0.0}.items()


def test_on_a_real_set_models_are_called_by_what_they_are_there(made):
    told, host, dataset, *_ = made
    found = host.on(told, dataset)
    assert "scenes" not in found.teacher.title
    assert ("scenes" in told.teacher.title) == (told.host == "det")
    assert host.on(told, replace(dataset, real=None)) == told


def test_costs_are_those_of_the_plain_model_and_of_its_training(made, tmp_path):
    told, _, _, plan, done = made
    trained = {name: one.model for name, one in done.items()}
    found = measure_costs(told, plan, trained, tmp_path / "log.txt", rounds=1)
    method = f"small-{METHODS[told.host]}"
    assert set(found) == {"teacher", "small-plain", method, *(f"small-{peer}" for peer in told.peers)}
    for name in found:
        for figure in (
            "parameters (k)",
            "MFLOPs",
            "size (MiB)",
            latency_of(1),
            latency_of(2),
            "step (ms)",
            "step memory (MiB)",
        ):
            assert found[name][figure] > 0, (name, figure)
    assert (
        found[method]["parameters (k)"] == found["small-plain"]["parameters (k)"] <= found["teacher"]["parameters (k)"]
    )


def test_how_long_trainings_take_is_told_by_their_first_steps(made, tmp_path):
    told, host, dataset, _, done = made
    fresh = replace(told, out=tmp_path / "out")
    fresh.out.mkdir()
    plan = plan_of_benchmark(fresh, host, dataset)
    names = {"teacher", f"small-{METHODS[told.host]}"}
    assert names <= set(done)
    found = forecast(fresh, plan, names, tmp_path / "log.txt")
    assert set(found.seconds) == names and not found.failures
    assert all(0 < seconds < 600 for seconds in found.seconds.values())


def test_the_steps_of_a_training_are_counted(made, tmp_path):
    told, _, _, plan, _ = made
    (run,) = (run for run in plan.runs if run.name == "small-plain")
    step = step_of(bench_host(told.host), run, {})
    assert step.count == 2  # the iterations of the fixture
    saved = step.save(tmp_path)
    assert saved.config and Path(saved.weights).exists()


def test_the_models_are_drawn(made, tmp_path):
    _, host, dataset, _, done = made
    models = {name: one.model for name, one in done.items()}
    host.draw(models, dataset, [0, 1], tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000


def test_mmdetection_s_own_distillation_runs_as_a_peer(made):
    told, _, _, _, done = made
    if told.host != "det":
        assert not told.peers
        return
    config = Config.fromfile(done["small-mmdet_ld"].model.config)
    assert config.model.type == "KnowledgeDistillationSingleStageDetector"
    assert config.model.teacher_ckpt == done["teacher"].model.weights
    keys = [
        set(torch.load(done[f"small-{name}"].model.weights, weights_only=False)["state_dict"])
        for name in ("plain", "mmdet_ld")
    ]
    assert keys[0] == keys[1]


def test_finished_runs_are_not_made_again(made):
    told, _, _, plan, done = made
    assert set(carry_out(plan, dry_run=True)) == {(name, 0) for name in done}
    again = carry_out_one(told, plan, "teacher", 0)
    assert (
        again.metrics == pytest.approx(done["teacher"].metrics, nan_ok=True)
        and again.seconds == done["teacher"].seconds
    )


def test_a_model_that_is_unknown_is_refused(made):
    told, host, dataset, *_ = made
    (first, *_) = host.models
    for settings, said in (
        (dict(model="gpt5"), "no small model is called 'gpt5'"),
        (dict(model=first, wide=3), "takes no 'wide'"),
    ):
        with pytest.raises(DistillError, match=said):
            host.config(Model(settings=settings), dataset, told, "x")


def test_the_samples_of_a_step_are_those_that_are_told(made):
    told, host, dataset, *_ = made
    found = []
    for count in (None, 3):
        path, _ = host.config(told.teacher, dataset, replace(told, batch=count, out=told.out / "other"), "x")
        if told.host == "nlp":
            found.append(load(path)["training"]["per_device_train_batch_size"])
        else:
            found.append(load_config(path).train_dataloader.batch_size)
    assert found[0] > 3 == found[1]


def test_students_see_a_part_of_the_teacher_s_scenes(tmp_path, monkeypatch):
    monkeypatch.setattr("kdgraft_bench.hosts.det_setup.DATA", dict(seed=0, train=12, val=2, test=2))
    monkeypatch.setattr("kdgraft_bench.hosts.det_setup.MOST", 12)
    told, host = read_benchmark("det", out=str(tmp_path)), bench_host("det")
    dataset = host.dataset(told)
    seen = []
    for count in (12, 5):
        model = Model(settings=dict(model="gfl", scenes=count))
        config = load_config(host.config(model, dataset, told, f"of{count}")[0])
        with host.entered():
            images = DATASETS.build(config.train_dataloader.dataset)
            tested = DATASETS.build(config.val_dataloader.dataset)
        seen.append([images.get_data_info(place)["img_path"] for place in range(len(images))])
        assert len(images) == count and len(tested) == 2
    assert seen[0][:5] == seen[1]
    for wrong in (0, 13, 2.5, True):
        with pytest.raises(DistillError, match="scenes must be a whole number from 1 to 12"):
            host.config(Model(settings=dict(model="gfl", scenes=wrong)), dataset, told, "x")


OWN = {
    "det": "mmdet::gfl/gfl_r50_fpn_1x_coco.py",
    "seg": "mmseg::pspnet/pspnet_r18-d8_4xb2-80k_cityscapes-512x1024.py",
}


@pytest.mark.parametrize("name", list(OWN))
def test_a_config_of_one_s_own_trains_on_the_named_data(tmp_path, name):
    data = tmp_path / "data"
    data.mkdir()
    root = SETS[name](data)
    told = read_benchmark(name, data=str(root), out=str(tmp_path / "out"), seeds=[0])
    host = bench_host(name)
    dataset = host.dataset(told)
    path, options = host.config(Model(config=OWN[name]), dataset, told, "mine")
    before, after = load_config(OWN[name]), Config.fromfile(path)
    assert options == {}
    for part, split in (("train", "train"), ("val", "val"), ("test", "val")):
        found, known = after[f"{part}_dataloader"].dataset, before[f"{part}_dataloader"].dataset
        assert str(dataset.folder.resolve()) == found.data_root and split in str(found)
        assert found.pipeline == known.pipeline and len(found.metainfo.classes) == len(host.setup(dataset).classes)
    heads = [after.model.bbox_head] if name == "det" else [after.model.decode_head, after.model.auxiliary_head]
    assert {head.num_classes for head in heads} == {len(host.setup(dataset).classes)}
    assert before.model.get("bbox_head", before.model.get("decode_head")).num_classes in (80, 19)


def test_without_data_a_config_of_one_s_own_stays_as_it_is(tmp_path):
    told = read_benchmark("det", out=str(tmp_path / "out"))
    own = Model(config=OWN["det"])
    told = replace(told, teacher=own, students={"small": own}, iterations=7)
    host = bench_host("det")
    dataset = host.dataset(told)
    assert dataset.folder is None and host.config(own, dataset, told, "x") == (OWN["det"], {})
    with pytest.raises(DistillError, match="counts epochs; leave iterations out"):
        host.length(own, told)
    assert host.length(told.students["small"], replace(told, iterations=None)) == {}
    by_iterations = Model(config=OWN["seg"])
    assert bench_host("seg").length(by_iterations, told) == {"train_cfg.max_iters": 7}
    assert host.length(Model(settings=dict(model="gfl")), told) == {}
