"""The configs in the READMEs build as printed, without data and without the teachers' weights."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from mmengine.config import Config
from mmengine.registry import DefaultScope
from mmseg.registry import MODELS

import support.seg  # noqa: F401  registers DistilledSegmentor
from kdgraft_mm import configs  # noqa: F401  finds 'mmseg::…' under the fork's name

ROOT = Path(__file__).parents[2]
BLOCKS = [
    code
    for file in (ROOT / "README.md", ROOT / "seg" / "README.md")
    for code in re.findall(r"```python\n(.*?)```", file.read_text(encoding="utf-8"), re.DOTALL)
    if "_base_" in code and "kdgraft_seg" in code
]


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_a_config_of_the_readmes_builds_and_wires_every_term(tmp_path, number):
    DefaultScope.get_instance(f"test_readme_{number}", scope_name="mmseg")
    file = tmp_path / "my_config.py"
    file.write_text(BLOCKS[number])
    config = Config.fromfile(file)
    config.model.pretrained = None
    config.model.backbone.init_cfg = None
    model = MODELS.build(config.model)
    assert type(model).__name__ == f"Distilled{config.model.student}"
    wired = {row.term for row in model.distiller.rows}
    assert wired and wired == set(model.distiller.terms)


def test_each_readme_has_one():
    assert len(BLOCKS) == 2
