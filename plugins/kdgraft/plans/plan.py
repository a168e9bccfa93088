"""Plans, which are read from TOML and checked as a whole before anything runs."""

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
        name: its name in the plan.
        config: the config to train: a file, or ``file.py:function`` for plain PyTorch.
        host: the host's name; ``None`` for the host that reads such a config.
        options: overrides of the config's entries by dotted key.
        teachers: the teachers by source name: the name of another run, or a table of files in the host's own format.
        terms: distillation terms.
        recipe: a recipe's name or table; its terms come before ``terms``.
        start: the run whose weights initialise the model.
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
        """The runs that must be finished before this one."""
        found = [teacher for teacher in self.teachers.values() if isinstance(teacher, str)]
        return list(dict.fromkeys([*found, *([self.start] if self.start else [])]))


@dataclass(frozen=True)
class Plan:
    """A graph of runs.

    Attributes:
        runs: the runs in an order in which each follows those that it needs.
        out: the parent of the runs' folders, ``out/<run>/seed<k>``.
        seeds: the seeds; each run is carried out once per seed.
    """

    runs: tuple[PlannedRun, ...]
    out: Path
    seeds: tuple[int, ...] = (0,)

    def __iter__(self) -> Iterator[tuple[PlannedRun, int]]:
        """Iterate over every run with every seed: all runs of one seed, then those of the next."""
        return ((run, seed) for seed in self.seeds for run in self.runs)

    def folder(self, run: str, seed: int) -> Path:
        """Return the folder of a run's files."""
        return self.out / run / f"seed{seed}"


def read_plan(path: str | Path) -> Plan:
    """Read a plan; paths of configs in it are relative to its own folder.

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
        DistillError: the file is missing or is not TOML, an entry or a run is unknown, or the runs form a cycle.
    """
    file, where = Path(path), f"plan {path}"
    told = _parsed(file, where)
    _known(where, told, PLAN_KEYS)
    entries, out = told.get("runs"), told.get("out", f"runs/{file.stem}")
    if not isinstance(entries, dict) or not entries:
        raise DistillError(f"{where} has no runs; write [runs.teacher] with config = '…'")
    if not isinstance(out, str) or not out:
        raise DistillError(f"{where}: out must be a folder, got {out!r}")
    seeds = _seeds(where, told.get("seeds", [0]))
    runs = {name: _run(name, entry, told.get("host"), file.parent) for name, entry in entries.items()}
    return Plan(_in_order(where, runs), Path(out), seeds)


def _parsed(file: Path, where: str) -> dict[str, Any]:
    if not file.is_file():
        raise DistillError(f"plan not found: {file}")
    try:
        import tomllib
    except ImportError:
        raise DistillError("reading a plan needs Python 3.11") from None
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise DistillError(f"cannot read {where}: {error}") from None


def _seeds(where: str, seeds: Any) -> tuple[int, ...]:
    if not isinstance(seeds, list) or not seeds or len({*map(str, seeds)}) < len(seeds):
        raise DistillError(f"{where}: seeds must be a list of different whole numbers, got {seeds!r}")
    for seed in seeds:
        check_number(where, "a seed", seed, whole=True)
    return tuple(seeds)


def _in_order(where: str, runs: Mapping[str, PlannedRun]) -> tuple[PlannedRun, ...]:
    for run in runs.values():
        for need in run.needs:
            if need not in runs:
                raise DistillError(f"{where}: {run.name} needs {need!r}, which is not a run{nearest(need, runs)}")
    try:
        order = TopologicalSorter({name: run.needs for name, run in runs.items()}).static_order()
        return tuple(runs[name] for name in order)
    except CycleError as error:
        raise DistillError(f"{where}: these runs wait for each other: {' → '.join(error.args[1])}") from None


def _run(name: str, entry: Any, host: Any, folder: Path) -> PlannedRun:
    where = f"run {name!r}"
    if not isinstance(entry, dict):
        raise DistillError(f"{where} must be a table with config = '…', got {entry!r}")
    if not name.replace("-", "_").isidentifier():
        raise DistillError(f"{where}: a run's name must be letters, digits, '-' and '_'")
    _known(where, entry, RUN_KEYS)
    for key, kind in _KINDS.items():
        if key in entry and not isinstance(entry[key], kind):
            raise DistillError(f"{where}: {key} must be a {_CALLED[kind]}, got {entry[key]!r}")
    if not entry.get("config"):
        raise DistillError(f"{where} needs config = '…', the config to train")
    teachers = _teachers(where, entry)
    distils = bool(entry.get("terms") or entry.get("recipe"))
    if distils != bool(teachers):
        raise DistillError(f"{where}: " + ("terms need a teacher" if distils else "a teacher needs terms or a recipe"))
    config = entry["config"]
    if "::" not in config and (folder / config.split(":")[0]).exists():
        config = str(folder / config)
    terms, recipe, start = tuple(entry.get("terms", ())), entry.get("recipe"), entry.get("start")
    return PlannedRun(name, config, entry.get("host", host), entry.get("options", {}), teachers, terms, recipe, start)


_KINDS = {"config": str, "host": str, "options": dict, "teachers": dict, "terms": list, "start": str}
_CALLED = {str: "text", dict: "table", list: "list"}


def _teachers(where: str, entry: Mapping[str, Any]) -> dict[str, Any]:
    if "teacher" in entry and "teachers" in entry:
        raise DistillError(f"{where}: give teacher, or several as teachers, but not both")
    teachers = {"teacher": entry["teacher"]} if "teacher" in entry else dict(entry.get("teachers", {}))
    for source, teacher in teachers.items():
        if not isinstance(teacher, (str, dict)):
            raise DistillError(f"{where}: {source} must be a run's name or a table of files, got {teacher!r}")
    return teachers


def _known(where: str, entry: Mapping[str, Any], keys: tuple[str, ...]) -> None:
    for key in entry:
        if key not in keys:
            raise DistillError(f"{where} has no entry {key!r}{nearest(key, keys)}")
