"""Weights that the share of the gradient sets, against the published ones, method by method."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..claims import Claim
from ..nets import STAGES
from ..runs import Runs
from .base import Experiment
from .convolutional import STUDENT, TEACHER, TEMPERATURE, plain

LAST, POOLED = STAGES[-1], "flat"
TERMS: dict[str, dict[str, Any]] = {
    "soft targets": {"type": "SoftTargets", "temperature": TEMPERATURE},
    "hint": {"type": "Hint", "tap": LAST},
    "PKD": {"type": "PearsonImitation", "tap": LAST, "weight": 6.0},
    "SP": {"type": "SimilarityPreserving", "tap": POOLED},
}
"""The terms with their published weights, which are the defaults but for PKD; each beside the whole loss of the labels."""


def balanced(term: Mapping[str, Any], **settings: Any) -> dict[str, Any]:
    """Return a term with a weight that is set by its share of the gradient."""
    return {**term, "weight": {"type": "auto", **settings}}


def _weights(runs: Runs) -> dict[str, str]:
    teacher = plain(runs, TEACHER)
    found = {"teacher": teacher, "none": plain(runs, STUDENT)}
    for label, term in TERMS.items():
        name = "weights-" + label.lower().replace(" ", "-")
        found[label] = runs.train(name, "conv", STUDENT, teacher=teacher, terms=[term])
        found[f"{label}, auto"] = runs.train(f"{name}-auto", "conv", STUDENT, teacher=teacher, terms=[balanced(term)])
    return found


_PART = 1 / len(TERMS)
WEIGHTS = Experiment(
    "weights",
    "weights set by the gradient's share, against published ones",
    "each method's own paper; no paper compares them",
    "none: published weights are for other data and nets",
    _weights,
    (
        Claim(
            "set weights beat published ones on average over the methods",
            "none",
            {label: factor * _PART for name in TERMS for label, factor in ((f"{name}, auto", 1), (name, -1))},
        ),
        *(Claim(f"{name}: set beats published", "none", {f"{name}, auto": 1, name: -1}) for name in TERMS),
        *(Claim(f"{name}, auto beats no teacher", "none", {f"{name}, auto": 1, "none": -1}) for name in TERMS),
    ),
    ("teacher", "none"),
)
