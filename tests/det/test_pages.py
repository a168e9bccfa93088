"""The configs of the pages build as printed, without data and without the teachers' weights."""

from __future__ import annotations

import pytest
from mmdet.registry import MODELS
from mmengine.config import Config

import support.det  # noqa: F401  sets mmdet's scope
from support.pages import configs
from support.vits import config_folder

BLOCKS = configs("kdgraft_det")


@pytest.mark.usefixtures("zeros_for_weights")
@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_a_config_of_the_pages_builds_and_wires_every_term(tmp_path, number, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if "dinov3" in BLOCKS[number]:
        config_folder(tmp_path / "dinov3-vits16")
    file = tmp_path / "my_config.py"
    file.write_text(BLOCKS[number])
    config = Config.fromfile(file)
    config.model.backbone.init_cfg = None
    model = MODELS.build(config.model)
    assert type(model).__name__ == f"Distilled{config.model.student}"
    wired = {row.term for row in model.distiller.rows}
    assert wired and wired == set(model.distiller.terms)
    assert set(model.distiller.sources) == set(config.model.get("teachers", {"teacher": None}))


def test_there_is_one_with_several_sources():
    assert len(BLOCKS) == 5 and sum("teachers=" in code for code in BLOCKS) == 1
