"""The runs that experiments ask for, each once, however many experiments share it; together they are one plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kdgraft.errors import DistillError
from kdgraft.plans import Choice, Plan, PlannedRun

from . import tasks
from .training import PARTS

CONFIG = f"{tasks.__file__}:task"


class Runs:
    """The runs of a plan, in an order in which each follows those that it needs.

    Args:
        steps: the steps of a training of length 1.
        common: options of every task, such as the split.
    """

    def __init__(self, steps: int, **common: Any) -> None:
        self.steps, self.common = steps, {key: value for key, value in common.items() if value}
        self.planned: dict[str, PlannedRun | Choice] = {}

    def count(self, length: float = 1.0) -> int:
        """Return the steps of a training of this length: a multiple of the parts, unless there are fewer."""
        steps = max(round(self.steps * length), 1)
        return steps if steps < PARTS else steps // PARTS * PARTS

    def train(
        self,
        name: str,
        net: str,
        width: int,
        *,
        length: float = 1.0,
        teacher: str | Mapping[str, Any] | None = None,
        terms: Sequence[Mapping[str, Any]] = (),
        recipe: Any = None,
        start: str | None = None,
        stop: int | None = None,
        config: str = CONFIG,
        **options: Any,
    ) -> str:
        """Plan a training, and return its name.

        Args:
            name: the name.
            net, width: the net.
            length: the length of the training, in those of a usual one.
            teacher: the run that teaches, or several sources by name.
            terms, recipe: the distillation.
            start: the run from whose weights it starts.
            stop: the parts after which it ends, with the schedule of all of them.
            config: the task's function.
            options: further options of the task.
        """
        told = {"net": net, "width": width, "steps": self.count(length), **self.common, **options}
        if told["steps"] < PARTS:
            stop = None
        teachers = {"teacher": teacher} if isinstance(teacher, str) else dict(teacher or {})
        return self._add(
            PlannedRun(
                name, config, options=told, teachers=teachers, terms=tuple(terms), recipe=recipe, start=start, stop=stop
            )
        )

    def ensemble(self, name: str, members: Sequence[str], net: str, width: int) -> str:
        """Plan the evaluation of an ensemble, and return its name."""
        told = {"net": net, "width": width, "steps": PARTS, **self.common}
        return self._add(PlannedRun(name, CONFIG, options=told, teachers=together(members), ensemble="softmax"))

    def choose(self, name: str, candidates: Sequence[str], *, midway: Sequence[str] = ()) -> str:
        """Plan a choice by the accuracy on the validation split, and return its name."""
        return self._add(Choice(name, tuple(candidates), "val", tuple(midway)))

    def plan(self, out: Path, seed: int) -> Plan:
        """Return the plan of all runs."""
        return Plan(tuple(self.planned.values()), out, (seed,))

    def _add(self, run: PlannedRun | Choice) -> str:
        if self.planned.setdefault(run.name, run) != run:
            raise DistillError(f"two experiments have different runs that are called {run.name!r}; rename one")
        return run.name


def together(members: Sequence[str]) -> dict[str, Any]:
    """Return the sources of an ensemble of runs, which is called ``teacher``."""
    names = {f"member{place}": member for place, member in enumerate(members)}
    return {**names, "teacher": {"type": "Ensemble", "members": list(names)}}


def soft(temperature: float, hard_weight: float = 0.1, **settings: Any) -> dict[str, Any]:
    """Return the term of soft targets, beside a share of the hard loss; 0.1 is the share of all experiments that have one."""
    return {"type": "SoftTargets", "temperature": temperature, "hard_weight": hard_weight, **settings}
