"""The plan of a benchmark: one run for the teacher, and for each student one alone and one with each method."""

from __future__ import annotations

from typing import Any

from kdgraft.errors import DistillError
from kdgraft.plans import Plan, plan_of

from ..hosts import BenchHost, Dataset
from ..spec import PLAIN, TEACHER, Benchmark, Model, run_name


def plan_of_benchmark(benchmark: Benchmark, host: BenchHost, dataset: Dataset) -> Plan:
    """Return the plan whose runs are those of :meth:`Benchmark.trained`, and those that the benchmark adds.

    A method's teacher is the benchmark's, unless it names another run or teaches nothing; ``start = "plain"`` starts from the
    weights of the plain student.

    Raises:
        DistillError: a run has a mistake, or refers to nothing.
    """

    def entry(model: Model, name: str) -> dict[str, Any]:
        if benchmark.batch is not None and model.config is not None:
            raise DistillError(f"batch is of the small models, and {model.config} says its own; leave batch out")
        config, options = host.config(model, dataset, benchmark, name)
        if model.checkpoint is not None:
            return {"config": config, "options": {**options, **model.options}, "checkpoint": model.checkpoint}
        return {"config": config, "options": {**options, **host.length(model, benchmark), **model.options}}

    runs: dict[str, Any] = {TEACHER: entry(benchmark.teacher, TEACHER), **benchmark.runs}
    for student, model in benchmark.students.items():
        alone = entry(model, student)
        runs[run_name(student, PLAIN)] = alone
        for method, told in benchmark.methods.items():
            options = {**alone["options"], **told.get("options", {})}
            named = {"teacher", "teachers"} & set(told) or not {"recipe", "terms"} & set(told)
            taught = {} if named else {"teacher": TEACHER}
            start = {"start": run_name(student, PLAIN)} if told.get("start") == PLAIN else {}
            runs[run_name(student, method)] = {"config": alone["config"], **taught, **told, **start, "options": options}
        for name, peer in benchmark.peers.items():
            config, options = host.peer(peer, student, dataset, benchmark)
            runs[run_name(student, name)] = {
                "config": config,
                "options": {**options, **host.length(peer, benchmark), **peer.options},
            }
    told = {"host": benchmark.host, "out": str(benchmark.out / "runs"), "seeds": list(benchmark.seeds), "runs": runs}
    return plan_of(told, f"benchmark {benchmark.name}", benchmark.folder, "")
