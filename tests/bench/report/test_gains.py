"""Gains over the plain student by hand, and the sentence that tells them."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

from kdgraft.errors import DistillError
from kdgraft_bench.report.gains import gains, number, percent, taken, verdict
from kdgraft_bench.report.runs import Run


def runs(metric: str = "mIoU", **values: list[float]) -> list[Run]:
    """Runs of seeds 0, 1, … with a value each, or none."""
    return [
        Run(label, seed, Path(label), "", {metric: value})
        for label, found in values.items()
        for seed, value in enumerate(found)
        if value is not None
    ]


THREE = dict(plain=[0.30, 0.32, 0.31], teacher=[0.40, 0.40, 0.40], good=[0.35, 0.36, 0.37], vain=[0.31, 0.31, 0.31])


def test_gains_by_hand():
    good, vain = gains(runs(**THREE), "mIoU")
    assert (good.label, vain.label) == ("good", "vain")  # the best first
    assert good.differences == pytest.approx((0.05, 0.04, 0.06))
    assert good.mean == pytest.approx(0.05)
    margin = 4.302653 * 0.01 / math.sqrt(3)  # the 97.5 % point of Student's t with 2 degrees of freedom; sd 0.01
    assert good.interval == pytest.approx((0.05 - margin, 0.05 + margin), rel=1e-6)
    assert good.closed == pytest.approx(0.05 / 0.09)
    assert vain.mean == pytest.approx(0) and vain.interval[0] < 0 < vain.interval[1]


def test_a_lower_perplexity_is_a_gain():
    (gain,) = gains(runs("perplexity", plain=[110.0, 112.0], teacher=[100.0, 100.0], gkd=[105.0, 106.0]), "perplexity")
    assert gain.differences == (5.0, 6.0)
    assert gain.closed == pytest.approx(5.5 / 11)


def test_seeds_are_compared_in_pairs():
    (gain,) = gains(runs(plain=[0.1, 0.2, 0.3], x=[None, 0.25, 0.3]), "mIoU")
    assert gain.differences == pytest.approx((0.05, 0.0))
    assert math.isnan(gain.closed)  # no teacher
    with pytest.raises(DistillError, match=r"x has no seed in common with the plain student \(seeds 1; seeds 0\)"):
        gains(runs(plain=[0.1], x=[None, 0.25]), "mIoU")


def test_without_a_better_teacher_there_is_no_gap():
    assert all(math.isnan(gain.closed) for gain in gains(runs(**{**THREE, "teacher": [0.3, 0.3, 0.3]}), "mIoU"))


@pytest.mark.parametrize("metric", ["step (ms)", "iteration (ms)"])
def test_the_cost_is_that_of_a_step_over_the_plain_one(metric):
    made = [
        Run(r.label, r.seed, r.folder, "", {**r.metrics, metric: 30.0 if r.label == "good" else 20.0})
        for r in runs(**THREE)
    ]
    assert gains(made, "mIoU")[0].cost == pytest.approx(1.5)
    assert math.isnan(gains(runs(**THREE), "mIoU")[0].cost)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (
            THREE,
            "Take good: it improves mIoU by 0.050 over the plain student, 56\u00a0% of the gap to the teacher (95 % interval 0.025 to 0.075, 3 seeds).",
        ),
        (
            {"plain": [0.3, 0.32], "x": [0.31, 0.32]},
            "Nothing is shown to help: x improves mIoU by 0.005 on average, which may be chance (95 % interval −0.059 to 0.069, 2 seeds).",
        ),
        (
            {"plain": [0.30, 0.31, 0.32], "x": [0.20, 0.21, 0.22], "y": [0.1, 0.1, 0.1]},
            "Nothing here helps: x, the best of 2 methods, makes mIoU worse by 0.100 (95 % interval −0.100 to −0.100, 3 seeds).",
        ),
        (
            {"plain": [0.3], "x": [0.4]},
            "With one seed, x improves mIoU by 0.100 compared with the plain student. Chance alone moves a student, too: "
            "train three seeds or more before you decide.",
        ),
    ],
)
def test_the_verdict(values, said):
    assert verdict(gains(runs(**values), "mIoU"), "mIoU") == said


def test_a_method_that_is_shown_to_help_goes_before_a_better_mean_that_may_be_chance():
    wild = dict(plain=[0.30, 0.32, 0.31], wild=[0.30, 0.50, 0.40], sure=[0.33, 0.35, 0.345])
    found = gains(runs(**wild), "mIoU")
    assert [gain.label for gain in found] == ["wild", "sure"] and found[0].interval[0] < 0 < found[1].interval[0]
    assert verdict(found, "mIoU").startswith("Take sure: it improves mIoU by 0.032")


def test_where_there_is_a_validation_split_it_decides_between_methods():
    """``lucky`` is ahead on the tested split and ``sound`` on validation, so that the gain of ``sound`` is what to expect."""
    tested = dict(plain=[0.30, 0.32, 0.31], lucky=[0.37, 0.39, 0.38], sound=[0.35, 0.36, 0.37])
    validated = dict(plain=[0.40, 0.42, 0.41], lucky=[0.43, 0.44, 0.45], sound=[0.47, 0.48, 0.49])
    made = [replace(run, validated={"mIoU": validated[run.label][run.seed]}) for run in runs(**tested)]
    found = gains(made, "mIoU")
    assert [gain.label for gain in found] == ["lucky", "sound"]
    assert found[1].validated == pytest.approx((0.07, 0.06, 0.08))
    assert taken(found).label == "sound"
    assert verdict(found, "mIoU").startswith(
        "Take sound, the best of 2 methods by validation: it improves mIoU by 0.050"
    )
    incomplete = [replace(run, validated={}) if run.label == "sound" else run for run in made]
    assert taken(gains(incomplete, "mIoU")).label == "lucky"  # nothing to compare by


def test_of_equals_on_validation_the_cheaper_one_is_taken_whatever_the_tested_figures():
    tested = dict(plain=[0.30, 0.30, 0.30], lucky=[0.50, 0.51, 0.52], cheap=[0.40, 0.41, 0.42])
    validated = dict(plain=[0.3, 0.3, 0.3], lucky=[0.4, 0.5, 0.6], cheap=[0.6, 0.4, 0.5])
    times = dict(plain=100.0, lucky=200.0, cheap=150.0)
    made = [
        replace(
            run,
            validated={"mIoU": validated[run.label][run.seed]},
            metrics={**run.metrics, "step (ms)": times[run.label]},
        )
        for run in runs(**tested)
    ]
    found = gains(made, "mIoU")
    assert [gain.label for gain in found] == ["lucky", "cheap"] and taken(found).label == "cheap"


def test_the_choice_of_validation_is_kept_where_the_tested_split_does_not_bear_it_out():
    tested = dict(plain=[0.30, 0.32, 0.31], other=[0.37, 0.39, 0.38], sound=[0.35, 0.26, 0.37])
    validated = dict(plain=[0.40, 0.42, 0.41], other=[0.43, 0.44, 0.45], sound=[0.47, 0.48, 0.49])
    made = [replace(run, validated={"mIoU": validated[run.label][run.seed]}) for run in runs(**tested)]
    said = verdict(gains(made, "mIoU"), "mIoU")
    assert said.startswith(
        "It is not shown to help: sound, the best of 2 methods by validation, improves mIoU by 0.017"
    )


def test_a_student_of_several_is_named():
    found = gains(
        [
            Run(f"tiny: {label}", seed, Path(label), "", {"mIoU": value}, student="tiny")
            for label, values in dict(plain=[0.30, 0.32, 0.31], kd=[0.35, 0.36, 0.37]).items()
            for seed, value in enumerate(values)
        ],
        "mIoU",
    )
    assert verdict(found, "mIoU").startswith("Take kd for tiny: it improves mIoU by 0.050")


def test_numbers():
    assert [number(v) for v in (0.0456, 12.3456, 1234.5, -0.5)] == ["0.046", "12.35", "1234", "−0.500"]
    assert number(0.5, of=[1000.0]) == "0"
    assert percent(-0.041) == "−4\u00a0%"
