"""A good teacher is patient and consistent: what teacher and student see, for how long, and with which optimizer."""

from __future__ import annotations

from typing import Any

from ..claims import Claim
from ..runs import Runs
from .base import Experiment
from .convolutional import STUDENT

LENGTHS = (0.25, 0.5, 1.5)
TEACHER = 16
SHORT, LONG = LENGTHS[0], LENGTHS[-1]
MODES = ("fixed", "independent", "consistent")


def _teacher(runs: Runs, *, large: bool = False) -> str:
    name = "conv-augmented-large" if large else "conv-augmented"
    return runs.train(name, "conv", TEACHER, mode="alone", large=large)


def _student(runs: Runs, mode: str, length: float, **options: Any) -> str:
    parts = [mode, *(key for key, value in options.items() if value is True), options.get("optimizer", "")]
    name = "-".join(["taught", *filter(None, parts), f"{length:g}".replace(".", "_")])
    teacher = _teacher(runs, large=options.get("teacher_large", False))
    return runs.train(name, "conv", STUDENT, length=length, teacher=teacher, recipe="funmatch", mode=mode, **options)


def _patience(runs: Runs) -> dict[str, str]:
    found = {"teacher": _teacher(runs), "teacher of 32×32": _teacher(runs, large=True)}
    for length in LENGTHS:
        found |= {f"{mode}, length {length:g}": _student(runs, mode, length) for mode in MODES}
        found[f"mixup, length {length:g}"] = _student(runs, "consistent", length, mixup=True)
    found["taught at 32×32"] = _student(runs, "consistent", LONG, mixup=True, teacher_large=True)
    found["Shampoo, a quarter"] = _student(runs, "consistent", LONG / 4, mixup=True, optimizer="shampoo")
    found["AdamW, a quarter"] = _student(runs, "consistent", LONG / 4, mixup=True)
    return found


PATIENCE = Experiment(
    "patience",
    "consistent against fixed and independent teaching, over training length; mixup; a teacher of more pixels; Shampoo",
    "Beyer et al. 2022 (FunMatch), arXiv 2106.05237, figures 3 and 5, table 1",
    "ImageNet, ResNet-50: 82.31 %; by a teacher at 384 pixels 82.64 %; Shampoo needs a quarter of the steps",
    _patience,
    (
        Claim(
            "in a long training consistent teaching beats fixed",
            "it does",
            {f"consistent, length {LONG:g}": 1, f"fixed, length {LONG:g}": -1},
        ),
        Claim(
            "and independent teaching",
            "it does",
            {f"consistent, length {LONG:g}": 1, f"independent, length {LONG:g}": -1},
        ),
        Claim(
            "patience pays: a training of 6 times the length is better",
            "accuracy rises throughout",
            {f"consistent, length {LONG:g}": 1, f"consistent, length {SHORT:g}": -1},
        ),
        Claim(
            "mixup helps a long training",
            "it does",
            {f"mixup, length {LONG:g}": 1, f"consistent, length {LONG:g}": -1},
        ),
        Claim(
            "a teacher of a higher resolution helps",
            "82.31 → 82.64",
            {"taught at 32×32": 1, f"mixup, length {LONG:g}": -1},
        ),
        Claim(
            "Shampoo beats AdamW at a quarter of the steps",
            "it needs 4 × fewer",
            {"Shampoo, a quarter": 1, "AdamW, a quarter": -1},
        ),
    ),
    (
        *(f"{mode}, length {LONG:g}" for mode in (*MODES, "mixup")),
        "taught at 32×32",
        "AdamW, a quarter",
        "Shampoo, a quarter",
    ),
)
