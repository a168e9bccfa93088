"""The configs of the pages build as printed, without data and without the teachers' weights."""

from __future__ import annotations

import pytest
from mmengine.config import Config
from mmengine.registry import DefaultScope
from mmseg.registry import MODELS

import kdgraft_mm.configs  # noqa: F401  finds 'mmseg::…' under the fork's name
import support.seg  # noqa: F401  registers DistilledSegmentor
from support.pages import configs
from support.vits import config_folder

BLOCKS = configs("kdgraft_seg")


@pytest.mark.usefixtures("zeros_for_weights")
@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_a_config_of_the_pages_builds_and_wires_every_term(tmp_path, number, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if "dinov3" in BLOCKS[number]:
        config_folder(tmp_path / "dinov3-vits16")
    DefaultScope.get_instance(f"test_pages_{number}", scope_name="mmseg")
    file = tmp_path / "my_config.py"
    file.write_text(BLOCKS[number])
    config = Config.fromfile(file)
    config.model.pretrained = None
    config.model.backbone.init_cfg = None
    model = MODELS.build(config.model)
    assert type(model).__name__ == f"Distilled{config.model.student}"
    wired = {row.term for row in model.distiller.rows}
    assert wired and wired == set(model.distiller.terms)


def test_there_is_one_with_terms_and_two_with_a_recipe():
    assert len(BLOCKS) == 4 and sum("recipe=" in code for code in BLOCKS) == 2
