"""What methods bring over the plain student: paired differences over seeds, their interval, and the verdict in one sentence."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from operator import attrgetter

from scipy.stats import t as student_t

from kdgraft.errors import DistillError

from ..results import lower_is_better, share_closed
from .reading import ITERATION, TEACHER, Run

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Gain:
    """The gain of a method over the plain student.

    Attributes:
        label: the method.
        differences: the gain with each seed that both have; above 0 is better, whatever the metric.
        closed: the share of the gap from plain student to teacher that is closed, by the means; NaN without a better teacher.
        cost: the time of a training step over that of the plain student; NaN where it was not measured.
        validated: as ``differences``, on a validation split that is not the tested one; empty where there is none.
    """

    label: str
    differences: tuple[float, ...]
    closed: float
    cost: float
    validated: tuple[float, ...] = ()

    @property
    def mean(self) -> float:
        """The mean over seeds."""
        return statistics.fmean(self.differences)

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of the mean; see :func:`interval_of`."""
        return interval_of(self.differences)


def interval_of(differences: Sequence[float]) -> tuple[float, float]:
    """Return the 95 % interval of the mean of differences, by Student's t over the seeds; NaN for a single seed."""
    count = len(differences)
    if count < 2:
        return math.nan, math.nan
    mean = statistics.fmean(differences)
    margin = student_t.ppf((1 + CONFIDENCE) / 2, count - 1) * statistics.stdev(differences) / math.sqrt(count)
    return mean - margin, mean + margin


def gains(runs: Sequence[Run], metric: str) -> list[Gain]:
    """Return the gain of each method, the best first.

    Args:
        runs: the runs; those of one seed share data, order and initial weights, so that they are compared in pairs.
        metric: the metric.

    Raises:
        DistillError: a method has no seed in common with the plain student.
    """
    sign = -1 if lower_is_better(metric) else 1
    values, validated = (
        {
            label: {run.seed: of(run)[metric] for run in runs if run.label == label and metric in of(run)}
            for label in labels(runs)
        }
        for of in (attrgetter("metrics"), attrgetter("validated"))
    )
    teacher, baselines = values.get(TEACHER, {}), {run.label: run.plain for run in runs}
    taught = statistics.fmean(teacher.values()) if teacher else math.nan
    found = []
    for label in methods(runs):
        plain = values[baselines[label]]
        shared = sorted(plain.keys() & values[label].keys())
        if not shared:
            raise DistillError(
                f"{label} has no seed in common with the plain student ({_listed(values[label])}; {_listed(plain)})"
            )
        differences = tuple(sign * (values[label][seed] - plain[seed]) for seed in shared)
        before, after = validated[baselines[label]], validated[label]
        chosen_by = tuple(sign * (after[seed] - before[seed]) for seed in sorted(before.keys() & after.keys()))
        means = statistics.fmean(values[label].values()), statistics.fmean(plain.values())
        closed = share_closed(*means, taught, metric)
        found.append(Gain(label, differences, closed, step_cost(runs, label), chosen_by))
    return sorted(found, key=lambda gain: -gain.mean)


def step_cost(runs: Sequence[Run], label: str) -> float:
    """Return the time of a training step over that of the plain student, by the medians over seeds; NaN where it was not measured."""
    (plain,) = {run.plain for run in runs if run.label == label}
    for metric in ("step (ms)", ITERATION):
        times = {
            which: [run.metrics[metric] for run in runs if run.label == which and metric in run.metrics]
            for which in (label, plain)
        }
        if all(times.values()):
            return statistics.median(times[label]) / statistics.median(times[plain])
    return math.nan


def labels(runs: Sequence[Run]) -> list[str]:
    """Return the labels: the teacher, then each student's, the plain one first and its methods as they come."""
    found = [TEACHER] if any(run.label == TEACHER for run in runs) else []
    for plain in dict.fromkeys(run.plain for run in runs if run.label != TEACHER):
        mine = dict.fromkeys(run.label for run in runs if run.plain == plain and run.label != TEACHER)
        found += [label for label in mine if label == plain] + [label for label in mine if label != plain]
    return found


def methods(runs: Sequence[Run]) -> list[str]:
    """Return the labels of the distilled students."""
    baselines = {TEACHER, *(run.plain for run in runs)}
    return [label for label in labels(runs) if label not in baselines]


def taken(found: Sequence[Gain]) -> Gain:
    """Return the gain that a verdict is about: of the methods that are shown to help the one with the best mean, or else the best mean.

    A better mean that may be chance is no reason to take another method. Where all methods have figures of a validation split, these
    decide, so that the gain on the tested split is not the largest of several by choice; of equals it is the one with the cheaper step.

    Args:
        found: the gains, the best first.
    """
    of = (lambda gain: gain.validated) if by_validation(found) else (lambda gain: gain.differences)

    # Equals on a validation split of few decimals are told apart by their costs, and not by the tested figures.
    def rank(gain: Gain) -> tuple[float, float]:
        return -round(statistics.fmean(of(gain)), 9), gain.cost if math.isfinite(gain.cost) else 0.0

    ranked = sorted(found, key=rank)
    return next((gain for gain in ranked if interval_of(of(gain))[0] > 0), ranked[0])


def by_validation(found: Sequence[Gain]) -> bool:
    """Return true if a validation split decides between methods."""
    return len(found) > 1 and all(gain.validated for gain in found)


def verdict(found: Sequence[Gain], metric: str) -> str:
    """Return the verdict in one or two sentences: which method to take, what it brings and costs, and how sure that is.

    Args:
        found: the gains, the best first.
        metric: the metric.
    """
    best = taken(found)
    seeds = len(best.differences)
    student, _, method = best.label.rpartition(": ")
    shown = f"{method} for {student}" if student else method
    best_of = f", the best of {len(found)} methods{' by validation' if by_validation(found) else ''}"
    name = shown if len(found) == 1 else f"{shown}{best_of},"
    changes = (
        f"improves {metric} by {number(best.mean)}"
        if best.mean >= 0
        else f"makes {metric} worse by {number(-best.mean)}"
    )
    if seeds < 2:
        return (
            f"With one seed, {name} {changes} compared with the plain student. Chance alone moves a student, too: "
            "train three seeds or more before you decide."
        )
    low, high = best.interval
    told = f"95 % interval {number(low)} to {number(high)}, {seeds} seeds"
    if high < 0:
        return f"Nothing here helps: {name} {changes} ({told})."
    if low <= 0:
        others = any(gain.interval[0] > 0 for gain in found)
        return f"{'It is not shown' if others else 'Nothing is shown'} to help: {name} {changes} on average, which may be chance ({told})."
    gap = f", {percent(best.closed)} of the gap to the teacher" if math.isfinite(best.closed) else ""
    cost = f" A training step takes {best.cost:.2f} times as long; the model that you deploy costs the same."
    chosen = best_of if by_validation(found) else ""
    return f"Take {shown}{chosen}: it {changes} over the plain student{gap} ({told}).{cost if math.isfinite(best.cost) else ''}"


def number(value: float, of: Sequence[float] = ()) -> str:
    """Format a value with three decimals below 2, two below 1000, and none above.

    Args:
        value: the value.
        of: all values of its column, the largest of which counts instead.
    """
    return f"{value:.{digits((*of, value))}f}".replace("-", "−")


def digits(values: Iterable[float]) -> int:
    """Return the number of decimals for values of one metric, by the largest."""
    largest = max((abs(one) for one in values if math.isfinite(one)), default=0.0)
    return 3 if largest < 2 else 2 if largest < 1000 else 0


def percent(share: float) -> str:
    """Format a share as ``"78 %"``, with a space that does not break."""
    return f"{100 * share:.0f}\u00a0%".replace("-", "−")


def _listed(seeds: Iterable[int]) -> str:
    return "seeds " + ", ".join(map(str, sorted(seeds)))
