"""Carrying out the plans that ship, and testing every model that they make."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path

from kdgraft.errors import check_number
from kdgraft.hosts import host_named
from kdgraft.plans import Plan, PlannedRun, carry_out, read_plan
from kdgraft.tables import print_rows

from ..results import Result, mean_sd, write_results

SCHEMES = ("takd", "born_again")
LENGTHS = {"det": "train_cfg.max_iters", "nlp": "training.max_steps"}
"""The hosts, each with the option that sets the length of a training."""
METRICS = {"det": "coco/bbox_mAP", "nlp": "accuracy"}
TESTED = {"det": (), "nlp": ("data.eval=runs/demo/nlp/data/test.jsonl",)}
"""The options with which a host tests on the test set."""


def measure(
    scheme: str,
    host: str,
    seeds: int = 1,
    iterations: int | None = None,
    out: str | None = None,
    dry_run: bool = False,
) -> list[Result]:
    """Carry out a plan, test every run of it, print a table and write ``results.csv``.

    Args:
        scheme: one of :data:`SCHEMES`.
        host: ``"det"`` or ``"nlp"``.
        seeds: the number of seeds, from 0.
        iterations: the length of every training; the demo's by default.
        out: the folder of the runs and the results; the plan's own by default.
        dry_run: report what would be done, and do nothing.

    Returns:
        The figures on the validation and on the test data.
    """
    check_number("plans", "--seeds", seeds, 1, whole=True)
    plan = _settled(read_plan(Path(__file__).with_name(f"{scheme}_{host}.toml")), host, seeds, iterations, out)
    if not dry_run:
        host_named(host).plugin()  # says what to install where the framework is missing
        import_module(f"kdgraft_bench.hosts.{host}_setup").write_data(Path(f"runs/demo/{host}/data"))
    found = carry_out(plan, dry_run=dry_run)
    if dry_run:
        return []
    trainer, tested = host_named(host).make_trainer(), dict[str, float]()
    results = []
    for (name, seed), model in found.items():
        if model.weights not in tested:  # a chosen run was tested by its own name
            tested[model.weights] = trainer.test(model.config, model.weights, TESTED[host])[METRICS[host]]
        for part, value in (("val", model.metrics[METRICS[host]]), ("test", tested[model.weights])):
            results.append(Result(host, scheme, name, part, seed, METRICS[host], value))
    write_results(results, plan.out / "results.csv")
    print_rows(_rows(plan, results), f"{scheme} in {host}: {METRICS[host]}, seeds: {seeds}")
    return results


def _settled(plan: Plan, host: str, seeds: int, iterations: int | None, out: str | None) -> Plan:
    """Return a plan with other seeds, another folder and another length of its trainings."""
    length = {} if iterations is None else {LENGTHS[host]: iterations}
    runs = tuple(
        replace(run, options={**run.options, **length}) if isinstance(run, PlannedRun) else run for run in plan.runs
    )
    return Plan(runs, plan.out if out is None else Path(out), tuple(range(seeds)))


def _rows(plan: Plan, results: Sequence[Result]) -> list[dict[str, str]]:
    """Return the rows of the table: mean and standard deviation over seeds on the validation and on the test data."""

    def over_seeds(name: str, part: str) -> str:
        return mean_sd([result.value for result in results if (result.model, result.method) == (name, part)])

    return [{"run": run.name, **{part: over_seeds(run.name, part) for part in ("val", "test")}} for run in plan.runs]
