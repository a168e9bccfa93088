"""Published claims, and the rule by which a measurement agrees with one."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scipy.stats import t as student_t

AGREES, DISAGREES, UNDECIDED = "agrees", "does not", "undecided"
CONFIDENCE = 0.95

Figures = Mapping[str, Sequence[float]]
"""Label -> the accuracy with each seed, in the same order of seeds for all labels."""


@dataclass(frozen=True)
class Claim:
    """A statement of a paper: a combination of accuracies is positive.

    Attributes:
        text: the statement.
        published: the figures of the paper that say so.
        positive: label -> factor; the claim is that the sum of factor × accuracy is positive, such as ``{"soft": 1, "hard": -1}``.
    """

    text: str
    published: str
    positive: Mapping[str, float]

    def differences(self, figures: Figures) -> list[float]:
        """Return the sum for each seed; the models of one seed share data, order and initial weights, so that it is a paired one."""
        columns = [[factor * value for value in figures[label]] for label, factor in self.positive.items()]
        return [math.fsum(values) for values in zip(*columns, strict=True)]

    def verdict(self, figures: Figures) -> str:
        """Judge the claim by :func:`verdict`."""
        return verdict(self.differences(figures))


def verdict(differences: Sequence[float]) -> str:
    """Judge whether differences are positive, by Student's t over the seeds.

    Returns:
        ``"agrees"`` if the lower end of the one-sided 95 % interval of their mean is above 0, ``"does not"`` if the upper end is
        below 0, else ``"undecided"``; always so for a single seed.
    """
    count = len(differences)
    if count < 2:
        return UNDECIDED
    mean = statistics.mean(differences)
    margin = student_t.ppf(CONFIDENCE, count - 1) * statistics.stdev(differences) / math.sqrt(count)
    return AGREES if mean > margin else DISAGREES if mean < -margin else UNDECIDED


def together(verdicts: Sequence[str]) -> str:
    """Judge an experiment by its claims: it agrees if all do, and does not if one does not."""
    if DISAGREES in verdicts:
        return DISAGREES
    return AGREES if set(verdicts) == {AGREES} else UNDECIDED
