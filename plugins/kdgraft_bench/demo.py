"""``kdgraft demo``: a part of each benchmark that ships, in minutes, or the whole of it."""

from __future__ import annotations

from collections.abc import Sequence

from kdgraft.errors import DistillError, check_number, nearest
from kdgraft.hosts import host_named, installed

from .benchmark import benchmark, read_benchmark
from .results import Result
from .spec import shipped_demos

ORDER = ("core", "nlp", "seg", "det")
"""The order of demos: first those that need no compiled ops."""


def demo(
    names: Sequence[str] = (),
    *,
    seeds: int = 1,
    full: bool = False,
    device: str = "cpu",
    out: str = "runs/demo",
    command: Sequence[str] = (),
) -> list[Result]:
    """Carry out benchmarks that ship: train what is missing, print a short table, and write the report.

    Args:
        names: their names; by default all that have a demo and whose host is installed.
        seeds: the number of seeds, from the first one of the benchmark.
        full: the whole benchmark with all its usual methods, instead of the part that takes minutes.
        device: ``"cpu"`` or ``"cuda"``.
        out: the folder of the results, in which each benchmark has one of its own.
        command: the command that was given, for the report.

    Returns:
        The figures of all runs.

    Raises:
        DistillError: there is no such demo, or a run failed.
    """
    known = sorted(shipped_demos(), key=lambda name: ORDER.index(name) if name in ORDER else len(ORDER))
    for name in names:
        if name not in known:
            raise DistillError(f"there is no demo {name!r}{nearest(name, known)}; there are {', '.join(known)}")
    check_number("demo", "--seeds", seeds, 1, whole=True)
    results: list[Result] = []
    for name in names or known:
        folder = f"{out}/{name}" + ("-full" if full else "")
        first = read_benchmark(name, demo=not full).seeds[0]
        chosen = tuple(range(first, first + seeds))
        told = read_benchmark(name, demo=not full, seeds=chosen, device=device, out=folder)
        framework = host_named(told.host).framework
        if not names and not installed(framework):
            print(f"{name} is left out, as {framework} is not installed")
            continue
        results += benchmark(told, command=command, short=not full)
    return results
