"""Benchmarks of published pairs: full-size models on miniatures in the layout of COCO and Cityscapes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from kdgraft import toml
from kdgraft.cli import main
from kdgraft.errors import DistillError
from kdgraft_bench.records import read_rows
from kdgraft_bench.spec import SHIPPED, read_benchmark

pytest.importorskip("mmdet")
pytest.importorskip("mmseg")
import cv2
from mmdet.datasets import CocoDataset
from mmengine.registry import MODELS, DefaultScope

from kdgraft_bench.benchmark.planned import plan_of_benchmark
from kdgraft_bench.hosts import bench_host
from kdgraft_mm.configs import load_config

ANCHORS = ("coco-gfl", "coco-retinanet", "cityscapes-pspnet")
NO_DOWNLOAD = {"_delete_": True}


def coco(root: Path, count: int = 4) -> None:
    """Pictures with one box each, in COCO's layout and with its classes."""
    for split in ("train", "val"):
        folder = root / f"data/coco/{split}2017"
        folder.mkdir(parents=True)
        images, boxes = [], []
        for place in range(count):
            picture = np.random.default_rng(place).integers(0, 255, (60, 80, 3), dtype=np.uint8)
            cv2.imwrite(str(folder / f"{place}.jpg"), picture)
            images.append(dict(id=place, file_name=f"{place}.jpg", width=80, height=60))
            box = [10 + place, 8, 30, 40]
            boxes.append(dict(id=place, image_id=place, category_id=place + 1, bbox=box, area=1200, iscrowd=0))
        names = [dict(id=place, name=name) for place, name in enumerate(CocoDataset.METAINFO["classes"], 1)]
        (root / "data/coco/annotations").mkdir(exist_ok=True)
        file = root / f"data/coco/annotations/instances_{split}2017.json"
        file.write_text(json.dumps(dict(images=images, annotations=boxes, categories=names)))


def cityscapes(root: Path, count: int = 4) -> None:
    for split in ("train", "val"):
        for kind in ("leftImg8bit", "gtFine"):
            (root / f"data/cityscapes/{kind}/{split}/town").mkdir(parents=True)
        for place in range(count):
            generator = np.random.default_rng(place)
            picture, labels = generator.integers(0, 255, (64, 128, 3)), generator.integers(0, 19, (64, 128))
            names = (
                f"leftImg8bit/{split}/town/{place}_leftImg8bit.png",
                f"gtFine/{split}/town/{place}_gtFine_labelTrainIds.png",
            )
            for name, values in zip(names, (picture, labels), strict=True):
                cv2.imwrite(str(root / "data/cityscapes" / name), values.astype(np.uint8))


def written(value) -> str:
    """A value as TOML."""
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{json.dumps(key)} = {written(one)}" for key, one in value.items()) + " }"
    return json.dumps(value)


def miniature(root: Path, name: str) -> Path:
    """A copy of a benchmark whose students train on small pictures for an epoch, or some iterations, and download nothing."""
    told = toml.loads((SHIPPED / f"{name}.toml").read_text())
    if name.startswith("coco"):
        coco(root)
        small = {
            f"{part}_dataloader.dataset.pipeline.{step}.scale": [96, 64]
            for part, step in (("train", 2), ("test", 1), ("val", 1))
        }
        small |= {"train_dataloader.batch_size": 1, "train_cfg.max_epochs": 1, "train_cfg.val_interval": 1}
        small |= {"model.backbone.init_cfg": NO_DOWNLOAD}
    else:
        cityscapes(root)
        small = {"train_dataloader.batch_size": 2, "train_cfg.max_iters": 3, "train_cfg.val_interval": 3}
        small |= {"crop_size": [64, 64], "train_dataloader.dataset.pipeline.2.scale": [128, 64]}
        small |= {"train_dataloader.dataset.pipeline.3.crop_size": [64, 64], "model.data_preprocessor.size": [64, 64]}
        small |= {"default_hooks.checkpoint.interval": 3, "model.pretrained": str(root / "backbone.pth")}
        torch.save({"state_dict": {}}, root / "backbone.pth")  # of nothing, in place of a download
        small |= {f"{part}_dataloader.dataset.pipeline.1.scale": [128, 64] for part in ("val", "test")}
        for part in ("backbone", "decode_head", "auxiliary_head"):
            small[f"model.{part}.norm_cfg.type"] = "BN"
    small |= {f"{part}_dataloader.num_workers": 0 for part in ("train", "val", "test")}
    small |= {f"{part}_dataloader.persistent_workers": False for part in ("train", "val", "test")}
    for model in (told["teacher"], *told["students"].values()):
        model["options"] = {**model.get("options", {}), **small}
        if "_ms-" in model["config"]:  # trained on several scales
            model["options"]["train_dataloader.dataset.pipeline.2.scale"] = [[96, 64], [96, 64]]
    told["out"], told["seeds"], told["batches"] = str(root / "out"), [0], [1]
    lines = [f"{key} = {json.dumps(told.pop(key))}" for key in ("host", "out", "seeds", "batches")]
    for kind, entry in told.items():
        tables = {kind: entry} if kind == "teacher" else {f"{kind}.{key}": one for key, one in entry.items()}
        for title, table in tables.items():
            lines += [f"[{title}]", *(f"{key} = {written(value)}" for key, value in table.items())]
    path = root / f"{name}.toml"
    path.write_text("\n".join(lines))
    return path


def teacher_of(path: Path) -> str:
    """A file of random weights of a benchmark's teacher."""
    told = toml.loads(path.read_text())
    config = load_config(told["teacher"]["config"])
    config.merge_from_dict(told["teacher"]["options"])
    with DefaultScope.overwrite_default_scope("mmdet" if told["host"] == "det" else "mmseg"):
        model = MODELS.build(config.model)
    file = path.with_suffix(".pth")
    torch.save({"state_dict": model.state_dict(), "meta": {}}, file)
    return str(file)


@pytest.mark.parametrize("name", ANCHORS)
def test_the_runs_are_those_of_the_papers(name, tmp_path):
    told = read_benchmark(name, out=str(tmp_path / "out"))
    host = bench_host(told.host)
    plan = plan_of_benchmark(told, host, host.dataset(told))
    taught = {run.name: run.recipe for run in plan.runs if run.teachers}
    assert taught == {f"{student}-{method}": method for student in told.students for method in told.methods}
    metric = "AP" if told.host == "det" else "mIoU"
    plain = next(iter(told.students.values())).published[metric]
    assert plain < told.teacher.published.get(metric, 100.0)
    assert (metric in told.teacher.published) == (told.host == "det")
    assert told.published and all(one[metric] > plain for one in told.published.values())


def test_published_figures_that_mean_nothing_are_refused(tmp_path):
    file = tmp_path / "mine.toml"
    text = (SHIPPED / "coco-gfl.toml").read_text()
    file.write_text(text.replace("published = { AP = 0.437 }", "published = 0.437"))
    with pytest.raises(DistillError, match="method 'crosskd': published must be a table such as"):
        read_benchmark(str(file))
    file.write_text(text + '\n[students.r18]\nconfig = "mmdet::gfl/gfl_r50_fpn_1x_coco.py"\n')
    with pytest.raises(DistillError, match="published figures of methods are of one student"):
        read_benchmark(str(file))
    with pytest.raises(DistillError, match=r"teacher: there is no checkpoint .*absent\.pth"):
        read_benchmark("coco-gfl", teacher="absent.pth")


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", ANCHORS)
def test_a_benchmark_of_a_published_pair_runs_on_a_miniature(name, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    path = miniature(tmp_path, name)
    command = ["bench", str(path), "--teacher", teacher_of(path)]
    assert main([*command, "--dry-run"]) == 0
    said = capfd.readouterr().out
    assert "each takes" in said and "step memory" in said and "MiB" in said, said
    assert main(command) == 0
    told, rows = read_benchmark(str(path)), read_rows(tmp_path / "out")
    student = next(iter(told.students))
    assert set(rows) == {("teacher", "teacher", 0), *((student, method, 0) for method in ("plain", *told.methods))}
    table = (tmp_path / "out/table.md").read_text()
    assert "published" in table
    for figures in told.published.values():
        assert all(str(value).rstrip("0") in table for value in figures.values())
