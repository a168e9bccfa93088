"""Born-again networks: students of the teacher's own size, generation after generation."""

from __future__ import annotations

from ..claims import Claim
from ..runs import Runs, soft
from .base import Experiment
from .convolutional import plain

WIDTH, GENERATIONS = 8, 3


def _born_again(runs: Runs) -> dict[str, str]:
    first = plain(runs, WIDTH)
    found, names = {"teacher": first}, [first]
    for turn in range(1, GENERATIONS + 1):
        # The paper adds the hard loss and the KL at T = 1 with equal weights.
        names.append(runs.train(f"born-again{turn}", "conv", WIDTH, teacher=names[-1], terms=[soft(1.0, 0.5)]))
        found[f"generation {turn}"] = names[-1]
    for kind in ("cwtm", "dkpp"):
        found[kind.upper()] = runs.train(f"born-again-{kind}", "conv", WIDTH, teacher=first, recipe=kind)
    found["ensemble of generations"] = runs.ensemble("born-again-ensemble", names[1:], "conv", WIDTH)
    return found


BORN_AGAIN = Experiment(
    "born_again",
    "born-again generations, CWTM, DKPP, their ensemble",
    "Furlanello et al. 2018 (BAN), arXiv 1805.04770, tables 1 and 2",
    "CIFAR-100: generations have smaller errors than their teacher (best 15.5 %), their ensemble the smallest (14.9 %)",
    _born_again,
    (
        Claim("the first generation beats its teacher", "smaller error", {"generation 1": 1, "teacher": -1}),
        Claim("the third generation does too", "smaller error", {"generation 3": 1, "teacher": -1}),
        Claim("CWTM beats the teacher", "smaller error", {"CWTM": 1, "teacher": -1}),
        Claim("DKPP beats the teacher", "smaller error", {"DKPP": 1, "teacher": -1}),
        Claim(
            "the ensemble beats the last generation",
            "15.5 → 14.9 % error",
            {"ensemble of generations": 1, "generation 3": -1},
        ),
    ),
)
