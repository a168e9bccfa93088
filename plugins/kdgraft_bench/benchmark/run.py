"""Carrying out a benchmark: trainings, costs, tables, pictures and the report."""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Mapping, Sequence

import numpy as np
from tqdm import tqdm

from kdgraft.errors import DistillError
from kdgraft.files import held, read_record, written_whole
from kdgraft.hosts import TrainedModel
from kdgraft.plans import Plan, PlannedRun, carry_out
from kdgraft.tables import print_rows

from ..decisions import Decisions, agreement, same_items, telling
from ..hosts import BenchHost, Dataset, bench_host
from ..records import Row, append, read_rows
from ..report import read_runs, write_report
from ..report.gains import digits, gains, number, taken
from ..results import Result, gap_closed, markdown, summary, write_results
from ..spec import PLAIN, TEACHER, Benchmark, run_name
from ..timing import check_device
from .costs import FEW_ROUNDS, OPERATIONS, PARAMETERS, ROUNDS, SIZE, STEP, Costs, latency_of, machine, measure_costs
from .forecast import Forecast, forecast
from .planned import plan_of_benchmark
from .tuning import tuned
from .working import DECISIONS, Done, Run, processes, side_by_side, write_texts

AGREEMENT = "agreement with the teacher"
GAP = "of the gap"
COSTS = "costs.json"
PICTURES = 5
"""The samples of the picture of outputs."""


def benchmark(
    told: Benchmark, *, dry_run: bool = False, command: Sequence[str] = (), short: bool = False
) -> list[Result]:
    """Train what is missing, measure, and write ``results.csv``, ``table.md``, ``report.html`` and pictures to ``out``.

    A call that was interrupted, however that happened, goes on where it was: finished runs are kept, and the others resume.

    Args:
        told: the benchmark.
        dry_run: print what would be done and about how long it takes, and train nothing.
        command: the command that was given, for the report.
        short: print what decides alone, and measure costs in fewer rounds; ``table.md`` has every figure.

    Returns:
        The figures of all runs.

    Raises:
        DistillError: an entry of the benchmark has a mistake, a folder holds a run of other settings, or a run failed.
    """
    check_device(told.device)
    host, factors = bench_host(told.host), dict[str, float]()
    told.out.mkdir(parents=True, exist_ok=True)
    with held(told.out):
        dataset = host.dataset(told)
        told = host.on(told, dataset)
        if not dry_run:
            told, factors = tuned(told, host, dataset)
        elif told.tune is not None:
            count = told.tune * len(told.methods) + 1
            print(f"weights are tuned first, by {count} trainings; below are the runs of the table")
        plan = plan_of_benchmark(told, host, dataset)
        finished = carry_out(plan, dry_run=True, tell=lambda line: None)
        if dry_run:
            _announce(told, plan, finished)
            return []
        absent = _train(told, plan, dataset, finished)
        finished = carry_out(plan, dry_run=True, tell=lambda line: None)
        first = {name: model for (name, seed), model in finished.items() if seed == told.seeds[0]}
        costs = _costs(told, plan, first, FEW_ROUNDS if short else ROUNDS)
        results = _results(told, plan, costs, _texts(told, plan, finished))
        write_results(results, told.out / "results.csv")
        metric = _metric(told, host, results)
        _print(told, dataset, results, metric, costs, short)
        runs = read_runs([str(told.out)])
        _draw(told, host, dataset, plan, first, taken(gains(runs, metric)).label)
        said = write_report(
            runs,
            told.out / "report.html",
            metric=metric,
            pictures=sorted(told.out.glob("*.png")),
            command=shlex.join(command),
            notes=[_weights(factors, told.tune), *absent],
        )
    print("\n".join([said, *absent]))
    print(f"report in {told.out / 'report.html'}")
    return results


def _weights(factors: Mapping[str, float], count: int | None) -> str:
    """Say which weights the methods had."""
    if count is None:
        return "Each method has the weights that the benchmark's file gives it, the published ones where it gives none."
    chosen = ", ".join(f"{method} × {factor:g}" for method, factor in factors.items())
    return f"Weights were tuned on the validation split by {count} trainings of each method with a seed of its own: {chosen}."


# --- training


def _todo(told: Benchmark, plan: Plan, finished: Mapping[Run, TrainedModel]) -> list[Run]:
    """Return the runs that are not finished, or not in the results of the split."""
    rows = {key for key, row in read_rows(told.out).items() if row.split in ("", told.split)}
    table = {name: (student, method) for name, student, method in told.trained()}
    return [
        (run.name, seed)
        for run, seed in plan
        if (run.name, seed) not in finished or (run.name in table and (*table[run.name], seed) not in rows)
    ]


def _train(told: Benchmark, plan: Plan, dataset: Dataset, finished: Mapping[Run, TrainedModel]) -> list[str]:
    """Carry out what is missing, and return a sentence for each run of a peer that failed.

    Raises:
        DistillError: another run failed.
    """
    todo = _todo(told, plan, finished)
    table = {name: (student, method) for name, student, method in told.trained()}
    pace = _Pace(told, plan, todo)
    with tqdm(total=len(todo), desc=f"{told.name}, {dataset.name}", unit="run", disable=not todo) as bar:

        def tell(run: Run, done: Done) -> None:
            name, seed = run
            if name in table:
                student, method = table[name]
                model = told.teacher if student == TEACHER else told.students[student]
                folder = str(plan.folder(name, seed).relative_to(told.out))
                row = (told.host, dataset.name, student, model.title, method, seed, done.metrics, done.seconds, folder)
                append(told.out, Row(*row, done.validated, told.split))
            pace.done(run, done.seconds)
            bar.update()
            figures = "  ".join(f"{key} {value:.4g}" for key, value in done.metrics.items())
            bar.write(f"{name} (seed {seed}): {figures or 'done'}  ({done.seconds:.0f} s)")

        def show(working: set[Run]) -> None:
            names = ", ".join(f"{name} {seed}" for name, seed in sorted(working))
            bar.set_postfix_str(f"{pace.left(working)}; {names}" if working else "")

        failures = side_by_side(told, plan, todo, tell, show)
    peers = {run_name(student, peer) for student in told.students for peer in told.peers}
    failed = [one for one in failures if one.run[0] not in peers]
    if failed:
        for one in failed[1:]:
            print(f"{one.run[0]} (seed {one.run[1]}): {one.said}")
        first = failed[0]
        more = f"; {len(failed) - 1} more are above" if len(failed) > 1 else ""
        raise DistillError(
            f"{first.run[0]} (seed {first.run[1]}) failed: {first.said}; see {plan.folder(*first.run) / 'log.txt'}{more}"
        )
    return [f"The peer {one.run[0]} (seed {one.run[1]}) does not run: {one.said}" for one in failures]


class _Pace:
    """An estimate of the time that is left, from the times of the runs that are done.

    Args:
        told: the benchmark.
        plan: its plan.
        todo: the runs to do.
    """

    def __init__(self, told: Benchmark, plan: Plan, todo: Sequence[Run]) -> None:
        self.told, self.left_over, self.begun = told, set(todo), dict[Run, float]()
        names = {(student, method): name for name, student, method in told.trained()}
        self.known: dict[str, list[float]] = {}
        for (student, method, _), row in read_rows(told.out).items():
            if (student, method) in names:
                self.known.setdefault(names[student, method], []).append(row.seconds)

    def done(self, run: Run, seconds: float) -> None:
        """Take note of a run that is done."""
        self.left_over.discard(run)
        self.known.setdefault(run[0], []).append(seconds)

    def seconds(self, run: Run) -> float | None:
        """Return the expected time of a run: the mean of its like, or of all; ``None`` if none is known."""
        values = self.known.get(run[0]) or [value for values in self.known.values() for value in values]
        return float(np.mean(values)) if values else None

    def total(self) -> float | None:
        """Return the expected time of all runs that are left, by the clock."""
        times = [self.seconds(run) for run in self.left_over]
        if any(value is None for value in times):
            return None
        return sum(value for value in times if value is not None) / self.told.processes

    def left(self, working: set[Run]) -> str:
        """Say how much time is left while some runs are at work."""
        now = time.monotonic()
        self.begun = {run: self.begun.get(run, now) for run in working}
        total = self.total()
        if total is None:
            return "the time left is not known yet"
        spent = sum(min(now - since, self.seconds(run) or 0.0) for run, since in self.begun.items())
        return f"about {in_words(total - spent / self.told.processes)} left"


def in_words(seconds: float) -> str:
    """Format a time roughly: ``"40 s"``, ``"12 min"`` or ``"3.4 h"``."""
    if seconds < 90:
        return f"{max(seconds, 0):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _announce(told: Benchmark, plan: Plan, finished: Mapping[Run, TrainedModel]) -> None:
    """Print what would be done, and about how long it takes: by finished runs of the same kind, or by some steps of a new one.

    Raises:
        DistillError: a run cannot be built, other than a peer's.
    """
    todo = _todo(told, plan, finished)
    pace = _Pace(told, plan, todo)
    names = {name for name, _ in todo}
    unknown = [run.name for run in plan.runs if run.name in names and run.name not in pace.known]
    found = Forecast({}, {}, {})
    if unknown:
        print("timing some steps of each new run …", flush=True)
        with processes(told.processes, told.device) as pool:
            found = pool.submit(forecast, told, plan, unknown, told.out / "forecast.log").result()
    pace.known |= {name: [seconds] for name, seconds in found.seconds.items()}
    pace.known |= {run.name: [0.0] for run in plan.runs if isinstance(run, PlannedRun) and run.checkpoint is not None}
    rows = []
    for run in plan.runs:
        mine = [seed for name, seed in todo if name == run.name]
        expected = pace.known.get(run.name)
        steps = " and its evaluations" if run.name in found.seconds else ""
        rows.append(
            {
                "run": run.name,
                "seeds to do": ", ".join(map(str, mine)) or "none",
                "taught by": ", ".join(run.needs) or "–",
                "each takes": f"about {in_words(float(np.mean(expected)))}{steps}" if expected else "–",
                **({"step memory": _mebibytes(found.memory.get(run.name))} if found.memory else {}),
            }
        )
    print_rows(rows, f"{told.name}: {len(todo)} of {len(plan.runs) * len(plan.seeds)} runs to do, in {told.out}")
    if todo:
        print(f"about {in_words(pace.total() or 0.0)} in {told.processes} processes side by side")
    peers = {run_name(student, peer) for student in told.students for peer in told.peers}
    wrong = [name for name in found.failures if name not in peers]
    for name, said in found.failures.items():
        print(f"{'The peer ' if name in peers else ''}{name} does not run: {said}")
    if wrong:
        raise DistillError(f"{wrong[0]} cannot be trained; see {told.out / 'forecast.log'}, and its error above")


def _mebibytes(count: int | None) -> str:
    return "–" if count is None else f"{count / 2**20:.0f} MiB"


# --- figures


def _costs(told: Benchmark, plan: Plan, first: Mapping[str, TrainedModel], rounds: int) -> Costs:
    """Measure the costs in a process of its own, unless they were measured before for these runs."""
    path = told.out / COSTS
    wanted = {"names": [name for name, _, _ in told.trained()], "batches": list(told.batches), "device": told.device}
    known = read_record(path)
    if {key: known.get(key) for key in wanted} == wanted:
        found: Costs = known["costs"]
        return found
    print("measuring latency and training steps …", flush=True)
    with processes(1, told.device) as pool:
        found = pool.submit(measure_costs, told, plan, first, told.out / "costs.log", rounds).result()
        where = pool.submit(machine, told.device).result()
    with written_whole(path) as part:
        part.write_text(json.dumps({**wanted, **where, "costs": found}, indent=1), encoding="utf-8")
    return found


def _texts(told: Benchmark, plan: Plan, finished: Mapping[Run, TrainedModel]) -> Mapping[Run, Mapping[str, float]]:
    """Return the figures of the texts that language models write, where the benchmark asks for them."""
    if told.texts is None:
        return {}
    table = {name for name, _, _ in told.trained()}
    return write_texts(told, plan, [run for run in finished if run[0] in table], finished)


def _results(told: Benchmark, plan: Plan, costs: Costs, texts: Mapping[Run, Mapping[str, float]]) -> list[Result]:
    """Return all figures: those of the rows, the agreement with the teacher, those of texts, and the costs."""
    rows, found = read_rows(told.out), list[Result]()
    for seed in told.seeds:
        teacher, plain = (
            _decisions(plan, name, seed) for name in (TEACHER, run_name(next(iter(told.students)), PLAIN))
        )
        # With another tokenizer a teacher's perplexity is of other tokens, and no figure to be closed in on.
        apart = teacher is not None and plain is not None and not same_items(teacher, plain)
        for name, student, method in told.trained():
            if method in told.peers and (student, method, seed) not in rows:
                continue
            row = rows[student, method, seed]
            metrics = {} if method == TEACHER and apart else dict(row.metrics)
            metrics |= texts.get((name, seed), {})
            mine = _decisions(plan, name, seed) if method != TEACHER else None
            if mine is not None and teacher is not None and same_items(mine, teacher):
                metrics[AGREEMENT] = agreement(mine, teacher)
            known = (row.task, row.dataset, row.student, method, seed)
            found += [Result(*known, key, value) for key, value in (metrics | costs.get(name, {})).items()]
    return found


def _decisions(plan: Plan, name: str, seed: int) -> Decisions | None:
    path = plan.folder(name, seed) / DECISIONS
    return Decisions.read(path) if path.is_file() else None


def _metric(told: Benchmark, host: BenchHost, results: Sequence[Result]) -> str:
    """Return the metric that decides.

    Raises:
        DistillError: the benchmark names one that was not measured.
    """
    there = dict.fromkeys(result.metric for result in results if result.method == PLAIN)
    if told.metric is not None:
        if told.metric not in there:
            raise DistillError(
                f"{told.name} is about {told.metric!r}, which was not measured; there are {', '.join(there)}"
            )
        return told.metric
    return next((name for name in host.scores if name in there), next(iter(there)))


def _print(
    told: Benchmark, dataset: Dataset, results: Sequence[Result], metric: str, costs: Costs, short: bool
) -> None:
    """Print a table for each student, and write all of them to ``table.md``."""
    printed = ("method", "model", metric, PARAMETERS, OPERATIONS, GAP)
    shown = [name for name in dict.fromkeys(r.metric for r in results) if name not in costs[TEACHER]]
    shown += [PARAMETERS, OPERATIONS, SIZE, latency_of(told.batches[0]), STEP]
    places = {name: digits(r.value for r in results if r.metric == name) for name in shown}
    split = f"{told.measured} split, {len(told.seeds)} seed{'s' if len(told.seeds) > 1 else ''}"
    text = []
    for student in told.students:
        once = [r for r in results if r.seed == told.seeds[0] or r.metric not in costs[TEACHER]]
        mine = [replace_model(r, told) for r in once if r.model in (student, TEACHER)]
        table = summary(mine, places)
        title = f"{dataset.name}, {split}, {student}: {told.students[student].title}"
        for row in table:
            closed = gap_closed(mine, metric, row["method"]) if row["method"] not in (TEACHER, PLAIN) else float("nan")
            row[GAP] = f"{closed:.0%}" if np.isfinite(closed) else "–"
            if (known := _published(told, student)) and any(metric in one for one in known.values()):
                value = known.get(row["method"], {}).get(metric)
                row[f"{metric}, published"] = "–" if value is None else number(value)
        print_rows([{key: row[key] for key in row if not short or key in printed} for row in table], f"\n{title}")
        text.append(f"{title}\n\n{markdown(table)}")
    (told.out / "table.md").write_text("\n\n".join(text) + "\n", encoding="utf-8")


def _published(told: Benchmark, student: str) -> Mapping[str, Mapping[str, float]]:
    """Return the published figures by method."""
    return {TEACHER: told.teacher.published, PLAIN: told.students[student].published, **told.published}


def replace_model(result: Result, told: Benchmark) -> Result:
    """Return a figure with the model in words in place of the student's name."""
    model = told.teacher if result.model == TEACHER else told.students[result.model]
    return result._replace(model=model.title)


# --- pictures


def _draw(
    told: Benchmark, host: BenchHost, dataset: Dataset, plan: Plan, first: Mapping[str, TrainedModel], label: str
) -> None:
    """Draw the outputs of the first seed where teacher, plain and distilled student differ most.

    Args:
        told, host, dataset, plan: the benchmark.
        first: the models of the first seed.
        label: the method that the verdict is about, after its student where there are several.
    """
    student, _, method = label.rpartition(": ")
    student, seed = student or next(iter(told.students)), told.seeds[0]
    names = {TEACHER: TEACHER, PLAIN: run_name(student, PLAIN), method: run_name(student, method)}
    if any(name not in first for name in names.values()):  # a peer that did not run with this seed
        return
    teacher, plain, distilled = (_decisions(plan, name, seed) for name in names.values())
    if host.picture and teacher and plain and distilled and same_items(teacher, plain):
        samples = telling(teacher, plain, distilled, PICTURES)
        path = told.out / f"{host.picture}.png"
        host.draw({title: first[name] for title, name in names.items()}, dataset, samples, path)
