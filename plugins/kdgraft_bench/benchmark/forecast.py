"""How long trainings will take, from some of their first steps."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from kdgraft.hosts import TrainedModel
from kdgraft.plans import Choice, Plan

from ..hosts import Step, bench_host
from ..spec import Benchmark
from ..timing import interleave, peak_memory
from .costs import step_of
from .working import logged, one_line

ROUNDS = 5


@dataclass(frozen=True)
class Forecast:
    """The expected times of trainings, by some of their steps.

    Attributes:
        seconds: run -> the expected time of its training, without its evaluations.
        failures: run -> the error that building it or its first step raised, in one line.
        memory: run -> the peak bytes of a step beyond the weights.
    """

    seconds: Mapping[str, float]
    failures: Mapping[str, str]
    memory: Mapping[str, int]


def forecast(benchmark: Benchmark, plan: Plan, names: Iterable[str], log: Path) -> Forecast:
    """Build runs as they would be trained, and time a step and the loading of a batch of each.

    Models of random weights stand for those that a run needs.

    Args:
        benchmark: the benchmark.
        plan: its plan.
        names: the runs to tell of.
        log: the file of the messages of the host.
    """
    host = bench_host(benchmark.host)
    wanted = set(names)
    needed = {need for run in plan.runs for need in run.needs}
    begun: dict[str, TrainedModel] = {}
    seconds, failures, memory = dict[str, float](), dict[str, str](), dict[str, int]()
    with tempfile.TemporaryDirectory() as scratch, logged(log):
        for run in plan.runs:
            if isinstance(run, Choice):
                if run.candidates[0] in begun:
                    begun[run.name] = begun[run.candidates[0]]
            elif lost := next((need for need in run.needs if need not in begun), None):
                failures[run.name] = f"it needs {lost}, which cannot be built"
            elif run.ensemble is None and run.name in needed | wanted:
                try:
                    step = step_of(host, replace(run, options=run.filled(begun)), begun)
                    if run.name in needed:
                        (folder := Path(scratch) / run.name).mkdir()
                        begun[run.name] = step.save(folder)
                    if run.name in wanted:
                        seconds[run.name] = step.count * _of_one(step, benchmark.device)
                        memory[run.name] = peak_memory(step.run, benchmark.device)
                except Exception as error:  # whatever a host raises: the other runs are told of
                    failures[run.name] = one_line(error)
    return Forecast(seconds, failures, memory)


def _of_one(step: Step, device: str) -> float:
    """Return the time of a step with the loading of its batch."""
    times = interleave({"run": step.run, "load": step.load}, ROUNDS, warm_up=2, device=device)
    return sum(float(np.median(seconds)) for seconds in times.values())
