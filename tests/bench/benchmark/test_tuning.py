"""Factors on weights, and methods whose weights are multiplied by one."""

from __future__ import annotations

import pytest

from kdgraft.errors import DistillError
from kdgraft_bench.benchmark.tuning import factors, scaled_method


def test_factors_are_powers_of_two_around_the_published_weight():
    assert factors(8) == [1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8, 16]
    assert factors(1) == [1]


def test_the_weights_of_a_recipe_and_of_further_terms_are_multiplied():
    method = {"recipe": {"type": "at", "tap": "a"}, "terms": ["SoftTargets", {"type": "Hint", "tap": "a", "weight": 3}]}
    at, soft, hint = scaled_method("torch", method, 2.0)["terms"]
    assert at["weight"] == 2 * scaled_method("torch", method, 1.0)["terms"][0]["weight"] > 0
    assert soft == {"type": "SoftTargets", "weight": 2.0}
    assert hint["weight"] == 6.0 and hint["tap"] == "a"


def test_a_share_of_the_host_s_loss_is_no_weight():
    (soft, share) = scaled_method("torch", {"terms": ["SoftTargets", "TaskShare"]}, 4.0)["terms"]
    assert soft["weight"] == 4.0 and share == {"type": "TaskShare"}


def test_other_entries_of_a_method_stay():
    assert scaled_method("torch", {"terms": ["SoftTargets"], "start": "x"}, 2.0)["start"] == "x"


def test_weights_that_set_themselves_are_not_tuned():
    with pytest.raises(DistillError, match="tuning multiplies weights that are numbers, got weight = 'auto'"):
        scaled_method("torch", {"terms": [{"type": "SoftTargets", "weight": "auto"}]}, 2.0)


@pytest.mark.parametrize("term", [{"weight": 2}, 3])
def test_a_term_without_a_type_is_refused(term):
    with pytest.raises(DistillError, match="a term needs its type"):
        scaled_method("torch", {"terms": [term]}, 2.0)
