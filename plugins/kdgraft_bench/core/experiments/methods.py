"""Methods side by side: the same teacher, student, data and schedule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..claims import Claim
from ..nets import STAGES
from ..runs import PARTS, Runs, soft
from .assistants import chain, of
from .base import Experiment
from .convolutional import STUDENT, TEACHER, TEMPERATURE, plain
from .mutual import pair

FIRST_STAGE = 0.4
"""The length of the first stage of FitNets and FSP, which train on features before the labels; it comes in addition."""
BOUND = 3.2
"""The largest value of a normalised pixel."""


def _staged(runs: Runs, name: str, features: Mapping[str, Any], then: Sequence[Mapping[str, Any]]) -> str:
    """Plan a first stage on features alone, and the usual training from its weights."""
    teacher = plain(runs, TEACHER)
    first = runs.train(
        f"{name}-features",
        "conv",
        STUDENT,
        length=FIRST_STAGE,
        teacher=teacher,
        terms=[features, {"type": "TaskShare"}],
    )
    return runs.train(name, "conv", STUDENT, teacher=teacher if then else None, terms=then, start=first)


def _methods(runs: Runs) -> dict[str, str]:
    teacher = plain(runs, TEACHER)
    maps = {"type": "AttentionTransfer", "tap": list(STAGES)}
    return {
        "teacher": teacher,
        "none": plain(runs, STUDENT),
        "KD": of(runs, TEACHER),
        "FitNet": _staged(runs, "fitnet", {"type": "Hint", "tap": STAGES[1]}, [soft(TEMPERATURE)]),
        "AT": runs.train("attention-transfer", "conv", STUDENT, teacher=teacher, terms=[maps]),
        "FSP": _staged(runs, "fsp", {"type": "FSP", "tap": list(STAGES)}, []),
        "BSS": runs.train(
            "boundary-samples",
            "conv",
            STUDENT,
            teacher=teacher,
            recipe={"type": "bss", "epochs": min(runs.steps, PARTS), "bound": BOUND},
        ),
        "mutual": pair(runs),
        "TAKD": chain(runs),
    }


METHODS = Experiment(
    "methods",
    "methods side by side",
    "Mirzadeh et al. 2020 (TAKD), arXiv 1902.03393, table 3",
    "CIFAR-10, ResNet-110 teaches ResNet-8: none 86.02 % … TAKD 88.01 %",
    _methods,
    (
        *(
            Claim(f"{name} beats no teacher", "86.02 … 88.01, all above none", {name: 1, "none": -1})
            for name in ("KD", "FitNet", "AT", "FSP", "BSS", "mutual", "TAKD")
        ),
        Claim("TAKD beats KD", "the best of all", {"TAKD": 1, "KD": -1}),
    ),
)
