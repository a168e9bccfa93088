"""The ready configs build, at full width, without data and without the teacher's weights."""

from __future__ import annotations

from pathlib import Path

import pytest
from mmengine.config import Config
from mmengine.registry import DefaultScope
from mmseg.registry import MODELS

import support.seg  # noqa: F401  registers DistilledSegmentor

FOLDER = Path(__file__).parents[2] / "seg" / "configs"
CONFIGS = sorted(path.name for path in FOLDER.glob("*.py"))


@pytest.mark.usefixtures("zeros_for_weights")
@pytest.mark.parametrize("name", CONFIGS)
def test_ready_config_builds_and_wires_every_term(name):
    DefaultScope.get_instance(f"test_configs_{name}", scope_name="mmseg")
    config = Config.fromfile(FOLDER / name)
    config.model.pretrained = None
    config.model.backbone.init_cfg = None
    model = MODELS.build(config.model)
    assert type(model).__name__ == f"Distilled{config.model.student}"
    wired = {row.term for row in model.distiller.rows}
    assert wired == set(model.distiller.terms)


def test_custom_classes_reach_student_teacher_and_data():
    config = Config.fromfile(FOLDER / "skd_fcn_r18_custom.py")
    for model in (config.model, config.model.teacher.config):
        assert model.decode_head.num_classes == model.auxiliary_head.num_classes == 3
    for loader in (config.train_dataloader, config.val_dataloader, config.test_dataloader):
        assert loader.dataset.metainfo.classes == ("first", "second", "third")
        assert loader.dataset.data_root == "data/custom/"
    assert config.train_dataloader.dataset.data_prefix.img_path == "img_dir/train"
    assert config.test_dataloader.dataset.data_prefix.seg_map_path == "ann_dir/val"
