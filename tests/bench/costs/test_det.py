"""The benchmark times real steps of a real pair and of mmdet's own LD; here a small one."""

from __future__ import annotations

import logging

import pytest
from mmengine.config import Config
from mmengine.registry import DefaultScope

from kdgraft import TERMS
from kdgraft.errors import DistillError
from kdgraft_bench.costs import det as costs
from kdgraft_bench.mmdet_ld import mmdet_ld
from support.det import STRIDES, detector
from support.vits import CONFIGS


@pytest.mark.slow
def test_bench_times_every_recipe_and_says_what_it_holds(tmp_path, monkeypatch, capsys):
    student = mmdet_ld(detector(classes=80), "teacher.py", "teacher.pth")
    for name, model in (("STUDENT", student), ("TEACHER", detector(classes=80, width=8, channels=16))):
        path = tmp_path / f"{name}.py"
        Config(dict(model=model)).dump(path)
        monkeypatch.setattr(costs, name, str(path))
    methods = [name for name in costs.RECIPES if name in TERMS]  # each trains in tests/det/test_methods.py
    vit = dict(costs.VIT, model=CONFIGS["DINOv3"])
    monkeypatch.setattr(costs, "VIT", vit)
    monkeypatch.setattr(costs, "CROWDED", (2, 30, (256, 256)))
    monkeypatch.setattr(costs, "SIZE", {"cpu": 2 * max(STRIDES)})
    with DefaultScope.overwrite_default_scope("mmengine"):
        rows = costs.main(pairs=2, out=str(tmp_path / "out"))
        assert DefaultScope.get_current_instance().scope_name == "mmengine"
    stored = ["ld, stored", "foreground imitation, stored"]
    steps = [row["step"] for row in rows]
    assert sorted(steps) == sorted(["plain", "teacher forward", "mmdet LD", *costs.RECIPES, *stored])
    assert steps[steps.index("ld") + 1] == stored[0]
    assert set(costs.PAPERS) < set(costs.RECIPES) and len(methods) > 15
    written = (tmp_path / "out" / "bench_cpu.md").read_text()
    assert all(row["ms"] in written for row in rows)
    assert all(0.2 < float(row["/ mmdet LD"].split()[0]) < 10 for row in rows[2:])
    assert all(0.2 < float(row["/ plain"].split()[0]) < 10 for row in rows if row["step"] in stored)
    assert "kB a view of an image" in written and "rtdetrv4, stored" in written
    assert "a DINOv3 ViT-S/16 teaches" in written and "boxes each, on 64×64 positions" in written
    assert "plain + taps" in capsys.readouterr().out
    assert logging.getLogger("kdgraft").isEnabledFor(logging.WARNING)


def test_bench_refuses_an_unknown_device():
    with pytest.raises(DistillError, match="device must be"):
        costs.main(device="tpu")
