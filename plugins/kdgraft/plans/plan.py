"""Plans and the runs in them, as they are carried out."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..errors import DistillError, nearest
from ..hosts import Kind, TrainedModel, TransferSet

MENTIONED = re.compile(r"\{([\w.-]+)\.(weights|config)\}")


@dataclass(frozen=True)
class PlannedRun:
    """One run of a plan.

    Attributes:
        name: its name in the plan.
        config: the config to train: a file, or ``file.py:function`` for plain PyTorch.
        host: the host's name; ``None`` for the host that reads such a config.
        options: overrides of the config's entries by dotted key; ``"{NAME.weights}"`` and ``"{NAME.config}"`` in a text are the files
            of another run.
        teachers: the teachers by source name: the name of another run, or a table in the host's own format.
        terms: distillation terms.
        recipe: a recipe's name or table; its terms come before ``terms``.
        start: the run whose weights initialise the model.
        stop: where the training ends early, in the unit in which the host counts its schedule.
        data: the data to train on, if these are not those of the config.
        ensemble: train nothing, and evaluate the :class:`~kdgraft.Ensemble` that is the teacher; the kind of its predictions.
        checkpoint: train nothing, and take these weights: a file, or a folder of Hugging Face.
    """

    name: str
    config: str
    host: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    teachers: Mapping[str, Any] = field(default_factory=dict)
    terms: tuple[Any, ...] = ()
    recipe: Any = None
    start: str | None = None
    stop: int | None = None
    data: TransferSet | None = None
    ensemble: Kind | None = None
    checkpoint: str | None = None

    @property
    def needs(self) -> list[str]:
        """The runs that must be finished before this one."""
        found = [teacher for teacher in self.teachers.values() if isinstance(teacher, str)]
        return list(dict.fromkeys([*found, *([self.start] if self.start else []), *self.mentioned]))

    @property
    def mentioned(self) -> list[str]:
        """The runs whose files its options mention, as ``"{teacher.weights}"`` or ``"{teacher.config}"``."""
        texts = [value for value in self.options.values() if isinstance(value, str)]
        return list(dict.fromkeys(name for text in texts for name, _ in MENTIONED.findall(text)))

    def renamed(self, meaning: Mapping[str, str]) -> dict[str, Any]:
        """Return the options with other names of the runs that they mention."""
        return self._filled(lambda name, what: f"{{{meaning.get(name, name)}.{what}}}")

    def filled(self, found: Mapping[str, TrainedModel]) -> dict[str, Any]:
        """Return the options with the files of finished runs in place of their names."""
        return self._filled(lambda name, what: str(getattr(found[name], what)))

    def _filled(self, fill: Callable[[str, str], str]) -> dict[str, Any]:
        return {
            key: MENTIONED.sub(lambda match: fill(*match.groups()), value) if isinstance(value, str) else value
            for key, value in self.options.items()
        }

    @property
    def special(self) -> list[str]:
        """The keys of this run that a host may refuse; see :attr:`kdgraft.hosts.Host.refuses`."""
        data = self.data or TransferSet()
        given = {"stop": self.stop, "ensemble": self.ensemble, "data.set": data.set}
        given |= {"data.share": data.share != 1 or None, "data.labels": not data.labels or None}
        return [key for key, value in given.items() if value is not None]


@dataclass(frozen=True)
class Choice:
    """The choice of one of several finished runs, which is known by a name of its own to the runs after it.

    Attributes:
        name: its name in the plan.
        candidates: the runs to choose from.
        by: the metric that decides: the highest value, or the lowest of ``-metric``.
        midway: two runs; chosen is then the candidate whose metric is nearest to the mean of theirs (TAKD, arXiv 1902.03393).
    """

    name: str
    candidates: tuple[str, ...]
    by: str
    midway: tuple[str, ...] = ()

    @property
    def metric(self) -> str:
        """The name of the metric."""
        return self.by.removeprefix("-")

    @property
    def needs(self) -> list[str]:
        """The runs that must be finished before this choice."""
        return list(dict.fromkeys([*self.candidates, *self.midway]))

    def pick(self, metrics: Mapping[str, Mapping[str, float]]) -> str:
        """Return the chosen run, the first of equals.

        Args:
            metrics: the metrics of each of :attr:`needs`.

        Raises:
            DistillError: a run has no such metric, or it is not a number.
        """
        values = {name: self._value(name, metrics[name]) for name in self.needs}
        sign = -1.0 if self.by.startswith("-") else 1.0
        if not self.midway:
            return max(self.candidates, key=lambda name: sign * values[name])
        middle = sum(values[name] for name in self.midway) / len(self.midway)
        return min(self.candidates, key=lambda name: abs(values[name] - middle))

    def _value(self, run: str, metrics: Mapping[str, float]) -> float:
        if self.metric not in metrics:
            raise DistillError(
                f"{self.name} chooses by {self.metric!r}, which {run} has not measured{nearest(self.metric, metrics)}"
            )
        if math.isnan(metrics[self.metric]):
            raise DistillError(f"{self.name} cannot choose: {self.metric} of {run} is not a number")
        return metrics[self.metric]


@dataclass(frozen=True)
class Plan:
    """A graph of runs.

    Attributes:
        runs: the runs and choices, in an order in which each follows those that it needs.
        out: the parent of the runs' folders, ``out/<run>/seed<k>``.
        seeds: the seeds; each run is carried out once per seed.
    """

    runs: tuple[PlannedRun | Choice, ...]
    out: Path
    seeds: tuple[int, ...] = (0,)

    def __iter__(self) -> Iterator[tuple[PlannedRun | Choice, int]]:
        """Iterate over every run with every seed: all runs of one seed, then those of the next."""
        return ((run, seed) for seed in self.seeds for run in self.runs)

    def folder(self, run: str, seed: int) -> Path:
        """Return the folder of a run's files."""
        return self.out / run / f"seed{seed}"

    def part(self, run: str, seed: int) -> Plan:
        """Return the plan of one run with one seed, and of the runs that it needs."""
        wanted = {run}
        for each in reversed(self.runs):
            if each.name in wanted:
                wanted.update(each.needs)
        return replace(self, runs=tuple(each for each in self.runs if each.name in wanted), seeds=(seed,))
