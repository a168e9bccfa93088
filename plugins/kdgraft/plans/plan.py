"""What a plan says: read from TOML, checked as a whole before anything runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

from ..errors import DistillError, check_number, nearest

PLAN_KEYS = ("out", "seeds", "host", "runs")
RUN_KEYS = ("config", "host", "options", "teacher", "teachers", "terms", "recipe", "start")


@dataclass(frozen=True)
class PlannedRun:
    """One run of a plan.

    Attributes:
        name: as the plan calls it.
        config: what its host trains; a file, or for plain PyTorch ``file.py:function``.
        host: the host's name; ``None``: the one that reads such a config.
        options: overrides of the config's entries, by dotted key.
        teachers: who teaches, by source name: the name of another run, or a table of files as the host takes it.
        terms: distillation terms.
        recipe: a recipe's name or table; its terms come before ``terms``.
        start: the run whose weights this one starts from.
    """

    name: str
    config: str
    host: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    teachers: Mapping[str, Any] = field(default_factory=dict)
    terms: tuple[Any, ...] = ()
    recipe: Any = None
    start: str | None = None

    @property
    def needs(self) -> list[str]:
        """The runs that have to be finished before this one."""
        found = [teacher for teacher in self.teachers.values() if isinstance(teacher, str)]
        return list(dict.fromkeys([*found, *([self.start] if self.start else [])]))


@dataclass(frozen=True)
class Plan:
    """A graph of runs.

    Attributes:
        runs: in an order in which each comes after those that it needs.
        out: where the runs' folders are: ``out/<run>/seed<k>``.
        seeds: each run is made once for each.
    """

    runs: tuple[PlannedRun, ...]
    out: Path
    seeds: tuple[int, ...] = (0,)

    def __iter__(self) -> Iterator[tuple[PlannedRun, int]]:
        """Every run with every seed: all of one seed's chain, then the next seed's."""
        return ((run, seed) for seed in self.seeds for run in self.runs)

    def folder(self, run: str, seed: int) -> Path:
        """Where a run's files are."""
        return self.out / run / f"seed{seed}"


def read_plan(path: str | Path) -> Plan:
    """Reads a plan; paths of configs in it are relative to its own folder.

    .. code-block:: toml

        [runs.teacher]
        config = "large.py"

        [runs.assistant]
        config = "middle.py"
        teacher = "teacher"
        recipe = "ld"

        [runs.student]
        config = "small.py"
        teacher = "assistant"
        recipe = "ld"

    Raises:
        DistillError: no such file, no TOML, an unknown entry, a run that is not there, or a circle.
    """
    file = Path(path)
    if not file.is_file():
        raise DistillError(f"plan not found: {path}")
    try:
        import tomllib
    except ImportError:
        raise DistillError("reading a plan needs Python 3.11") from None
    try:
        told = tomllib.loads(file.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise DistillError(f"cannot read plan {path}: {error}") from None
    _known(f"plan {path}", told, PLAN_KEYS)
    entries = told.get("runs")
    if not isinstance(entries, dict) or not entries:
        raise DistillError(f"plan {path} has no runs; write [runs.teacher] with config = '…'")
    seeds = told.get("seeds", [0])
    if not isinstance(seeds, list) or not seeds or len({*map(str, seeds)}) < len(seeds):
        raise DistillError(f"plan {path}: seeds must be a list of different whole numbers, got {seeds!r}")
    for seed in seeds:
        check_number(f"plan {path}", "a seed", seed, whole=True)
    runs = {name: _run(name, entry, told.get("host"), file.parent) for name, entry in entries.items()}
    for run in runs.values():
        for need in run.needs:
            if need not in runs:
                raise DistillError(f"plan {path}: {run.name} needs {need!r}, which is no run{nearest(need, runs)}")
    try:
        order = list(TopologicalSorter({name: run.needs for name, run in runs.items()}).static_order())
    except CycleError as error:
        raise DistillError(f"plan {path}: these runs wait for each other: {' → '.join(error.args[1])}") from None
    out = told.get("out", f"runs/{file.stem}")
    if not isinstance(out, str) or not out:
        raise DistillError(f"plan {path}: out must be a folder, got {out!r}")
    return Plan(tuple(runs[name] for name in order), Path(out), tuple(seeds))


def _run(name: str, entry: Any, host: Any, folder: Path) -> PlannedRun:
    where = f"run {name!r}"
    if not isinstance(entry, dict):
        raise DistillError(f"{where} must be a table with config = '…', got {entry!r}")
    if not name.replace("-", "_").isidentifier():
        raise DistillError(f"{where}: a run's name is letters, digits, '-' and '_'")
    _known(where, entry, RUN_KEYS)
    for key, kind in (
        ("config", str),
        ("host", str),
        ("options", dict),
        ("teachers", dict),
        ("terms", list),
        ("start", str),
    ):
        if key in entry and not isinstance(entry[key], kind):
            raise DistillError(f"{where}: {key} must be a {_KINDS[kind]}, got {entry[key]!r}")
    if not entry.get("config"):
        raise DistillError(f"{where} needs config = '…', what its host trains")
    if "teacher" in entry and "teachers" in entry:
        raise DistillError(f"{where}: give teacher, or several as teachers, not both")
    teachers = {"teacher": entry["teacher"]} if "teacher" in entry else dict(entry.get("teachers", {}))
    for source, teacher in teachers.items():
        if not isinstance(teacher, (str, dict)):
            raise DistillError(f"{where}: {source} must be a run's name or a table of files, got {teacher!r}")
    distils = bool(entry.get("terms") or entry.get("recipe"))
    if distils != bool(teachers):
        raise DistillError(f"{where}: " + ("terms need a teacher" if distils else "a teacher needs terms or a recipe"))
    config = entry["config"]
    if "::" not in config and (folder / config.split(":")[0]).exists():
        config = str(folder / config)
    return PlannedRun(
        name,
        config,
        entry.get("host", host),
        entry.get("options", {}),
        teachers,
        tuple(entry.get("terms", ())),
        entry.get("recipe"),
        entry.get("start"),
    )


_KINDS = {str: "text", dict: "table", list: "list"}


def _known(where: str, entry: Mapping[str, Any], keys: tuple[str, ...]) -> None:
    for key in entry:
        if key not in keys:
            raise DistillError(f"{where} has no entry {key!r}{nearest(key, keys)}")
