"""Deep mutual learning: the number of peers, and a mean of all others as the teacher."""

from __future__ import annotations

from typing import Any

from ..claims import Claim
from ..runs import Runs
from .base import Experiment
from .convolutional import STUDENT, plain

PEERS = 3
"""The other nets beside the student, where there are several."""


def pair(runs: Runs) -> str:
    """Plan mutual learning of two nets."""
    return runs.train("mutual", "conv", STUDENT, special="mutual")


def _mutual(runs: Runs) -> dict[str, str]:
    several: dict[str, Any] = dict(special="mutual", peers=PEERS)
    return {
        "none": plain(runs, STUDENT),
        "two nets": pair(runs),
        "four nets": runs.train("mutual4", "conv", STUDENT, **several),
        "four nets, DML_e": runs.train("mutual4-average", "conv", STUDENT, **several, average=True),
    }


MUTUAL = Experiment(
    "mutual",
    "deep mutual learning: more peers, and the mean of the others as one teacher (DML_e)",
    "Zhang et al. 2018 (DML), arXiv 1706.00384, sections 3.3 and 3.4",
    "CIFAR-100 and Market-1501: peers help, more peers help more, and DML_e less than DML",
    _mutual,
    (
        Claim("two nets that teach each other beat one alone", "they do", {"two nets": 1, "none": -1}),
        Claim("four beat two", "accuracy rises with the number", {"four nets": 1, "two nets": -1}),
        Claim("DML beats DML_e", "the mean is less soft", {"four nets": 1, "four nets, DML_e": -1}),
    ),
)
