"""The detection demo's second pair: it runs where it is named, with real detectors, recipes, pictures and files."""

from __future__ import annotations

import cv2
import pytest
import torch
from mmdet.registry import MODELS

from kdgraft_bench import comparison as runner
from kdgraft_bench.comparison import Training
from kdgraft_bench.demos import det as demo
from kdgraft_bench.demos import queries
from support.det import losses, raw_batch, save_teacher

SMALL = dict(seed=0, train=8, val=4, test=5)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "DATA", SMALL)
        for name in ("EVALUATIONS", "ROUNDS"):
            patch.setattr(demo, name, 1)
        patch.setattr(queries, "BATCH", 2)
        return out, demo.main(recipes="kddetr", out=str(out), iterations=2)


@pytest.mark.slow
def test_a_student_with_queries_learns_from_a_wider_one(finished):
    out, results = finished
    assert {(result.method, result.model) for result in results} == {
        ("teacher", "DINO-R18, width 16"),
        ("plain", "DINO-R18, width 6"),
        ("kddetr", "DINO-R18, width 6"),
    }
    figures = {(result.method, result.metric): result.value for result in results}
    for size in ("parameters (k)", "MFLOPs"):
        assert figures["teacher", size] > 1.5 * figures["plain", size] > 0
        assert figures["kddetr", size] == figures["plain", size]
    states = [torch.load(out / "detr/seed0" / name / "iter_2.pth", weights_only=False) for name in ("plain", "kddetr")]
    assert states[0]["state_dict"].keys() == states[1]["state_dict"].keys()


def test_its_files_are_in_a_folder_of_its_own(finished):
    out, _ = finished
    assert {path.name for path in out.iterdir()} == {"data", "data.lock", "detr"}
    assert "kddetr" in (out / "detr/table.md").read_text()
    for name in ("detections.png", "curves.png"):
        assert cv2.imread(str(out / "detr" / name)).std() > 20


@pytest.mark.parametrize(
    ("recipes", "compared"),
    [
        ("default", {"": ["combined"]}),
        ("none", {"": []}),
        ("bckd", {"": ["bckd"]}),
        ("kddetr", {"detr": ["kddetr"]}),
        ("bckd,kddetr", {"": ["bckd"], "detr": ["kddetr"]}),
        ("all", {"": list(demo.RECIPES), "detr": ["kddetr"]}),
    ],
)
def test_it_runs_where_its_recipe_is_named(recipes, compared, monkeypatch, tmp_path):
    found = {}

    def note(comparison, teacher, names, seeds):
        found[comparison.folder] = names
        return []

    monkeypatch.setattr(runner, "compare", note)
    monkeypatch.setattr(demo, "DATA", SMALL)
    demo.main(recipes=recipes, out=str(tmp_path))
    assert found == compared


@pytest.mark.parametrize(
    ("compared", "name"),
    [(demo.scenes, "bckd"), (demo.query_scenes, "kddetr")],
    ids=["bckd", "kddetr"],
)
def test_the_pair_fits_the_recipe(compared, name, tmp_path):
    comparison = compared()
    training = Training(name, 0, 2, "test", "cpu", tmp_path, tmp_path)
    with comparison.entered("cpu"):
        path = comparison.weights(training.teacher)
        path.parent.mkdir(parents=True)
        save_teacher(path, comparison.teacher[1])
        model = MODELS.build(comparison.config(training).model)
        model.init_weights()  # as the Runner does; DETR leaves its embeddings of levels as they were in memory
        found = losses(model, raw_batch())
    assert found[f"distill.{name}.loss"] > 0
