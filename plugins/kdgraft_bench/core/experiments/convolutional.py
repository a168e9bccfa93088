"""What the experiments with convolutional nets share: the teacher, the student, and soft targets."""

from __future__ import annotations

from ..runs import Runs, soft

STUDENT, TEACHER = 6, 24
"""Widths; a net has about width² × 47 weights."""
TEMPERATURE = 4.0


def plain(runs: Runs, width: int) -> str:
    """Plan a net on hard targets."""
    return runs.train(f"conv{width}", "conv", width)


def taught(runs: Runs, width: int, teacher: str, name: str) -> str:
    """Plan a net on the soft targets of a teacher."""
    return runs.train(name, "conv", width, teacher=teacher, terms=[soft(TEMPERATURE)])
