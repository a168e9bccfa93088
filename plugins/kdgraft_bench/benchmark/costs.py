"""The costs of models in use and of training steps, measured when no training is at work beside them."""

from __future__ import annotations

import os
import platform
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from kdgraft.hosts import Job, TrainedModel
from kdgraft.plans import Plan, PlannedRun

from ..hosts import BenchHost, Opened, Step, bench_host
from ..spec import PLAIN, TEACHER, Benchmark, run_name
from ..timing import interleave, peak_memory
from .working import logged

ROUNDS, FEW_ROUNDS = 15, 5
PARAMETERS, OPERATIONS, SIZE = "parameters (k)", "MFLOPs", "size (MiB)"
STEP, MEMORY = "step (ms)", "step memory (MiB)"

Costs = dict[str, dict[str, float]]
"""Run -> figure -> value."""
Trained = Mapping[str, TrainedModel]


def latency_of(batch: int) -> str:
    """Return the name of the latency at a batch size."""
    return f"latency at batch {batch} (ms)"


def throughput_of(batch: int) -> str:
    """Return the name of the throughput at a batch size."""
    return f"samples/s at batch {batch}"


def measure_costs(benchmark: Benchmark, plan: Plan, trained: Trained, log: Path, rounds: int = ROUNDS) -> Costs:
    """Measure what models cost that are the same for all seeds: size, latency, training steps.

    Students of one size are the same model in use, whatever trained them, so that only the plain ones are timed.

    Args:
        benchmark: the benchmark.
        plan: its plan.
        trained: the finished runs of the first seed by name.
        log: the file of the messages of host and profiler.
        rounds: the number of rounds, in each of which every model or step runs once.
    """
    with logged(log):
        return _measured(benchmark, plan, trained, rounds)


def _measured(benchmark: Benchmark, plan: Plan, trained: Trained, rounds: int) -> Costs:
    host = bench_host(benchmark.host)
    dataset = host.dataset(benchmark)
    planned = [run for run in plan.runs if isinstance(run, PlannedRun) and run.name in trained]
    runs = {run.name: replace(run, options=run.filled(trained)) for run in planned}
    used = {name: name for name in [TEACHER, *(run_name(student, PLAIN) for student in benchmark.students)]}
    opened = {name: host.open(runs[name], trained[name], dataset) for name in used}
    found: Costs = {name: sizes(one) for name, one in opened.items()}
    for batch in benchmark.batches:
        ready = {name: one.run(batch) for name, one in opened.items()}
        for name, seconds in interleave(ready, rounds, device=benchmark.device).items():
            median = float(np.median(seconds))
            found[name] |= {latency_of(batch): median * 1e3, throughput_of(batch): batch / median}
    del opened
    for name, step in _steps(benchmark, host, runs, trained, rounds).items():
        found.setdefault(name, {}).update(step)
    for student in benchmark.students:
        for method in (*benchmark.methods, *benchmark.peers):
            if run_name(student, method) not in found:  # a peer that does not run
                continue
            own = found[run_name(student, PLAIN)]
            shared = {key: value for key, value in own.items() if key not in (STEP, MEMORY)}
            found[run_name(student, method)] = {**shared, **found[run_name(student, method)]}
    return found


def sizes(opened: Opened) -> dict[str, float]:
    """Return a model's parameters in thousands, the MiB of its weights, and the millions of operations of one sample.

    An operation is a multiplication or an addition, as torch counts them; a layer that torch does not know counts for nothing.
    """
    parameters = sum(one.numel() for one in opened.model.parameters())
    size = sum(one.numel() * one.element_size() for one in opened.model.state_dict().values())
    counter = FlopCounterMode(display=False)
    with counter:
        opened.flops()
    return {PARAMETERS: parameters / 1e3, OPERATIONS: counter.get_total_flops() / 1e6, SIZE: size / 2**20}


def _steps(
    benchmark: Benchmark, host: BenchHost, runs: Mapping[str, PlannedRun], trained: Trained, rounds: int
) -> Costs:
    """Time a training step of every run, in turn, and measure the memory that it needs."""
    steps = {name: step_of(host, runs[name], trained).run for name, _, _ in benchmark.trained() if name in trained}
    seconds = interleave(steps, rounds, device=benchmark.device)
    return {
        name: {STEP: float(np.median(seconds[name])) * 1e3, MEMORY: peak_memory(step, benchmark.device) / 2**20}
        for name, step in steps.items()
    }


def step_of(host: BenchHost, run: PlannedRun, trained: Trained) -> Step:
    """Return the training step of a run, given those that it needs."""
    with tempfile.TemporaryDirectory() as scratch:
        return host.step(_job_of(run, trained, Path(scratch)))


def _job_of(run: PlannedRun, trained: Trained, folder: Path) -> Job:
    """Return the job of a run, given the runs that it needs."""
    teachers = {name: trained[one] if isinstance(one, str) else one for name, one in run.teachers.items()}
    start = trained[run.start] if run.start else None
    return Job(run.config, run.options, folder, 0, teachers, run.terms, run.recipe, start, stop=run.stop, data=run.data)


def machine(device: str) -> dict[str, Any]:
    """Describe what the costs were measured on."""
    if device == "cuda":
        return {"machine": torch.cuda.get_device_name(), "torch": torch.__version__}
    cores, model = os.cpu_count(), platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    names = (
        [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        if info.is_file()
        else []
    )
    return {"machine": f"{cores} cores, {names[0] if names else model}", "torch": torch.__version__}
