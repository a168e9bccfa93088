"""What a checkpoint has of what a distiller needs to go on."""

from __future__ import annotations

import copy

import torch
from torch import nn

from kdgraft import Distiller, FeatureImitation, Hint, SoftTargets
from kdgraft.resuming import lost_terms


class Counting(Hint):
    """Counts its steps, outside of parameters and buffers."""

    steps = 3

    def hidden_state(self) -> dict[str, int]:
        return {"steps": self.steps}


def distiller(*terms) -> Distiller:
    """The student's layer has 4 channels and the teacher's 6, so that what imitates it has an adapter with parameters."""
    student, teacher = (nn.Sequential(nn.Linear(3, width), nn.Linear(width, 2)) for width in (4, 6))
    return Distiller(student, teacher, terms, example=torch.ones(1, 3))


def test_terms_with_parameters_or_hidden_state_are_missed_and_others_are_not():
    model = distiller(
        SoftTargets(2, name="bare"),
        FeatureImitation("0", name="adapted"),
        Counting("1", adapter="none", name="counting"),
        Counting("0", name="both"),
    )
    state = copy.deepcopy(model.live_state())
    assert lost_terms(model, state) == []
    assert lost_terms(model, None) == ["adapted", "counting", "both"]
    assert lost_terms(model, {**state, "hidden": {}}) == ["counting", "both"]
    del state["hidden"]["both"]
    assert lost_terms(model, state) == ["both"]
    adapted = {key: value for key, value in state["terms"].items() if key.startswith("adapted.")}
    assert adapted and lost_terms(model, {**state, "terms": adapted}) == ["both"]
    assert lost_terms(model, {"terms": {}, "hidden": state["hidden"]}) == ["adapted", "both"]


def test_nothing_is_lost_where_terms_keep_nothing():
    assert lost_terms(distiller(SoftTargets(2)), None) == []
