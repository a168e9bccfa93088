"""Specialists for the classes that a generalist confuses, and a student of all of them."""

from __future__ import annotations

from .. import specialists
from ..claims import Claim
from ..runs import Runs
from .base import Experiment
from .convolutional import STUDENT, plain, taught

WIDTH = 12
LENGTH = 0.5
"""The length of the specialists' training, which starts from the generalist."""


def _specialists(runs: Runs) -> dict[str, str]:
    generalist = plain(runs, WIDTH)
    config = f"{specialists.__file__}:task"
    panel = runs.train("panel", "conv", WIDTH, length=LENGTH, start=generalist, config=config)
    return {
        "generalist": generalist,
        "with 3 specialists": panel,
        "student alone": plain(runs, STUDENT),
        "student of the generalist": taught(runs, STUDENT, generalist, f"conv{STUDENT}-of-conv{WIDTH}"),
        "student of all": taught(runs, STUDENT, panel, f"conv{STUDENT}-of-panel"),
    }


SPECIALISTS = Experiment(
    "specialists",
    "a generalist and specialists of the classes that it confuses",
    "Hinton et al. 2015, arXiv 1503.02531, section 5, table 3",
    "JFT: the generalist 25.0 %, with 61 specialists 26.1 %",
    _specialists,
    (Claim("specialists help the generalist", "25.0 → 26.1", {"with 3 specialists": 1, "generalist": -1}),),
)
