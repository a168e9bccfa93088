"""The benchmark times real steps of a real pair; here a small one, once."""

from __future__ import annotations

import logging

import pytest
from mmengine.config import Config
from mmengine.registry import DefaultScope

from kdgraft.errors import DistillError
from kdgraft_bench.costs import seg as costs
from support.seg import SMALL_CRITIC, segmentor


@pytest.mark.slow
def test_bench_times_every_variant_and_says_what_it_holds(tmp_path, monkeypatch, capsys):
    for name, width in (("STUDENT", 4), ("TEACHER", 8)):
        path = tmp_path / f"{name}.py"
        Config(dict(model=segmentor("PSPNet", width=width, classes=19))).dump(path)
        monkeypatch.setattr(costs, name, str(path))
    critic = dict(type="skd", critic=dict(critic=SMALL_CRITIC))
    monkeypatch.setattr(costs, "RECIPES", {"skd": dict(recipe=critic), "cwd": dict(recipe="cwd")})
    monkeypatch.setattr(costs, "SIZE", {"cpu": 64})
    with DefaultScope.overwrite_default_scope("mmengine"):
        rows = costs.main(pairs=2, out=str(tmp_path / "out"))
        assert DefaultScope.get_current_instance().scope_name == "mmengine"
    assert [row["step"] for row in rows] == ["plain", "teacher forward", "skd", "cwd", "cwd, stored"]
    assert 0.2 < float(rows[-1]["/ plain"].split()[0]) < 10 and "–" not in rows[-1].values()
    written = (tmp_path / "out" / "bench_cpu.md").read_text()
    assert all(row["ms"] in written for row in rows)
    ratio = float(rows[2]["/ (plain + teacher forward)"].split()[0])
    assert 0.3 < ratio < 5
    assert "plain + taps" in capsys.readouterr().out
    assert logging.getLogger("kdgraft").isEnabledFor(logging.WARNING)


def test_bench_refuses_an_unknown_device():
    with pytest.raises(DistillError, match="device must be"):
        costs.main(device="tpu")
