"""Every method of the core on one pair, at its published settings."""

from __future__ import annotations

from typing import Any

from ..claims import Claim
from ..nets import STAGES
from ..runs import Runs, soft
from .base import Experiment
from .convolutional import STUDENT, TEACHER, TEMPERATURE, plain

LAST, POOLED = STAGES[-1], "flat"
BEFORE_RELU = f"{LAST}.0.1"
FIRST = 0.2
"""The share of the training in which a network learns from the teacher first, in methods that have one."""


def _entries(steps: int) -> dict[str, dict[str, Any]]:
    """Return the distillation of each method; weights that are not here are the defaults, which are the published ones.

    Args:
        steps: the steps of a training.
    """
    first = max(round(FIRST * steps), 1)
    on_samples = {name: {"type": kind, "tap": POOLED} for name, kind in _SAMPLES.items()}
    on_maps = {name: {"type": kind, **{"tap": LAST, **more}} for name, (kind, more) in _MAPS.items()}
    pretrained = {name: {"type": kind, "tap": LAST, "pretrain": first} for name, kind in _PRETRAINED.items()}
    terms = {**_SCORES, **on_maps, **pretrained, **on_samples}
    return {name: {"terms": [term]} for name, term in terms.items()} | {
        "LS": {"recipe": "ls"},
        "AKD": {"recipe": "akd"},
        "funmatch": {"recipe": "funmatch"},
    }


_SCORES: dict[str, dict[str, Any]] = {
    "KD": soft(TEMPERATURE),
    "logit matching": {"type": "LogitMatching"},
    "DKD": {"type": "DKD"},
    "NKD": {"type": "NKD"},
    "DIST": {"type": "DIST"},
    "CWTM": {"type": "CWTM"},
    "DKPP": {"type": "DKPP"},
    "reverse KL": {"type": "ReverseKL"},
    "JSD": {"type": "GeneralizedJSD"},
    "skewed KL": {"type": "SkewedKL"},
    "gradients": {"type": "GradientTransfer"},
    "weights": {"type": "WeightMatching", "modules": "classes"},
}
_MAPS: dict[str, tuple[str, dict[str, Any]]] = {
    "hint": ("Hint", {}),
    "cosine": ("FeatureImitation", {"loss": "cosine"}),
    "PKD": ("PearsonImitation", {"weight": 6.0}),
    "CWD": ("ChannelWise", {}),
    "MGD": ("MaskedGeneration", {}),
    "AT": ("AttentionTransfer", {}),
    "NST": ("NST", {}),
    "MMD": ("FeatureMMD", {}),
    "AB": ("ActivationBoundaries", {"tap": BEFORE_RELU}),
    "pair-wise": ("PairwiseAffinity", {}),
    "FSP": ("FSP", {"tap": list(STAGES)}),
    "ReviewKD": ("Review", {"tap": list(STAGES)}),
}
_PRETRAINED = {"FT": "FactorTransfer", "MasKD": "MasKD", "FreeKD": "FreeKD"}
_SAMPLES = {
    "RKD": "RKD",
    "SP": "SimilarityPreserving",
    "CC": "CorrelationCongruence",
    "PKT": "PKT",
    "CRD": "CRD",
    "embeddings": "SampleEmbeddings",
}
_ALONE: dict[str, dict[str, Any]] = {
    "BYOT": {"terms": [{"type": "BYOT", "tap": list(STAGES[:-1])}], "teacher": {"type": "Itself"}},
    "ONE": {"terms": [{"type": "ONE", "branch": LAST}], "teacher": {"type": "Itself"}},
    "mean teacher": {"terms": [{"type": "SoftTargets"}], "teacher": {"type": "Itself", "momentum": 0.99}},
}
"""Students that teach themselves."""


def _every(runs: Runs) -> dict[str, str]:
    teacher = plain(runs, TEACHER)
    found = {"teacher": teacher, "none": plain(runs, STUDENT)}
    for label, told in {**_entries(runs.count()), **_ALONE}.items():
        source = told.get("teacher", teacher)
        sources = source if isinstance(source, str) else {"teacher": source}
        name = "every-" + label.lower().replace(" ", "-")
        found[label] = runs.train(
            name, "conv", STUDENT, teacher=sources, terms=told.get("terms", ()), recipe=told.get("recipe")
        )
    return found


EVERY = Experiment(
    "every",
    "every method of the core on one pair",
    "each method's own paper; weights as published, for other data and nets",
    "differs by paper; Tian et al. 2020 (CRD), arXiv 1910.10699, table 1, has most of them on CIFAR-100",
    _every,
    tuple(
        Claim(f"{label} beats no teacher", "better than alone", {label: 1, "none": -1})
        for label in [*_entries(1), *_ALONE]
    ),
    ("teacher", "none", "KD"),
)
