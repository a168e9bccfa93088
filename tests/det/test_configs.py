"""The ready configs build, at full width, without data and without the teacher's weights."""

from __future__ import annotations

from pathlib import Path

import pytest
from mmdet.registry import MODELS
from mmengine.config import Config

import support.det  # noqa: F401  sets mmdet's scope
from kdgraft_mm.configs import plain_config

FOLDER = Path(__file__).parents[2] / "det" / "configs"
CONFIGS = sorted(path.name for path in FOLDER.glob("*.py"))


@pytest.mark.usefixtures("zeros_for_weights")
@pytest.mark.parametrize("name", CONFIGS)
def test_ready_config_builds_wires_every_term_and_has_its_plain_student(name):
    config = Config.fromfile(FOLDER / name)
    config.model.backbone.init_cfg = None
    model = MODELS.build(config.model)
    assert type(model).__name__ == f"Distilled{config.model.student}"
    wired = {row.term for row in model.distiller.rows}
    assert wired == set(model.distiller.terms)
    assert wired
    assert type(MODELS.build(plain_config(config).model)).__name__ == config.model.student


def test_custom_classes_reach_student_teacher_and_data():
    config = Config.fromfile(FOLDER / "crosskd_gfl_r18_custom.py")
    assert config.model.bbox_head.num_classes == 3
    assert config.model.teacher.config.bbox_head.num_classes == 3
    assert config.train_dataloader.dataset.metainfo.classes == ("first", "second", "third")
    assert config.test_evaluator.ann_file == "data/custom/annotations/instances_val.json"
