"""``kdgraft demo``: which benchmarks it carries out, and how."""

from __future__ import annotations

import pytest

from kdgraft.cli import main
from kdgraft_bench import demo as module
from support.commands import refused


@pytest.fixture
def asked(monkeypatch):
    """The benchmarks that a command would carry out."""
    found = []
    monkeypatch.setattr(module, "benchmark", lambda told, **how: found.append((told, how["short"])) or [])
    return found


def test_every_demo_runs_by_default_those_without_compiled_ops_first(asked):
    assert main(["demo"]) == 0
    assert [told.name for told, _ in asked] == ["core", "nlp", "seg", "det"]
    assert all(told.seeds == (0,) and short for told, short in asked)
    assert [str(told.out) for told, _ in asked] == [f"runs/demo/{name}" for name in ("core", "nlp", "seg", "det")]


def test_a_host_that_is_not_installed_is_left_out_unless_it_is_named(asked, capsys, monkeypatch):
    monkeypatch.setattr(module, "installed", lambda framework: framework not in ("mmdet", "mmseg"))
    assert main(["demo"]) == 0
    assert [told.name for told, _ in asked] == ["core", "nlp"]
    assert "seg is left out, as mmseg is not installed\ndet is left out, as mmdet" in capsys.readouterr().out
    assert main(["demo", "seg"]) == 0 and asked[-1][0].name == "seg"  # which says what to install


def test_the_whole_benchmark_over_several_seeds(asked):
    assert main(["demo", "seg", "--full", "--seeds", "3", "--out", "there"]) == 0
    ((told, short),) = asked
    assert told.seeds == (0, 1, 2) and not short and str(told.out) == "there/seg-full"
    assert list(told.methods) == ["dist", "cwd", "skd", "soft_targets"]


def test_an_unknown_demo_is_one_line(asked, capsys):
    refused(capsys, ["demo", "sec"], "there is no demo 'sec'; did you mean 'seg'?")
    refused(capsys, ["demo", "det-queries"], "there is no demo 'det-queries'")
    refused(capsys, ["demo", "core", "--seeds", "0"], "--seeds must be a whole number >= 1")
    assert not asked


@pytest.mark.slow
def test_core_trains_and_prints_what_decides(tmp_path, capsys, monkeypatch):
    read = module.read_benchmark
    monkeypatch.setattr(module, "read_benchmark", lambda *names, **how: read(*names, **how, iterations=4, processes=1))
    results = module.demo(["core"], out=str(tmp_path))
    said = capsys.readouterr().out
    assert {result.method for result in results} == {"teacher", "plain", "hint", "soft_targets"}
    table = said.partition("hard digits, test split, 1 seed, small: conv, width 12\n")[2].splitlines()[0]
    assert table.split("  ")[0] == "method" and "of the gap" in table and "latency" not in table
    assert "latency at batch 1 (ms)" in (tmp_path / "core/table.md").read_text()
    assert f"report in {tmp_path}/core/report.html" in said
