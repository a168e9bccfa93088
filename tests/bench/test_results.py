"""Result files and tables."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from kdgraft import DistillError
from kdgraft_bench.results import Result, gap_closed, markdown, mean_sd, read_results, summary, write_results

RESULTS = [
    Result("det", "digits", model, method, seed, metric, value)
    for method, model, figures in (
        ("teacher", "large", (0.80, 0.82)),
        ("plain", "small", (0.60, 0.62)),
        ("localization", "small", (0.66, 0.70)),
    )
    for seed, value in enumerate(figures)
    for metric, value in (("AP", value), ("AP50", value + 0.1))
]


def test_file(tmp_path: Path):
    path = write_results(RESULTS, tmp_path / "runs" / "results.csv")
    lines = path.read_text().splitlines()
    assert lines[0] == "task,dataset,model,method,seed,metric,value"
    assert lines[1] == "det,digits,large,teacher,0,AP,0.8"
    assert len(lines) == 13
    assert read_results(path) == RESULTS


def test_a_file_with_other_columns(tmp_path: Path):
    path = tmp_path / "other.csv"
    path.write_text("task,value\ndet,1\n")
    with pytest.raises(DistillError, match=r"other\.csv has columns \['task', 'value'\], not \['task', 'dataset'"):
        read_results(path)


def test_mean_and_sample_deviation():
    # Deviations of 0.1 either side of the mean: sd = √((0.01 + 0.01) / (2 − 1)) = 0.1414
    assert mean_sd([0.4, 0.6]) == "0.500 ± 0.141"
    assert mean_sd([0.4], 2) == "0.40"
    assert mean_sd([]) == "–"


def test_gap_closed_by_hand():
    # Means: teacher 0.81, plain 0.61, distilled 0.68: 0.07 of 0.20.
    assert gap_closed(RESULTS, "AP", "localization") == pytest.approx(0.35)
    assert gap_closed(RESULTS, "AP", "plain") == 0
    assert gap_closed(RESULTS, "AP", "teacher") == 1


def test_no_gap_to_close():
    flat = [r._replace(value=0.5) for r in RESULTS]
    assert math.isnan(gap_closed(flat, "AP", "localization"))
    # A teacher that is worse than the plain student leaves none either; of a perplexity that is the higher one.
    turned = [r._replace(value=-r.value) for r in RESULTS]
    assert math.isnan(gap_closed(turned, "AP", "localization"))
    falling = [r._replace(metric="perplexity") for r in turned]
    assert gap_closed(falling, "perplexity", "localization") == pytest.approx(0.35)


def test_summary_and_its_table():
    rows = summary(RESULTS, {"AP": 2, "AP75": 3})
    assert rows[0] == {"method": "teacher", "model": "large", "AP": "0.81 ± 0.01", "AP75": "–"}
    assert [row["method"] for row in rows] == ["teacher", "plain", "localization"]
    assert markdown(rows).splitlines()[:3] == [
        "| method | model | AP | AP75 |",
        "| --- | --- | --- | --- |",
        "| teacher | large | 0.81 ± 0.01 | – |",
    ]


def test_a_teacher_of_another_scale_leaves_no_gap():
    assert math.isnan(gap_closed([r for r in RESULTS if r.method != "teacher"], "AP", "localization"))
