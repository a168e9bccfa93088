"""The commands that measure: ``kdgraft demo``, ``kdgraft bench``, ``kdgraft experiments`` and ``kdgraft report``."""

from __future__ import annotations

import argparse
import shlex
import sys
from importlib import import_module
from typing import Any

from .errors import DistillError, check_number
from .hosts import host_named, hosts


def add_measurements(commands: Any) -> None:
    """Add the demos, benchmarks, experiments and reports to the command line."""
    demo = commands.add_parser(
        "demo", help="train a teacher, plain and distilled students on embedded data, in minutes"
    )
    demo.add_argument("names", nargs="*", metavar="NAME", help="core, nlp, seg, det (default: all of them)")
    demo.add_argument("--seeds", type=int, default=1, help="number of seeds to train and average over (default: 1)")
    demo.add_argument("--full", action="store_true", help="the whole benchmark, as kdgraft bench NAME trains it")
    demo.add_argument("--out", default="runs/demo", help="where results go (default: runs/demo)")
    demo.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    demo.set_defaults(run=_demo)

    _add_experiments(commands)
    bench = commands.add_parser(
        "bench",
        help="benchmark students: what distilling brings and what it costs, with a report; or the costs of steps alone",
    )
    bench.add_argument(
        "plan",
        nargs="?",
        metavar="PLAN",
        help="a benchmark's file, or one that ships: core, nlp, seg, det …; with --costs a host",
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
    layouts = "; ".join(f"{name}: {host.data}" for name, host in hosts().items() if host.data)
    bench.add_argument("--data", help=f"the folder of the data set (default: the benchmark's own; {layouts})")
    bench.add_argument(
        "--fraction", type=float, help="the share of a training set to use, in Hugging Face (default: 1)"
    )
    bench.add_argument("--seeds", type=int, nargs="+", help="the seeds (default: the benchmark's own)")
    bench.add_argument(
        "--methods",
        nargs="+",
        metavar="NAME",
        help="these of its methods, or 'all' (default: the benchmark's own choice)",
    )
    bench.add_argument(
        "--teacher", metavar="FILE", help="the weights of a teacher that is trained already (a folder in Hugging Face)"
    )
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

    _add_report(commands)


def _add_experiments(commands: Any) -> None:
    parser = commands.add_parser(
        "experiments", help="repeat experiments of the literature with small nets, beside the published figures"
    )
    parser.add_argument(
        "names",
        nargs="*",
        metavar="NAME",
        help="the experiments, or 'all' (default: all but the comparisons of every method and of weights)",
    )
    parser.add_argument("--seeds", type=int, default=1, help="number of seeds to train and average over (default: 1)")
    parser.add_argument("--first-seed", type=int, default=0, help="the first of the seeds (default: 0)")
    parser.add_argument("--steps", type=int, help="the steps of a training of length 1 (default: 500)")
    parser.add_argument("--split", default="test", choices=["val", "test"], help="'val' to tune, with other seeds")
    parser.add_argument(
        "--data", help="the folder of a real set in place of the digits: train/CLASS/*.jpg, val/CLASS/*.jpg"
    )
    parser.add_argument("--out", default="runs/experiments", help="where results go (default: runs/experiments)")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.set_defaults(run=_experiments)


def _add_report(commands: Any) -> None:
    report = commands.add_parser("report", help="write a page that shows whether distilling paid, from finished runs")
    folders = "the work directory of a run; plain=FOLDER and teacher=FOLDER name those two, and a label that comes again another seed"
    report.add_argument("runs", nargs="+", metavar="[LABEL=]FOLDER", help=f"{folders}; or the folder of kdgraft bench")
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
    names = (
        "data",
        "seeds",
        "methods",
        "iterations",
        "tune",
        "processes",
        "split",
        "device",
        "out",
        "fraction",
        "teacher",
    )
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
    module = import_module("kdgraft_bench.demo")  # says what to install where its libraries are missing
    told = {name: getattr(arguments, name) for name in ("seeds", "full", "device", "out")}
    module.demo(arguments.names, **told, command=["kdgraft", *sys.argv[1:]])


def _experiments(arguments: argparse.Namespace) -> None:
    for name, least in (("seeds", 1), ("first_seed", 0), ("steps", 2)):
        if getattr(arguments, name) is not None:
            check_number("experiments", f"--{name.replace('_', '-')}", getattr(arguments, name), least, whole=True)
    told = ("seeds", "first_seed", "steps", "split", "data", "out", "device")
    import_module("kdgraft_bench.core.literature").main(
        arguments.names, **{name: getattr(arguments, name) for name in told}
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
