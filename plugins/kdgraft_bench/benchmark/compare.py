"""``kdgraft bench --compare A B``: did anything get worse between two results of one benchmark?"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from kdgraft.errors import DistillError
from kdgraft.tables import print_rows

from ..records import FILE, read_rows
from ..report.gains import interval_of, number
from ..results import lower_is_better

WORSE, BETTER, SAME = "worse", "better", "no difference shown"


@dataclass(frozen=True)
class Change:
    """The change of one figure of a method from one benchmark to another, paired by seed.

    Attributes:
        student, method, metric: the figure.
        before, after: its means over the seeds that both have.
        low, high: the 95 % interval of the change, in the direction that is better; NaN for a single seed.
    """

    student: str
    method: str
    metric: str
    before: float
    after: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        """``"worse"`` or ``"better"`` if the interval of the change excludes 0."""
        return WORSE if self.high < 0 else BETTER if self.low > 0 else SAME


def changes(before: Path, after: Path) -> list[Change]:
    """Return the changes of all figures that two results have in common.

    Raises:
        DistillError: one of them is no result of a benchmark, they are of different data sets, or have no run in common.
    """
    found = []
    for folder in (before, after):
        if not (folder / FILE).is_file():
            raise DistillError(f"{folder} is no folder of kdgraft bench: it has no {FILE}")
        found.append(read_rows(folder))
    sets = [{row.dataset for row in rows.values()} for rows in found]
    if sets[0] != sets[1]:
        raise DistillError(f"different data sets: {', '.join(sets[0])} and {', '.join(sets[1])}")
    shared = [key for key in found[0] if key in found[1]]
    if not shared:
        raise DistillError(f"{before} and {after} have no run in common: student, method and seed must be the same")
    pairs: dict[tuple[str, str, str], list[tuple[float, float]]] = {}
    for key in shared:
        old, new = found[0][key].metrics, found[1][key].metrics
        for metric in old.keys() & new.keys():
            if math.isfinite(old[metric]) and math.isfinite(new[metric]):
                pairs.setdefault((key[0], key[1], metric), []).append((old[metric], new[metric]))
    return [_change(*key, values) for key, values in sorted(pairs.items())]


def _change(student: str, method: str, metric: str, values: list[tuple[float, float]]) -> Change:
    sign = -1 if lower_is_better(metric) else 1
    low, high = interval_of([sign * (new - old) for old, new in values])
    means = [sum(column) / len(values) for column in zip(*values, strict=True)]
    return Change(student, method, metric, means[0], means[1], low, high)


def compare(before: str, after: str) -> bool:
    """Print the changes, and return true if anything got worse."""
    found = changes(Path(before), Path(after))
    rows = [
        {
            "student": one.student,
            "method": one.method,
            "metric": one.metric,
            "before": number(one.before),
            "after": number(one.after),
            "change, 95 %": f"{number(one.low)} to {number(one.high)}" if math.isfinite(one.low) else "one seed",
            "verdict": one.verdict,
        }
        for one in found
    ]
    print_rows(rows, f"{before} → {after}; a change above 0 is for the better")
    worse = [one for one in found if one.verdict == WORSE]
    told = f"{len(worse)} of {len(found)} figures got worse" if worse else "nothing got worse that the seeds can show"
    print(told)
    return bool(worse)
