"""The commands that measure: ``kdgraft bench``, ``kdgraft demo`` and ``kdgraft report``."""

from __future__ import annotations

import argparse
import shlex
import sys
from importlib import import_module
from inspect import signature
from pathlib import Path
from typing import Any

from .errors import DistillError, check_number
from .hosts import demos, host_named, hosts


def add_measurements(commands: Any) -> None:
    """Add the demos, benchmarks and reports to the command line."""
    demo = commands.add_parser("demo", help="train a teacher, plain and distilled students on embedded data")
    demo.add_argument(
        "task",
        nargs="?",
        default="all",
        choices=["all", *demos()],
        help="core: plain PyTorch, the literature's experiments",
    )
    demo.add_argument("--seeds", type=int, default=1, help="number of seeds to train and average over (default: 1)")
    demo.add_argument(
        "--recipes",
        default="default",
        help="'default', 'all', 'none', or names separated by commas; of experiments in core",
    )
    demo.add_argument("--iterations", type=int, help="iterations of every training (default: the task's own)")
    demo.add_argument("--first-seed", type=int, default=0, help="the first of the seeds (default: 0)")
    demo.add_argument("--split", default="test", choices=["val", "test"], help="'val' to tune, with other seeds")
    layouts = "; ".join(f"{name}: {host.data}" for name, host in demos().items() if host.data)
    demo.add_argument("--data", help=f"train on the real dataset in this folder instead ({layouts})")
    demo.add_argument(
        "--fraction", type=float, help="fraction of --data's training set, if the demo supports it (default: 1)"
    )
    demo.add_argument("--out", default="runs/demo", help="where results go (default: runs/demo)")
    demo.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    demo.set_defaults(run=_demo)

    bench = commands.add_parser(
        "bench",
        help="benchmark students: what distilling brings and what it costs, with a report; or the costs of steps alone",
    )
    bench.add_argument(
        "plan",
        nargs="?",
        metavar="PLAN",
        help="a benchmark's file, or one that ships: det, seg, nlp, core; with --costs a host",
    )
    bench.add_argument("--dry-run", action="store_true", help="print what would be trained and how long it takes")
    bench.add_argument(
        "--compare", nargs=2, metavar="FOLDER", help="compare two results, and exit 1 if a figure got worse"
    )
    bench.add_argument(
        "--costs", action="store_true", help="measure only what steps with each method cost, on random weights"
    )
    bench.add_argument(
        "--pairs", type=int, default=30, help="with --costs: the number of interleaved rounds (default: 30)"
    )
    bench.add_argument("--data", help="the folder of the data set (default: the benchmark's own)")
    bench.add_argument("--seeds", type=int, nargs="+", help="the seeds (default: the benchmark's own)")
    bench.add_argument("--methods", nargs="+", metavar="NAME", help="only these of its methods")
    bench.add_argument("--iterations", type=int, help="the length of every training (default: the benchmark's own)")
    bench.add_argument(
        "--tune", type=int, metavar="N", help="tune each method's weights first, by N trainings on the validation split"
    )
    bench.add_argument("--processes", type=int, help="trainings side by side (default: the benchmark's own)")
    bench.add_argument("--split", choices=["val", "test"], help="'val' to tune, with other seeds")
    bench.add_argument(
        "--device", choices=["cpu", "cuda"], help="where to train (default: the benchmark's own, or cpu)"
    )
    bench.add_argument("--out", help="where results go (default: runs/bench/ and the benchmark's name)")
    bench.set_defaults(run=_bench)

    report = commands.add_parser("report", help="write a page that shows whether distilling paid, from finished runs")
    folders = "the work directory of a run; plain=FOLDER and teacher=FOLDER name those two, and a label that comes again another seed"
    report.add_argument("runs", nargs="+", metavar="[LABEL=]FOLDER", help=f"{folders}; or the folder of kdgraft demo")
    report.add_argument("--metric", help="the metric that it is about (default: the best known one that all runs have)")
    report.add_argument("--out", default="report.html", help="the page (default: report.html)")
    report.set_defaults(run=_report)


def _bench(arguments: argparse.Namespace) -> None:
    if arguments.compare:
        if import_module("kdgraft_bench.benchmark").compare(*arguments.compare):
            raise SystemExit(1)
        return
    if arguments.plan is None:
        raise DistillError("name a benchmark: kdgraft bench det, or a file of your own, or --compare two results")
    if arguments.costs:
        _measure_costs(arguments)
        return
    benchmark = import_module("kdgraft_bench.benchmark")  # says what to install where its libraries are missing
    names = ("data", "seeds", "methods", "iterations", "tune", "processes", "split", "device", "out")
    told = benchmark.read_benchmark(arguments.plan, **{name: getattr(arguments, name) for name in names})
    benchmark.benchmark(told, dry_run=arguments.dry_run, command=["kdgraft", *sys.argv[1:]])


def _measure_costs(arguments: argparse.Namespace) -> None:
    check_number("bench --costs", "--pairs", arguments.pairs, 1, whole=True)
    known = [name for name, host in hosts().items() if host.costs]
    if arguments.plan not in known:
        raise DistillError(f"--costs belongs to a host, {', '.join(known)}, got {arguments.plan!r}")
    out = f"{arguments.out or 'runs/costs'}/{arguments.plan}"
    host_named(arguments.plan).measurement().main(arguments.pairs, arguments.device or "cpu", out)


def _demo(arguments: argparse.Namespace) -> None:
    if arguments.seeds < 1:
        raise DistillError(f"--seeds must be at least 1, got {arguments.seeds}")
    if arguments.iterations is not None and arguments.iterations < 2:
        raise DistillError(f"--iterations must be at least 2, got {arguments.iterations}")
    tasks = list(demos()) if arguments.task == "all" else [arguments.task]
    if len(tasks) > 1 and arguments.recipes not in ("default", "all", "none"):
        raise DistillError(f"recipes belong to one task: kdgraft demo TASK --recipes {arguments.recipes}")
    if arguments.data is not None and arguments.task == "all":
        raise DistillError("--data belongs to one task: kdgraft demo TASK --data DIR")
    mains = {task: demos()[task].demonstration().main for task in tasks}
    shares = all("fraction" in signature(main).parameters for main in mains.values())
    if arguments.fraction is not None and not shares:
        raise DistillError(f"kdgraft demo {arguments.task} takes no --fraction of a training set")
    if arguments.fraction is not None and arguments.data is None:
        raise DistillError(f"--fraction belongs to real data: kdgraft demo {arguments.task} --data DIR --fraction 0.1")
    extra: dict[str, Any] = {} if arguments.iterations is None else {"iterations": arguments.iterations}
    name = ""
    if arguments.data is not None:
        extra["data"] = arguments.data
        if arguments.fraction is not None:
            extra["fraction"] = arguments.fraction
        name = f"_{Path(arguments.data).resolve().name}"  # beside the embedded set's results, not over them
    for task, main in mains.items():
        main(
            seeds=arguments.seeds,
            recipes=arguments.recipes,
            out=f"{arguments.out}/{task}{name}",
            device=arguments.device,
            first_seed=arguments.first_seed,
            split=arguments.split,
            **extra,
        )


def _report(arguments: argparse.Namespace) -> None:
    report = import_module("kdgraft_bench.report")  # says what to install where its libraries are missing
    runs = report.read_runs(arguments.runs)
    options = ["--metric", arguments.metric] if arguments.metric else []
    print(
        report.write_report(
            runs,
            arguments.out,
            metric=arguments.metric,
            pictures=report.pictures_of(arguments.runs),
            command=shlex.join(["kdgraft", "report", *arguments.runs, *options]),
        )
    )
    print(f"report in {arguments.out}")
