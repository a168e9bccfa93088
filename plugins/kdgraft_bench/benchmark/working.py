"""Runs side by side: each process carries out one run after another, on its share of the cores."""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from kdgraft.errors import DistillError
from kdgraft.files import digest_of_weights, read_record, written_whole
from kdgraft.hosts import TrainedModel
from kdgraft.plans import Choice, Plan, PlannedRun, carry_out

from ..decisions import calibration_error
from ..hosts import bench_host
from ..spec import TEACHER, Benchmark

LOG, DECISIONS, TESTED, TEXTS = "log.txt", "decisions.npz", "tested.json", "texts.json"
CALIBRATION = "calibration error"
Run = tuple[str, int]
"""A run's name and its seed."""


@dataclass(frozen=True)
class Done:
    """The outcome of a run.

    Attributes:
        model: the trained model.
        metrics: its figures on the tested split; empty for a run that is not in the table.
        seconds: the time of its training in this process; of a resumed run that since the last start.
        validated: those of its figures that its training measured at the end on the validation split, if the tested one is another.
    """

    model: TrainedModel
    metrics: Mapping[str, float]
    seconds: float
    validated: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Failure:
    """A run that raised an error, or that needs one that did.

    Attributes:
        run: the run.
        said: the error in one line.
    """

    run: Run
    said: str


def side_by_side(
    benchmark: Benchmark,
    plan: Plan,
    runs: Iterable[Run],
    tell: Callable[[Run, Done], None],
    show: Callable[[set[Run]], None],
) -> list[Failure]:
    """Carry out runs in as many processes as the benchmark says, each after those that it needs.

    Args:
        benchmark: the benchmark.
        plan: its plan.
        runs: the runs to carry out; all others that they need are finished.
        tell: called with each run when it is done.
        show: called with the runs at work whenever these change.

    Returns:
        The runs that failed.

    Raises:
        DistillError: a process was killed from outside.
    """
    by_name = {run.name: run for run in plan.runs}
    waiting = list(runs)
    undone = set(waiting)
    failures: dict[Run, Failure] = {}
    working: dict[Future[Done], Run] = {}
    with processes(benchmark.processes, benchmark.device) as pool:
        while waiting or working:
            for run in list(waiting):
                needs = {(need, run[1]) for need in by_name[run[0]].needs}
                if lost := next((need for need in needs if need in failures), None):
                    failures[run] = Failure(run, f"it needs {lost[0]}, which failed")
                elif len(working) < benchmark.processes and not needs & undone:
                    working[pool.submit(carry_out_one, benchmark, plan, *run)] = run
                else:
                    continue
                waiting.remove(run)
            show({*working.values()})
            finished, _ = wait(working, return_when=FIRST_COMPLETED)
            for future in finished:
                run = working.pop(future)
                undone.discard(run)
                try:
                    tell(run, future.result())
                except BrokenProcessPool:
                    raise DistillError(
                        f"the process of {run[0]} (seed {run[1]}) was killed, perhaps for want of memory; start again to go on"
                    ) from None
                except Exception as error:  # whatever a host raises: the other runs go on
                    failures[run] = Failure(run, one_line(error))
    return list(failures.values())


def one_line(error: Exception) -> str:
    """Return an error's type and its message in one line of limited length."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


@contextmanager
def processes(count: int, device: str) -> Iterator[ProcessPoolExecutor]:
    """Start processes with an equal share of the cores each, which end with this one, however it ends."""
    threads = str(max((os.cpu_count() or 1) // count, 1))
    told = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), threads)
    told |= {"TOKENIZERS_PARALLELISM": "false", "KINETO_LOG_LEVEL": "5"}
    if device == "cpu":
        told["CUDA_VISIBLE_DEVICES"] = ""
    before = {name: os.environ.get(name) for name in told}
    os.environ.update(told)  # new processes inherit it, and read it before they import torch
    pool = ProcessPoolExecutor(count, multiprocessing.get_context("spawn"), _begin, (os.getpid(),))
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _begin(parent: int) -> None:
    """End this process soon after its parent, which may be killed without a chance to say so."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def carry_out_one(benchmark: Benchmark, plan: Plan, name: str, seed: int) -> Done:
    """Carry out one run in this process, test it, and keep its decisions beside its weights; its messages go to ``log.txt``."""
    (run,) = (run for run in plan.runs if run.name == name)
    folder = plan.folder(name, seed)
    folder.mkdir(parents=True, exist_ok=True)
    with logged(folder / LOG):
        started = time.perf_counter()
        found = {each: model for (each, _), model in carry_out(plan.part(name, seed)).items()}
        trained = found[name]
        seconds = time.perf_counter() - started
        in_table = name in {told for told, _, _ in benchmark.trained()}
        if isinstance(run, Choice) or not in_table:
            return Done(trained, {}, seconds)
        run = replace(run, options=run.filled(found))
        metrics, seconds = _tested(benchmark, run, trained, folder, seconds)
    return Done(trained, metrics, seconds, _validated(benchmark, trained, metrics))


def _validated(benchmark: Benchmark, trained: TrainedModel, metrics: Mapping[str, float]) -> Mapping[str, float]:
    """Return those figures of the table that the training measured on a validation split that is not the tested one."""
    host = bench_host(benchmark.host)
    if benchmark.measured == "val":
        return {}
    known = {name: trained.metrics.get(host.validated(name)) for name in metrics}
    found = {name: value for name, value in known.items() if value is not None}
    return {} if all(value == metrics[name] for name, value in found.items()) else found


def _tested(
    benchmark: Benchmark, run: PlannedRun, trained: TrainedModel, folder: Path, seconds: float
) -> tuple[Mapping[str, float], float]:
    """Test a run, unless it was tested before, and return its figures and the time of its training."""
    record, key = folder / TESTED, digest_of_weights(trained.weights)
    found = read_record(record)
    if found.get("weights") == key and found.get("split") == benchmark.split:
        return found["metrics"], found["seconds"]
    host = bench_host(benchmark.host)
    tested = host.test(run, trained, host.dataset(benchmark), benchmark.split)
    metrics = dict(tested.metrics)
    if tested.decisions is not None:
        tested.decisions.write(folder / DECISIONS)
        metrics[CALIBRATION] = calibration_error(tested.decisions.confidence, tested.decisions.right)
    told = {"weights": key, "split": benchmark.split, "metrics": metrics, "seconds": seconds}
    with written_whole(record) as part:
        part.write_text(json.dumps(told), encoding="utf-8")
    return metrics, seconds


def write_texts(
    benchmark: Benchmark, plan: Plan, runs: Iterable[Run], finished: Mapping[Run, TrainedModel]
) -> dict[Run, Mapping[str, float]]:
    """Return the figures of the texts that language models write, each by the measure of the teacher of its seed.

    Figures that were measured before for these weights and this number of texts are taken as they are.
    """
    found: dict[Run, Mapping[str, float]] = {}
    with processes(benchmark.processes, benchmark.device) as pool:
        asked = {run: pool.submit(_write_texts, benchmark, plan, run, finished) for run in runs}
        for run, future in asked.items():
            found[run] = future.result()
    return found


def _write_texts(
    benchmark: Benchmark, plan: Plan, run: Run, finished: Mapping[Run, TrainedModel]
) -> Mapping[str, float]:
    (planned,) = (each for each in plan.runs if each.name == run[0])
    trained, teacher = finished[run], finished[TEACHER, run[1]]
    record = plan.folder(*run) / TEXTS
    wanted = {
        "weights": [digest_of_weights(one.weights) for one in (trained, teacher)],
        "split": benchmark.split,
        "count": benchmark.texts,
    }
    known = read_record(record)
    if {key: known.get(key) for key in wanted} != wanted:
        assert isinstance(planned, PlannedRun) and benchmark.texts is not None
        with logged(plan.folder(*run) / LOG):
            host = bench_host(benchmark.host)
            told = planned, trained, teacher, host.dataset(benchmark), benchmark.split, benchmark.texts
            known = {**wanted, "figures": dict(host.texts(*told))}
        with written_whole(record) as part:
            part.write_text(json.dumps(known), encoding="utf-8")
    figures: Mapping[str, float] = known["figures"]
    return figures


@contextmanager
def logged(path: Path) -> Iterator[None]:
    """Append everything that this process prints to a file while the body runs."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [os.dup(one) for one in (1, 2)]
    with path.open("a", encoding="utf-8") as file:
        for one in (1, 2):
            os.dup2(file.fileno(), one)
        try:
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for one, saved in zip((1, 2), kept, strict=True):
                os.dup2(saved, one)
                os.close(saved)
