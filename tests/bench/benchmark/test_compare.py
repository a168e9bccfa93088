"""Regressions between two results, by hand."""

from __future__ import annotations

import pytest

from kdgraft.errors import DistillError
from kdgraft_bench.benchmark.compare import changes, compare
from kdgraft_bench.records import Row, append


def result(folder, values, metric="accuracy", dataset="digits"):
    folder.mkdir()
    for seed, value in enumerate(values):
        append(folder, Row("torch", dataset, "small", "conv", "kd", seed, {metric: value}, 1.0, "x"))
    return folder


@pytest.mark.parametrize(
    ("after", "metric", "verdict"),
    [
        ([0.40, 0.41, 0.39], "accuracy", "worse"),
        ([0.60, 0.61, 0.59], "accuracy", "better"),
        ([0.45, 0.56, 0.50], "accuracy", "no difference shown"),
        ([0.60, 0.61, 0.59], "perplexity", "worse"),
    ],
)
def test_a_change_is_told_from_noise_by_its_interval(tmp_path, after, metric, verdict):
    before = result(tmp_path / "a", [0.50, 0.51, 0.50], metric)
    (found,) = changes(before, result(tmp_path / "b", after, metric))
    assert found.verdict == verdict


def test_the_interval_is_paired_by_seed(tmp_path):
    # Differences 0.01, 0.02, 0.03: mean 0.02, sd 0.01, t(2) = 4.3027, margin 0.02484.
    (found,) = changes(result(tmp_path / "a", [0.1, 0.5, 0.9]), result(tmp_path / "b", [0.11, 0.52, 0.93]))
    assert (found.low, found.high) == pytest.approx((0.02 - 0.024841, 0.02 + 0.024841), abs=1e-6)


def test_one_seed_shows_nothing(tmp_path, capsys):
    assert not compare(str(result(tmp_path / "a", [0.9])), str(result(tmp_path / "b", [0.1])))
    assert "one seed" in capsys.readouterr().out


def test_the_command_says_how_many_got_worse(tmp_path, capsys):
    before, after = result(tmp_path / "a", [0.5, 0.5, 0.5]), result(tmp_path / "b", [0.3, 0.31, 0.3])
    assert compare(str(before), str(after))
    assert "1 of 1 figures got worse" in capsys.readouterr().out


def test_results_that_have_nothing_in_common_are_refused(tmp_path):
    before = result(tmp_path / "a", [0.5])
    with pytest.raises(DistillError, match="different data sets"):
        changes(before, result(tmp_path / "b", [0.5], dataset="others"))
    with pytest.raises(DistillError, match=r"no folder of kdgraft bench"):
        changes(before, tmp_path)
