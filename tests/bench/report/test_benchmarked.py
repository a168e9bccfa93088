"""What a report reads from a benchmark, and what it says of classes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from kdgraft_bench.decisions import Decisions
from kdgraft_bench.records import Row, append
from kdgraft_bench.report.charts import charts
from kdgraft_bench.report.confusions import confusion_charts
from kdgraft_bench.report.gains import gains
from kdgraft_bench.report.reading import Run
from kdgraft_bench.report.runs import read_runs
from kdgraft_bench.results import Result, write_results


@pytest.fixture
def detectors(tmp_path):
    """A benchmark of detectors with logs in MMEngine's layout."""
    results = []
    for method, value in (("teacher", 0.5), ("plain", 0.3), ("kd", 0.4)):
        student = "teacher" if method == "teacher" else "small"
        append(tmp_path, Row("det", "digits", student, "gfl", method, 0, {"AP": value}, 1.0, method))
        results.append(Result("det", "digits", student, method, 0, "AP", value))
        log = tmp_path / method / "20260101_000000/vis_data/scalars.json"
        log.parent.mkdir(parents=True)
        lines = [dict(lr=0.1, loss=2.0, step=5), {"coco/bbox_mAP": value / 2, "step": 5}]
        lines += [dict(lr=0.1, loss=1.0, step=10), {"coco/bbox_mAP": value, "step": 10}]
        log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_results(results, tmp_path / "results.csv")
    return read_runs([str(tmp_path)])


def test_curves_of_detectors_have_the_name_of_the_table(detectors):
    for run in detectors:
        assert run.validation == {"AP": [(5, run.metrics["AP"] / 2), (10, run.metrics["AP"])]}
    drawn = charts(detectors, gains(detectors, "AP"), "AP")
    (curve,) = (spec for title, spec in drawn.items() if "validation" in title.lower())
    assert json.dumps(curve).count('"title": "iteration"') == 1


@pytest.mark.parametrize(
    ("values", "said"),
    [((1, 1), "changes nothing"), ((2, 0), "gains and loses most"), ((2, 1), "gains most"), ((0, 1), "loses most")],
)
def test_the_title_of_changed_classes_says_no_more_than_there_is(tmp_path, values, said):
    """Two classes of two items: how many of the first and of the second class a student finds, against one of each."""

    def run(label, found):
        label_of = np.array([0, 0, 1, 1])
        right = np.array([place < found[0] for place in (0, 1)] + [place < found[1] for place in (0, 1)])
        path = tmp_path / f"{label}.npz"
        Decisions.of(("a", "b"), label_of, np.where(right, label_of, 1 - label_of), np.ones(4), np.arange(4)).write(
            path
        )
        return Run(label, 0, Path(label), "", {"accuracy": float(right.mean())}, decisions=path)

    runs = [run("plain", (1, 1)), run("kd", values)]
    titles = list(confusion_charts(runs, gains(runs, "accuracy"), 100))
    assert titles[0] == f"Classes on which kd {said}"
