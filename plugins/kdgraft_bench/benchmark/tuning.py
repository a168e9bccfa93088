"""Weights of methods tuned on the validation split, each with the same number of trainings, before the benchmark itself."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from tqdm import tqdm

from kdgraft.errors import DistillError
from kdgraft.files import digest, read_record, written_whole
from kdgraft.hosts import TrainedModel, host_named
from kdgraft.plans import Plan, carry_out
from kdgraft.registry import Registry, expand_recipe

from ..hosts import BenchHost, Dataset
from ..results import lower_is_better
from ..spec import Benchmark, run_name
from .planned import plan_of_benchmark
from .working import Done, Failure, Run, side_by_side

SEED = 1000
"""The seed of the trainings that tune; the benchmark's own must be others."""
FILE = "tuned.json"
WITHOUT_WEIGHT = ("TaskShare",)
"""The terms whose weight is a share of the host's loss, which tuning leaves as it is."""


def factors(count: int) -> list[float]:
    """Return so many factors on the published weights: powers of two around 1, such as 1/8 … 16 for eight."""
    return [2.0 ** (place - (count - 1) // 2) for place in range(count)]


def tuned(told: Benchmark, host: BenchHost, dataset: Dataset) -> tuple[Benchmark, dict[str, float]]:
    """Return the benchmark with each method's weights multiplied by the factor that is best on the validation split.

    The first student is trained with each factor, by a teacher of the same seed, which no run of the table has. The figures are
    kept in ``tuned.json``.

    Returns:
        The benchmark, and the factors by method; none if nothing is to be tuned.

    Raises:
        DistillError: a training failed or measured no metric to choose by, or a weight is no number.
    """
    if told.tune is None:
        return told, {}
    if SEED in told.seeds:
        raise DistillError(f"seed {SEED} is that of tuning; give the benchmark other seeds")
    candidates = {
        f"{method}_x{place}": (method, factor)
        for method in told.methods
        for place, factor in enumerate(factors(told.tune))
    }
    scaled = {name: scaled_method(told.host, told.methods[method], by) for name, (method, by) in candidates.items()}
    student = next(iter(told.students))
    trial = replace(
        told, methods=scaled, students={student: told.students[student]}, seeds=(SEED,), out=told.out / "tuning"
    )
    path, settings = told.out / FILE, digest([_plain(trial), [*candidates]])
    known = read_record(path)
    if known.get("settings") != settings:
        values = _carried_out(trial, host, dataset, student)
        best = {
            method: max((name for name in candidates if candidates[name][0] == method), key=values.__getitem__)
            for method in told.methods
        }
        known = {
            "settings": settings,
            "factors": {method: candidates[name][1] for method, name in best.items()},
            "values": {
                method: {candidates[n][1]: v for n, v in values.items() if candidates[n][0] == method}
                for method in best
            },
        }
        with written_whole(path) as part:
            part.write_text(json.dumps(known, indent=1), encoding="utf-8")
    found: dict[str, float] = known["factors"]
    chosen = {name: scaled_method(told.host, told.methods[name], factor) for name, factor in found.items()}
    return replace(told, methods=chosen), found


def _plain(trial: Benchmark) -> dict[str, Any]:
    """Return what the outcome of tuning depends on."""
    names = ("host", "data", "teacher", "students", "methods", "runs", "iterations", "metric", "device")
    return {name: str(getattr(trial, name)) for name in names}


def _carried_out(trial: Benchmark, host: BenchHost, dataset: Dataset, student: str) -> dict[str, float]:
    """Train every candidate, and return its score on the validation split, higher being better."""
    plan = plan_of_benchmark(trial, host, dataset)
    models = dict(carry_out(plan, dry_run=True, tell=lambda line: None))
    needed = _needed(plan, {run_name(student, method) for method in trial.methods})
    todo = [(name, SEED) for name in needed if (name, SEED) not in models]
    with tqdm(total=len(todo), desc=f"{trial.name}, tuning", unit="run", disable=not todo) as bar:

        def tell(run: Run, done: Done) -> None:
            models[run] = done.model
            bar.update()

        failed: list[Failure] = side_by_side(trial, plan, todo, tell, _silent)
    if failed:
        raise DistillError(
            f"tuning: {failed[0].run[0]} failed: {failed[0].said}; see {plan.folder(*failed[0].run) / 'log.txt'}"
        )
    return {method: _score(trial, host, models[run_name(student, method), SEED]) for method in trial.methods}


def _needed(plan: Plan, names: set[str]) -> list[str]:
    """Return the runs of these names and those that they need, in the plan's order."""
    wanted = {run.name for name in names for run in plan.part(name, SEED).runs}
    return [run.name for run in plan.runs if run.name in wanted]


def _silent(working: set[Run]) -> None:
    """Show nothing of the runs at work."""


def _score(trial: Benchmark, host: BenchHost, model: TrainedModel) -> float:
    metric = trial.metric or next((name for name in host.scores if host.validated(name) in model.metrics), "")
    key = host.validated(metric)
    if key not in model.metrics:
        raise DistillError(
            f"tuning needs {metric or 'a metric'} on the validation split; there are {', '.join(model.metrics) or 'none'}"
        )
    return -model.metrics[key] if lower_is_better(metric) else model.metrics[key]


def scaled_method(host: str, method: Mapping[str, Any], factor: float) -> dict[str, Any]:
    """Return a method with all weights of its terms multiplied by a factor.

    Args:
        host: the host's name.
        method: its recipe and its terms.
        factor: the factor.

    Raises:
        DistillError: a weight is set by the share of the gradient, which needs no tuning.
    """
    terms, recipes = host_named(host).registries()
    told = [*expand_recipe(method.get("recipe"), recipes), *method.get("terms", ())]
    kept = {key: value for key, value in method.items() if key != "recipe"}
    return {**kept, "terms": [_scaled(term, factor, terms) for term in told]}


def _scaled(term: Any, factor: float, terms: Registry) -> dict[str, Any]:
    settings = {"type": term} if isinstance(term, str) else dict(term) if isinstance(term, Mapping) else {}
    if not isinstance(settings.get("type"), str):
        raise DistillError(f"a term needs its type, such as {{ type = 'SoftTargets' }}, got {term!r}")
    if settings["type"] in WITHOUT_WEIGHT:
        return settings
    weight = settings.get("weight", _default_weight(terms.get(settings["type"])))
    if not isinstance(weight, (int, float)) or isinstance(weight, bool):
        raise DistillError(f"{settings['type']}: tuning multiplies weights that are numbers, got weight = {weight!r}")
    return {**settings, "weight": factor * weight}


def _default_weight(term: Callable[..., Any]) -> Any:
    given = inspect.signature(term).parameters.get("weight")
    return 1.0 if given is None or given.default is inspect.Parameter.empty else given.default
