"""The rule by which a measurement agrees with a published claim, by hand."""

from __future__ import annotations

import pytest

from kdgraft_bench.core.claims import AGREES, DISAGREES, UNDECIDED, Claim, together, verdict
from kdgraft_bench.core.experiments import EXPERIMENTS
from kdgraft_bench.core.report import claim_rows, experiment_rows, figure_rows, signed
from kdgraft_bench.core.runs import Runs


@pytest.mark.parametrize(
    ("differences", "expected"),
    [
        # Mean 2, sd 1, t(0.95, 2 degrees) = 2.92: the margin is 2.92 · 1 / √3 = 1.69.
        ([0.01, 0.02, 0.03], AGREES),
        ([-0.01, -0.02, -0.03], DISAGREES),
        # Mean 1, sd 1: the margin is 1.69 again.
        ([0.0, 0.01, 0.02], UNDECIDED),
        # Two seeds have one degree of freedom, t = 6.31: mean 1.5, sd 0.707, margin 3.16.
        ([0.01, 0.02], UNDECIDED),
        ([0.01, 0.012], AGREES),  # mean 1.1, sd 0.141, margin 0.63
        ([0.05], UNDECIDED),
        ([0.0, 0.0, 0.0], UNDECIDED),
        ([0.01, 0.01], AGREES),
    ],
)
def test_a_verdict_counts_the_spread_over_seeds(differences, expected):
    assert verdict(differences) == expected


def test_a_claim_is_a_sum_for_each_seed():
    figures = {"teacher": [0.9, 0.8], "hard": [0.5, 0.6], "soft": [0.8, 0.75]}
    half = Claim("", "", {"soft": 1, "hard": -0.5, "teacher": -0.5})
    assert half.differences(figures) == pytest.approx([0.1, 0.05])
    assert Claim("", "", {"hard": 1, "soft": -1}).differences(figures) == pytest.approx([-0.3, -0.15])


def test_an_experiment_agrees_if_all_its_claims_do():
    assert together([AGREES, AGREES]) == AGREES
    assert together([AGREES, UNDECIDED]) == UNDECIDED
    assert together([UNDECIDED, AGREES, DISAGREES]) == DISAGREES


def test_the_table_has_both_sides_of_a_claim():
    figures = {"teacher": [0.9, 0.9, 0.9], "hard": [0.5, 0.52, 0.51], "soft": [0.8, 0.84, 0.81]}
    beats, half = claim_rows({EXPERIMENTS["hard_soft"]: figures})
    assert beats["here (%)"] == "81.7 ± 2.1 against 51.0 ± 1.0"
    assert (beats["difference"], beats["verdict"]) == ("+30.7 ± 1.2", AGREES)
    # Half-way from 51 to 90 is 70.5.
    assert half["here (%)"] == "81.7 ± 2.1 against 70.5 ± 0.5"
    (row,) = experiment_rows({EXPERIMENTS["hard_soft"]: figures})
    assert figure_rows({EXPERIMENTS["hard_soft"]: figures})[1] == {
        "experiment": "",
        "model": "hard",
        "accuracy (%)": "51.0 ± 1.0",
    }
    assert row["agrees"] == "agrees (2 of 2)" and "teacher 90.0 ± 0.0" in row["here (accuracy, %)"]
    assert signed([-0.02, -0.03]) == "−2.5 ± 0.7"


def test_every_claim_is_on_figures_that_its_experiment_has():
    runs = Runs(600)
    for name, experiment in EXPERIMENTS.items():
        labels = experiment.plan(runs)
        assert experiment.name == name and set(labels.values()) <= set(runs.planned)
        for claim in experiment.claims:
            assert set(claim.positive) | set(experiment.shown) <= set(labels), f"{name}: {claim.text}"
            # Both sides are weighted means, so that a claim is a difference of accuracies.
            assert sum(claim.positive.values()) == pytest.approx(0)
            assert sum(abs(factor) for factor in claim.positive.values()) == pytest.approx(2)
