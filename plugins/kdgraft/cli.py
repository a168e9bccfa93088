"""The command line: ``kdgraft train | check | cache | test | export | list | plan | report | demo | bench``.

A mistake of the user's ends the command with one line on stderr and exit code 2.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable, Sequence
from pprint import pformat
from typing import Any

from . import __version__
from .errors import DistillError, check_number, nearest
from .hosts import MissingHost, host_of, host_of_checkpoint, hosts
from .launching import TIMEOUT, check_launch
from .listing import NEEDS, explained
from .measuring import add_measurements
from .plans import carry_out, read_plan
from .registry import LOSSES, REGIONS, SCHEDULES, SOURCES, Registry, expand_recipe


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code."""
    arguments = _parser().parse_args(argv)
    try:
        arguments.run(arguments)
    except DistillError as error:
        message = str(error)
    except BrokenPipeError:  # of `kdgraft list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        message = f"{error.strerror}: {error.filename}" if error.strerror and error.filename else str(error)
    else:
        return 0
    print("kdgraft: error: " + " ".join(message.split()), file=sys.stderr)
    return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="kdgraft", description="Task-specific knowledge distillation.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_runs(commands)
    _add_tools(commands)
    add_measurements(commands)
    return parser


def _add_runs(commands: Any) -> None:
    """Add the commands that build and run a config or a recipe file."""
    train = commands.add_parser("train", help="train a distilled student from a config or a recipe file")
    train.add_argument("config")
    train.add_argument("--work-dir", help="where checkpoints and logs go (default: work_dirs/CONFIG'S NAME)")
    train.add_argument(
        "--resume", nargs="?", const="auto", help="resume from this checkpoint, or from the newest complete one"
    )
    train.add_argument("--amp", action="store_true", help="train in mixed precision")
    train.add_argument("--seed", type=int, help="random seed")
    wait = f"seconds that a process waits for the others before all stop (default: the config's, or {TIMEOUT})"
    train.add_argument("--timeout", type=float, metavar="SECONDS", help=wait)
    _add_options(train)
    _add_trusted(train)
    lost = "with --resume: reset the parts that the checkpoint lacks or that are damaged (optimizer, schedulers, terms)"
    train.add_argument("--partial", action="store_true", help=lost)
    train.set_defaults(run=_train)

    check = commands.add_parser("check", help="build everything, run one step, print the wiring")
    check.add_argument("config")
    _add_options(check)
    _add_trusted(check)
    check.set_defaults(run=_check)

    cache = commands.add_parser("cache", help="run the teacher once, and store what the terms read of it")
    cache.add_argument("config", help="a recipe file, or a config of a training")
    where = "the folder of the store (default: the teacher's store in the config); an interrupted one is completed"
    cache.add_argument("--out", metavar="FOLDER", help=where)
    views = "of images, the number of views of each (default: the passes of the training over its data)"
    cache.add_argument("--epochs", type=int, metavar="N", help=views)
    kept = "of language models, the largest probabilities of each token to keep, or 'all' logits (default: 50)"
    cache.add_argument("--top-k", metavar="K", help=kept)
    numbers = "the type of the stored numbers (default: float16); int8 is for images"
    cache.add_argument("--values", choices=("float32", "float16", "int8"), help=numbers)
    _add_options(cache)
    cache.set_defaults(run=_cache)

    test = commands.add_parser("test", help="evaluate a checkpoint of a plain or distilled student")
    test.add_argument("config")
    test.add_argument("checkpoint", help="a checkpoint's file, or the folder that a recipe's training saved")
    _add_options(test)
    _add_trusted(test)
    test.set_defaults(run=_test)


def _add_tools(commands: Any) -> None:
    """Add the commands on checkpoints, names and plans."""
    export = commands.add_parser("export", help="write the weights and the config of the plain student")
    export.add_argument("checkpoint")
    export.add_argument(
        "out",
        help="file for the weights, such as student.pth; the config goes beside it, as student.py; with --onnx student.onnx",
    )
    export.add_argument("--peer", metavar="NAME", help="write this peer of the student instead of the student")
    export.add_argument("--force", action="store_true", help="overwrite the files if they exist")
    export.add_argument(
        "--onnx", action="store_true", help="write the model's tensor part as ONNX to OUT, checked against PyTorch"
    )
    export.add_argument(
        "--size", nargs=2, type=int, metavar=("HEIGHT", "WIDTH"), help="with --onnx: the size of images after padding"
    )
    _add_trusted(export)
    export.set_defaults(run=_export)

    listing = commands.add_parser("list", help="list terms, losses, regions, recipes …, or document one of them")
    listing.add_argument("name", nargs="?", help="a term, a recipe …, whose arguments, defaults and paper are shown")
    listing.set_defaults(run=lambda a: _show(a.name) if a.name else _list())

    plan = commands.add_parser(
        "plan", help="carry out the runs of a plan, such as teacher, assistant, student; finished runs are kept"
    )
    plan.add_argument("plan", metavar="PLAN.toml")
    plan.add_argument("--dry-run", action="store_true", help="print what would be done, and do nothing")
    plan.set_defaults(run=_plan)


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cfg-options", nargs="+", default=[], metavar="KEY=VALUE", help="override config entries")


def _add_trusted(parser: argparse.ArgumentParser) -> None:
    told = "load checkpoints that hold more than tensors and literals, which may run code; only for files that you made"
    parser.add_argument("--trusted", action="store_true", help=told)


def _train(arguments: argparse.Namespace) -> None:
    seed = arguments.seed
    if seed is not None and not 0 <= seed < 2**32:
        raise DistillError(f"--seed must be a whole number from 0 to {2**32 - 1}, got {seed}")
    check_launch()
    if arguments.partial and not arguments.resume:
        raise DistillError("--partial belongs to --resume: it accepts a checkpoint that is not complete")
    if arguments.timeout is not None:
        check_number("train", "--timeout", arguments.timeout, 1)
    host_of(arguments.config).make_trainer().train(
        arguments.config,
        arguments.cfg_options,
        arguments.work_dir,
        arguments.resume,
        arguments.amp,
        seed,
        timeout=arguments.timeout,
        trusted=arguments.trusted,
        partial=arguments.partial,
    )


def _check(arguments: argparse.Namespace) -> None:
    host_of(arguments.config).make_trainer().check(arguments.config, arguments.cfg_options, trusted=arguments.trusted)


def _cache(arguments: argparse.Namespace) -> None:
    check_launch()
    host = host_of(arguments.config)
    fill = getattr(host.make_trainer(), "cache", None)
    if fill is None:
        raise DistillError(f"{arguments.config} is a config of {host.name}, whose teachers cannot be stored")
    told = {name: getattr(arguments, name) for name in ("epochs", "top_k", "values")}
    given = {name: value for name, value in told.items() if value is not None}
    fill(arguments.config, arguments.out, arguments.cfg_options, **given)


def _test(arguments: argparse.Namespace) -> None:
    check_launch()
    trainer = host_of(arguments.config).make_trainer()
    found = trainer.test(arguments.config, arguments.checkpoint, arguments.cfg_options, trusted=arguments.trusted)
    from .distributed import rank  # imported here, so that the command line starts without torch

    if rank() == 0:
        for name, value in found.items():
            print(f"{name:<{max(map(len, found))}}  {value:.4f}")


def _plan(arguments: argparse.Namespace) -> None:
    carry_out(read_plan(arguments.plan), dry_run=arguments.dry_run)


def _export(arguments: argparse.Namespace) -> None:
    trainer = host_of_checkpoint(arguments.checkpoint).make_trainer()
    told = dict(peer=arguments.peer, trusted=arguments.trusted, force=arguments.force)
    if not arguments.onnx:
        if arguments.size is not None:
            raise DistillError("--size belongs to --onnx: it is the size of the images that the file is for")
        if arguments.out.endswith(".onnx"):
            raise DistillError(
                f"{arguments.out} would hold weights for PyTorch; say --onnx, or name a file such as student.pth"
            )
        written = trainer.export(arguments.checkpoint, arguments.out, **told)
        print(f"wrote {written[0]} and {written[1]}")
        return
    for side in arguments.size or ():
        check_number("export", "--size", side, 1, whole=True)
    export = getattr(trainer, "export_onnx", None)
    if export is None:
        raise DistillError(f"{arguments.checkpoint}: this host exports no ONNX; call kdgraft.onnx.export_onnx")
    print(export(arguments.checkpoint, arguments.out, size=arguments.size, **told))


def _groups() -> tuple[list[tuple[str, Registry]], list[tuple[str, MissingHost]]]:
    """Return all registries by title, and the errors of the hosts that are not installed."""
    own = ("losses", LOSSES), ("regions", REGIONS), ("schedules", SCHEDULES), ("sources", SOURCES)
    groups: list[tuple[str, Registry]] = list(own)
    missing: list[tuple[str, MissingHost]] = []
    for name, host in hosts().items():
        try:
            terms, recipes = host.registries()
        except MissingHost as error:
            missing.append((name, error))
            continue
        groups += [(f"{name} terms", terms), (f"{name} recipes", recipes)]
        groups += [] if host.sources is None else [(f"{name} sources", host.sources)]
    return groups, missing


def _list() -> None:
    """Print all names: terms and recipes with the hosts in which they are usable, then the rest."""
    groups, missing = _groups()
    for name, error in missing:
        print(f"{name}: {error}\n")
    width = max(len(name) for _, registry in groups for name in registry.describe())
    for kind in ("terms", "recipes"):
        columns = [host for host in hosts() if host not in dict(missing)]
        title = f"{kind}, and the hosts in which they are usable: {' '.join(columns)}"
        _print_group(title, ((f"{name:<{width}}  {where}", line) for name, where, line in _across_hosts(groups, kind)))
    for title, registry in groups:
        if " " not in title or title.endswith(" sources"):  # of a host, those beside the core's
            own = ((name, line) for name, line in registry.describe().items() if registry.holder(name) is registry)
            _print_group(title, ((f"{name:<{width}}", line) for name, line in own))


def _print_group(title: str, lines: Iterable[tuple[str, str]]) -> None:
    print("\n  ".join([title, *(f"{name}  {line}" for name, line in lines)]) + "\n")


def _across_hosts(groups: Sequence[tuple[str, Registry]], kind: str) -> list[tuple[str, str, str]]:
    """Return each term, or recipe, once: its name, the hosts in which it is usable, and its first line."""
    registries = {title.partition(" ")[0]: registry for title, registry in groups if title.endswith(f" {kind}")}
    lines: dict[tuple[str, int], str] = {}
    usable: dict[tuple[str, int], set[str]] = {}
    for host, registry in registries.items():
        held = registry.held()
        for name, line in registry.describe().items():
            key = name, id(held[name])
            lines[key] = line
            if not set(registry.needs(name)) & set(hosts()[host].lacks):
                usable.setdefault(key, set()).add(host)
    found = []
    for key in sorted(lines):
        marks = (host if host in usable.get(key, ()) else "–".ljust(len(host)) for host in registries)
        found.append((key[0], " ".join(marks), lines[key]))
    return found


def _show(name: str) -> None:
    """Print the terms of a recipe, ready to be pasted into a config, or the documentation of another part of this name."""
    groups, missing = _groups()
    titles: dict[int, list[str]] = {}
    holders = {title: holder for title, registry in groups if (holder := registry.holder(name)) is not None}
    for title, holder in holders.items():
        titles.setdefault(id(holder), []).append(title)
    if not holders:
        known = dict.fromkeys(known for _, registry in groups for known in registry.describe())
        hint = nearest(name, known)
        if missing and "did you mean" not in hint:  # it may be a name of a plugin whose host is not installed
            raise missing[0][1]
        raise DistillError(f"no term, recipe or other part is called {name!r}{hint}")
    for holder in {id(holder): holder for holder in holders.values()}.values():
        target, where = holder.get(name), ", ".join(titles[id(holder)])
        if holder.kind == "recipe":
            print(
                "".join(f"# {line}".rstrip() + "\n" for line in [f"{name} ({where})", *explained(target).splitlines()])
            )
            print(f"terms = {pformat(expand_recipe(name, holder), sort_dicts=False, width=100)}")
        else:
            print(f"{name} ({where})\n\n{explained(target)}\n{_usable(holder, name)}")


def _usable(holder: Registry, name: str) -> str:
    """Say what a term needs, and which hosts lack it for what reason."""
    needs = holder.needs(name) if holder.kind == "term" else ()
    refused = [(host, lacks.lacks[need]) for host, lacks in hosts().items() for need in needs if need in lacks.lacks]
    return "".join(
        [f"Needs {NEEDS.get(need, need)}.\n" for need in needs]
        + [f"Not in {host}: {reason}.\n" for host, reason in refused]
    )
