"""Inference and export: a distilled config or checkpoint works wherever the plain one does, without the teacher or this suite."""

from __future__ import annotations

import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from mmdet.apis import DetInferencer, inference_detector, init_detector
from mmengine.config import Config
from mmengine.runner import Runner

from kdgraft.errors import DistillError, UnsafeCheckpoint
from kdgraft.sources.teacher import read_checkpoint
from kdgraft_mm.checkpoints import SAFE_TYPES, export_student
from support.det import EVERY_TERM, build, detector, distilled, runner_config, save_teacher
from support.forking import python
from support.mm import loadable, run
from support.tensors import assert_same

TEST_PIPELINE = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=(96, 96), keep_ratio=True),
    dict(type="PackDetInputs", meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")),
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, scenes, teacher_model):
    """A distilled run of two iterations, its config as a file, and its teacher's checkpoint deleted."""
    folder = tmp_path_factory.mktemp("inference")
    teacher = Path(save_teacher(folder / "teacher.pth", teacher_model))
    model = distilled(detector(), teacher_model, str(teacher), **EVERY_TERM)
    config = runner_config(model, scenes, folder / "work", iters=2)
    for split in ("val", "test"):
        config[f"{split}_dataloader"].dataset.pipeline = TEST_PIPELINE
    config.visualizer = dict(type="DetLocalVisualizer", vis_backends=[], name="visualizer")
    run(config)
    config.dump(folder / "distilled.py")
    teacher.unlink()
    return folder


@pytest.fixture(scope="module")
def image(scenes):
    return str(sorted((Path(scenes) / "test").glob("*.*"))[0])


@pytest.fixture(scope="module")
def expected(trained, image):
    """What the plain detector with the trained weights finds."""
    config = Config.fromfile(trained / "distilled.py")
    config.model = detector()
    config.pop("custom_imports")
    plain = init_detector(config, None, device="cpu")
    state = read_checkpoint(trained / "work" / "iter_2.pth", safe_types=SAFE_TYPES)["state_dict"]
    plain.load_state_dict(state, strict=True)
    found = inference_detector(plain, image).pred_instances
    assert len(found) > 0
    return found


def test_init_detector_with_the_distilled_config(trained, image, expected):
    model = init_detector(str(trained / "distilled.py"), loadable(trained / "work" / "iter_2.pth"), device="cpu")
    found = inference_detector(model, image).pred_instances
    assert torch.equal(found.bboxes, expected.bboxes) and torch.equal(found.scores, expected.scores)
    assert model.dataset_meta["classes"] == tuple("0123456789")


@pytest.mark.parametrize("given", ["config and weights", "weights alone"])
def test_det_inferencer(trained, image, expected, given):
    model = str(trained / "distilled.py") if given == "config and weights" else None
    inferencer = DetInferencer(
        model=model, weights=loadable(trained / "work" / "iter_2.pth"), device="cpu", show_progress=False
    )
    (found,) = inferencer(image, no_save_vis=True)["predictions"]
    np.testing.assert_allclose(found["bboxes"], expected.bboxes.numpy(), rtol=1e-5)
    np.testing.assert_allclose(found["scores"], expected.scores.numpy(), rtol=1e-5)
    assert found["labels"] == expected.labels.tolist()


def test_a_runner_tests_and_validates_without_the_teacher(trained, tmp_path):
    config = Config.fromfile(trained / "distilled.py")
    config.update(
        work_dir=str(tmp_path), load_from=loadable(trained / "work" / "iter_2.pth"), experiment_name="no teacher"
    )
    runner = Runner.from_cfg(config)
    assert "coco/bbox_mAP" in runner.test()
    assert "coco/bbox_mAP" in runner.val()
    with pytest.raises(DistillError, match=r"checkpoint not found: .*teacher\.pth"):
        Runner.from_cfg(config).train()


def test_inference_works_without_the_teachers_config_too(trained, image, expected, tmp_path):
    config = Config.fromfile(trained / "distilled.py")
    config.model.teacher = dict(config="gone/teacher.py", checkpoint="gone/teacher.pth")
    model = init_detector(config, loadable(trained / "work" / "iter_2.pth"), device="cpu")
    found = inference_detector(model, image).pred_instances
    assert torch.equal(found.bboxes, expected.bboxes)


@pytest.fixture(scope="module")
def exported(trained):
    return export_student(trained / "work" / "iter_2.pth", trained / "out" / "student.pth")


def test_export_writes_plain_weights_and_a_plain_config(trained, exported):
    weights, config = exported
    assert (weights.name, config.name) == ("student.pth", "student.py")
    saved = torch.load(weights, weights_only=True)  # nothing but tensors and plain values
    build(detector()).load_state_dict(saved["state_dict"], strict=True)
    source = read_checkpoint(trained / "work" / "iter_2.pth", safe_types=SAFE_TYPES)
    assert_same(dict(saved["state_dict"]), dict(source["state_dict"]))
    assert saved["meta"]["dataset_meta"]["classes"] == tuple("0123456789")
    for text in (saved["meta"]["cfg"], config.read_text()):
        assert "kdgraft" not in text and "Distilled" not in text and "teacher" not in text
    plain = Config.fromfile(config)
    assert plain.model.type == "GFL"
    assert plain.model.to_dict() == Config(dict(model=detector())).model.to_dict()
    assert "custom_imports" not in plain


def test_the_export_works_in_a_process_without_this_suite(exported, image, expected):
    weights, config = exported
    code = f"""
        import sys
        class Refuse:
            def find_spec(self, name, path=None, target=None):
                if name.partition(".")[0].startswith("kdgraft"):
                    raise ImportError(name)
        sys.meta_path.insert(0, Refuse())
        import torch
        from mmdet.apis import inference_detector, init_detector
        from mmengine.registry import init_default_scope
        torch.set_num_threads(1)
        model = init_detector({str(config)!r}, None, device="cpu")
        model.load_state_dict(torch.load({str(weights)!r}, weights_only=True)["state_dict"], strict=True)
        found = inference_detector(model, {image!r}).pred_instances
        assert not any(name.startswith("kdgraft") for name in sys.modules)
        print("scores", *found.scores.tolist())
    """
    done = python("-c", textwrap.dedent(code), host="mmdet")
    assert done.returncode == 0, done.stderr[-3000:]
    line = next(line for line in done.stdout.splitlines() if line.startswith("scores"))
    np.testing.assert_allclose([float(value) for value in line.split()[1:]], expected.scores.numpy(), rtol=1e-5)


def test_the_exported_checkpoint_is_a_teacher_of_the_next_generation(exported):
    weights, config = exported
    model = build(distilled(detector(), str(config), str(weights), **EVERY_TERM))
    assert type(model.distiller.teacher.model).__name__ == "GFL"


def test_export_refuses_what_it_cannot_read(tmp_path, teacher_model):
    with pytest.raises(DistillError, match="checkpoint not found"):
        export_student(tmp_path / "absent.pth", tmp_path / "out.pth")
    torch.save({"state_dict": {}}, tmp_path / "bare.pth")
    with pytest.raises(DistillError, match="holds no config"):
        export_student(tmp_path / "bare.pth", tmp_path / "out.pth")
    (tmp_path / "text.pth").write_text("not a checkpoint")
    with pytest.raises(DistillError, match="cannot read checkpoint"):
        export_student(tmp_path / "text.pth", tmp_path / "out.pth")
    torch.save({"state_dict": {}, "meta": {"cfg": Path("x")}}, tmp_path / "foreign.pth")
    with pytest.raises(UnsafeCheckpoint, match="trusted=True"):
        export_student(tmp_path / "foreign.pth", tmp_path / "out.pth")
    assert not (tmp_path / "out.pth").exists()
