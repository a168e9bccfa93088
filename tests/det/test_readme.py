"""The configs in the READMEs build as printed, without data and without the teachers' weights."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from mmdet.registry import MODELS
from mmengine.config import Config

import support.det  # noqa: F401  sets mmdet's scope

ROOT = Path(__file__).parents[2]
BLOCKS = [
    code
    for file in (ROOT / "README.md", ROOT / "det" / "README.md")
    for code in re.findall(r"```python\n(.*?)```", file.read_text(encoding="utf-8"), re.DOTALL)
    if "_base_" in code and "kdgraft_det" in code
]


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_a_config_of_the_readmes_builds_and_wires_every_term(tmp_path, number):
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
    assert len(BLOCKS) == 3 and sum("teachers=" in code for code in BLOCKS) == 1
