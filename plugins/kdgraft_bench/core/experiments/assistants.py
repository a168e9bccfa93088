"""The capacity gap between teacher and student, and three ways around it: assistants, stopping the term, stopping the teacher."""

from __future__ import annotations

from ..claims import Claim
from ..runs import PARTS, Runs, soft
from .base import Experiment
from .convolutional import STUDENT, TEACHER, TEMPERATURE, plain, taught

TEACHERS = (8, 12, 16, TEACHER)
ASSISTANTS = (8, 12)
STOP = 0.5
"""The share of the training after which the term is stopped, or the teacher."""


def chain(runs: Runs) -> str:
    """Plan assistants between the teacher and the student, the student of the one whose accuracy is midway, and return it."""
    teacher, student = plain(runs, TEACHER), plain(runs, STUDENT)
    candidates = [taught(runs, width, teacher, f"assistant{width}") for width in ASSISTANTS]
    chosen = runs.choose("assistant", candidates, midway=[teacher, student])
    return taught(runs, STUDENT, chosen, f"conv{STUDENT}-of-assistant")


def of(runs: Runs, width: int) -> str:
    """Plan the student of a teacher of this width."""
    return taught(runs, STUDENT, plain(runs, width), f"conv{STUDENT}-of-conv{width}")


def _gap(runs: Runs) -> dict[str, str]:
    found = {"none": plain(runs, STUDENT)}
    found |= {f"teacher of width {width}": plain(runs, width) for width in TEACHERS}
    found |= {f"taught by width {width}": of(runs, width) for width in TEACHERS}
    return {**found, "assistant": chain(runs)}


def _stopping(runs: Runs) -> dict[str, str]:
    term = soft(TEMPERATURE, schedule={"type": "Stop", "end": runs.count(STOP)})
    teacher = plain(runs, TEACHER)
    early = runs.train(f"conv{TEACHER}-stopped", "conv", TEACHER, stop=round(PARTS * STOP))
    return {
        "none": plain(runs, STUDENT),
        "whole": of(runs, TEACHER),
        "term stopped half-way": runs.train(
            f"conv{STUDENT}-term-stopped", "conv", STUDENT, teacher=teacher, terms=[term]
        ),
        "teacher": teacher,
        "teacher stopped half-way": early,
        "student of the stopped teacher": taught(runs, STUDENT, early, f"conv{STUDENT}-of-stopped"),
    }


GAP = Experiment(
    "capacity_gap",
    "student's accuracy against the teacher's size; an assistant",
    "Mirzadeh et al. 2020 (TAKD), arXiv 1902.03393, table 1 and figure 2",
    "CIFAR-10, plain CNN of 10 layers teaches one of 2, by one of 4: none 70.16 %, KD 72.57 %, TAKD 73.51 %",
    _gap,
    (
        Claim("KD beats no teacher", "70.16 → 72.57", {f"taught by width {TEACHER}": 1, "none": -1}),
        Claim("an assistant beats KD", "72.57 → 73.51", {"assistant": 1, f"taught by width {TEACHER}": -1}),
        Claim(
            "the largest teacher is worse for the student than the next one",
            "figure 2: the accuracy falls",
            {f"taught by width {TEACHERS[-2]}": 1, f"taught by width {TEACHER}": -1},
        ),
    ),
    ("none", *(f"taught by width {width}" for width in TEACHERS), "assistant"),
)
STOPPING = Experiment(
    "stopping",
    "stopping the term early, and stopping the teacher early",
    "Cho & Hariharan 2019 (ESKD), arXiv 1910.01348",
    "ImageNet and CIFAR-10: both help; a fully trained large teacher can be worse than none",
    _stopping,
    (
        Claim("stopping the term half-way helps", "it does", {"term stopped half-way": 1, "whole": -1}),
        Claim("a teacher that was stopped early helps", "it does", {"student of the stopped teacher": 1, "whole": -1}),
    ),
)
