"""Reading plans from TOML, which are checked as a whole before anything runs."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast, get_args

from ..errors import DistillError, check_flag, check_number, nearest
from ..hosts import Kind, TransferSet
from ..toml import TOMLDecodeError, loads
from .expand import Changes, Entry, expand
from .plan import Choice, Plan, PlannedRun

PLAN_KEYS = ("out", "seeds", "host", "runs")
SERIES_KEYS = ("each", "chain", "generations", "stages", "choose")
RUN_KEYS = (
    *("config", "host", "options", "teacher", "teachers", "terms", "recipe", "start", "stop", "data", "ensemble"),
    "checkpoint",
    *SERIES_KEYS,
)
STAGE_KEYS = ("config", "options", "teacher", "teachers", "terms", "recipe", "stop", "data")


def read_plan(path: str | Path) -> Plan:
    """Read a plan; paths of configs and of data in it are relative to its own folder.

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
    return plan_of(read_toml(file, where), where, file.parent, f"runs/{file.stem}")


def plan_of(told: Mapping[str, Any], where: str, folder: Path, out: str) -> Plan:
    """Make the plan that the content of a file describes; see :func:`read_plan`.

    Args:
        told: the content.
        where: the name of the plan in messages.
        folder: the folder to which paths of configs and of data are relative.
        out: the folder of the results, if the content names none.
    """
    _known(where, told, PLAN_KEYS)
    entries, out = told.get("runs"), told.get("out", out)
    if not isinstance(entries, dict) or not entries:
        raise DistillError(f"{where} has no runs; write [runs.teacher] with config = '…'")
    if not isinstance(out, str) or not out:
        raise DistillError(f"{where}: out must be a folder, got {out!r}")
    seeds = _seeds(where, told.get("seeds", [0]))
    found = {name: _entry(name, entry, told.get("host"), folder) for name, entry in entries.items()}
    try:
        return Plan(expand(found), Path(out), seeds)
    except DistillError as error:
        raise DistillError(f"{where}: {error}") from None


def read_toml(file: Path, where: str) -> dict[str, Any]:
    """Return the content of a plan's file; a :class:`DistillError` says why it cannot be read."""
    if not file.is_file():
        raise DistillError(f"plan not found: {file}")
    try:
        return loads(file.read_text(encoding="utf-8"))
    except (TOMLDecodeError, UnicodeDecodeError) as error:
        raise DistillError(f"cannot read {where}: {error}") from None


def _seeds(where: str, seeds: Any) -> tuple[int, ...]:
    if not isinstance(seeds, list) or not seeds or len({*map(str, seeds)}) < len(seeds):
        raise DistillError(f"{where}: seeds must be a list of different whole numbers, got {seeds!r}")
    for seed in seeds:
        check_number(where, "a seed", seed, whole=True)
        if seed >= 2**32:
            raise DistillError(f"{where}: a seed must be below 2**32, got {seed}")
    return tuple(seeds)


def _entry(name: str, entry: Any, host: Any, folder: Path) -> Entry:
    """Read one table ``[runs.NAME]``."""
    where = f"run {name!r}"
    if not isinstance(entry, dict):
        raise DistillError(f"{where} must be a table with config = '…', got {entry!r}")
    if not name.replace("-", "_").isidentifier():
        raise DistillError(f"{where}: a run's name must be letters, digits, '-' and '_'")
    _known(where, entry, RUN_KEYS)
    _check_kinds(where, entry)
    if "ensemble" in entry:
        _check_ensemble(where, entry)
    if "checkpoint" in entry:
        _check_checkpoint(where, entry, folder)
    _check_series(where, entry)
    single = {"host": host, **{key: value for key, value in entry.items() if key not in SERIES_KEYS}}
    stages = tuple(_stage(name, single, stage, folder) for stage in entry.get("stages", ()))
    _check_overlap(where, entry)
    alone = "chain" in entry or "generations" in entry
    return Entry(
        stages[0] if stages else _run(name, single, folder, alone=alone),
        each=_changes(where, "each", entry.get("each", {}), folder),
        chain=_chain(where, entry, folder),
        stages=stages,
        choose=_choice(name, entry["choose"]) if "choose" in entry else None,
    )


def _run(name: str, entry: Mapping[str, Any], folder: Path, *, alone: bool = False) -> PlannedRun:
    """Read the entries of a single run; ``alone``: it may have terms without a teacher, as the first of a chain has none."""
    where = f"run {name!r}"
    if not entry.get("config"):
        raise DistillError(f"{where} needs config = '…', the config to train")
    teachers = _teachers(where, entry)
    distils = bool(entry.get("terms") or entry.get("recipe"))
    if "ensemble" not in entry and distils != bool(teachers) and not (alone and distils):
        raise DistillError(f"{where}: " + ("terms need a teacher" if distils else "a teacher needs terms or a recipe"))
    if "stop" in entry:
        check_number(where, "stop", entry["stop"], 1, whole=True)
    data = _data(where, entry["data"], bool(teachers), folder) if "data" in entry else None
    terms = list(entry.get("terms", ()))
    if data is not None and not data.labels and not any(_type(term) == "TaskShare" for term in terms):
        terms.append("TaskShare")  # the host's own loss is left out
    return PlannedRun(
        name,
        located(entry["config"], folder),
        entry.get("host"),
        entry.get("options", {}),
        teachers,
        tuple(terms),
        entry.get("recipe"),
        entry.get("start"),
        entry.get("stop"),
        data,
        _kind(where, entry["ensemble"]) if "ensemble" in entry else None,
        located(entry.get("checkpoint"), folder),
    )


_KINDS = {
    **{"config": str, "host": str, "options": dict, "teachers": dict, "terms": list, "start": str, "data": dict},
    "checkpoint": str,
    **{"each": dict, "chain": dict, "stages": list},
}
_CALLED = {str: "text", dict: "table", list: "list"}


def _check_kinds(where: str, entry: Mapping[str, Any]) -> None:
    for key, kind in _KINDS.items():
        if key in entry and not isinstance(entry[key], kind):
            raise DistillError(f"{where}: {key} must be a {_CALLED[kind]}, got {entry[key]!r}")


def _known(where: str, entry: Mapping[str, Any], keys: tuple[str, ...]) -> None:
    for key in entry:
        if key not in keys:
            raise DistillError(f"{where} has no entry {key!r}{nearest(key, keys)}")


def located(config: Any, folder: Path) -> Any:
    """Return a config's path from the folder of the file that names it, where it is a file there."""
    if isinstance(config, str) and "::" not in config and (folder / config.split(":")[0]).exists():
        return str(folder / config)
    return config


# --- teachers and data


def _teachers(where: str, entry: Mapping[str, Any]) -> dict[str, Any]:
    """Return the teachers by source name; a list of runs is their ensemble."""
    given = [key for key in ("teacher", "teachers", "ensemble") if key in entry]
    if len(given) > 1:
        raise DistillError(f"{where}: give one of {' and '.join(given)}, but not both")
    if not given:
        return {}
    found = entry["teachers"] if given == ["teachers"] else {"teacher": entry[given[0]]}
    if given == ["ensemble"] and isinstance(entry["ensemble"], dict):
        settings = {key: value for key, value in entry["ensemble"].items() if key != "kind"}
        found = {"teacher": {"type": "Ensemble", **settings}}
    return {source: _teacher(where, source, teacher) for source, teacher in found.items()}


def _teacher(where: str, source: str, teacher: Any) -> Any:
    if isinstance(teacher, list):
        teacher = {"type": "Ensemble", "members": teacher}
    if not isinstance(teacher, (str, dict)):
        raise DistillError(
            f"{where}: {source} must be a run's name or a table of files, or a list of runs, got {teacher!r}"
        )
    members = teacher.get("members", []) if isinstance(teacher, dict) else []
    if not isinstance(members, list) or not all(isinstance(member, str) for member in members):
        raise DistillError(f"{where}: the members of {source} must be a list of names, got {members!r}")
    return teacher


def _check_ensemble(where: str, entry: Mapping[str, Any]) -> None:
    given = entry["ensemble"]
    if not (given if isinstance(given, list) else isinstance(given, dict) and given.get("members")):
        raise DistillError(
            f"{where}: ensemble must be a list of runs, or {{ members = [run, …], mean = '…' }}, got {given!r}"
        )
    trained = [key for key in ("terms", "recipe", "start", "stop", "data", *SERIES_KEYS) if key in entry]
    if trained:
        raise DistillError(f"{where}: an ensemble is evaluated and not trained; leave out {', '.join(trained)}")


def _check_checkpoint(where: str, entry: Mapping[str, Any], folder: Path) -> None:
    trained = [key for key in RUN_KEYS if key in entry and key not in ("config", "host", "options", "checkpoint")]
    if trained:
        raise DistillError(f"{where}: a checkpoint is taken as it is and not trained; leave out {', '.join(trained)}")
    if not (folder / entry["checkpoint"]).exists():
        raise DistillError(f"{where}: there is no checkpoint {entry['checkpoint']}")


def _type(term: Any) -> Any:
    return term.get("type") if isinstance(term, dict) else term


def _kind(where: str, ensemble: Any) -> Kind:
    """Return the kind of predictions that an ensemble averages."""
    kind = ensemble.get("kind", "softmax") if isinstance(ensemble, dict) else "softmax"
    if kind not in get_args(Kind):
        raise DistillError(f"{where}: ensemble.kind must be 'softmax', 'sigmoid' or 'value', got {kind!r}")
    return cast("Kind", kind)


def _data(where: str, data: Mapping[str, Any], taught: bool, folder: Path) -> TransferSet:
    _known(f"{where}: data", data, ("set", "share", "labels"))
    if not data:
        raise DistillError(f"{where}: data needs set = '…', share = 0.03 or labels = false")
    named, share, labels = data.get("set"), data.get("share", 1.0), data.get("labels", True)
    if named is not None and not isinstance(named, str):
        raise DistillError(f"{where}: data.set must be a text, got {named!r}")
    check_number(f"{where}: data", "share", share, above=True)
    if share > 1:
        raise DistillError(f"{where}: data.share must be in (0, 1], got {share!r}")
    check_flag(f"{where}: data", "labels", labels)
    if not labels and not taught:
        raise DistillError(
            f"{where}: data without labels needs a teacher, whose predictions are all that there is to learn"
        )
    return TransferSet(located(named, folder), float(share), labels)


# --- runs of which one entry makes several


def _check_series(where: str, entry: Mapping[str, Any]) -> None:
    for key in ("each", "chain", "stages"):
        if key in entry and not entry[key]:
            raise DistillError(f"{where}: {key} is empty; leave it out")
    found = [key for key in ("chain", "generations", "stages") if key in entry]
    if len(found) > 1:
        raise DistillError(f"{where}: {' and '.join(found)} exclude each other; make a run of each")
    if not found or found == ["stages"]:
        return
    if "teachers" in entry:
        raise DistillError(f"{where}: {found[0]} needs one teacher = '…', in whose place each run teaches the next")
    if not entry.get("terms") and not entry.get("recipe"):
        raise DistillError(f"{where}: {found[0]} needs terms or a recipe, by which each run teaches the next")


def _check_overlap(where: str, entry: Mapping[str, Any]) -> None:
    """Refuse an option that both ``each`` and a chain or stages change, as one of the two would be without effect."""
    later = {"chain": [*entry.get("chain", ())], "stages": list[str]()}
    for stage in entry.get("stages", ()):
        later["stages"] += [*stage.get("options", ()), *{"config"} & set(stage)]
    for key, changed in later.items():
        both = [option for option in entry.get("each", ()) if option in changed]
        if both:
            raise DistillError(f"{where}: each and {key} both change {', '.join(both)}; change it in one of them")


def _chain(where: str, entry: Mapping[str, Any], folder: Path) -> Mapping[str, Changes]:
    if "generations" in entry:
        check_number(where, "generations", entry["generations"], 1, whole=True)
        return {str(number): {} for number in range(1, entry["generations"] + 1)}
    return _changes(where, "chain", entry.get("chain", {}), folder)


def _changes(where: str, key: str, options: Mapping[str, Any], folder: Path) -> dict[str, Changes]:
    """Turn lists of values by option into the options of each run by its label.

    The labels are the values of the first option, such as ``16``, or the names of configs without folders and suffixes; numbers
    from 1 where these would be no file names.
    """
    for option, values in options.items():
        if not isinstance(values, list) or not values:
            raise DistillError(f"{where}: {key}.{option} must be a list of values, got {values!r}")
    if len({len(values) for values in options.values()}) > 1:
        told = ", ".join(f"{len(values)} of {option}" for option, values in options.items())
        raise DistillError(f"{where}: {key} needs equally many values of each option, got {told}")
    first = next(iter(options), None)
    if first is None:
        return {}
    if not all(isinstance(config, str) for config in options.get("config", ())):
        raise DistillError(f"{where}: {key}.config must be a list of configs, got {options['config']!r}")
    rows = [dict(zip(options, row, strict=True)) for row in zip(*options.values(), strict=True)]
    if key == "each" and any(row in rows[:place] for place, row in enumerate(rows)):
        raise DistillError(f"{where}: each gives the same values twice; leave one of them out")
    for row in rows:
        if "config" in row:
            row["config"] = located(row["config"], folder)
    labels = [
        re.sub(r"^.*[/:]|\.\w+$", "", str(value)) if first == "config" else str(value) for value in options[first]
    ]
    if len({*labels}) < len(labels) or not all(re.fullmatch(r"[\w.]+", label) for label in labels):
        labels = [str(number) for number in range(1, len(rows) + 1)]
    return dict(zip(labels, rows, strict=True))


def _stage(name: str, entry: Mapping[str, Any], stage: Any, folder: Path) -> PlannedRun:
    """Read one of the stages: the run's own entries, except those that the stage gives; without terms it has no teacher."""
    where = f"run {name!r}: a stage"
    if not isinstance(stage, dict):
        raise DistillError(f"{where} must be a table such as {{ terms = […] }}, got {stage!r}")
    _known(where, stage, STAGE_KEYS)
    _check_kinds(where, stage)
    whole = {**entry, **stage, "options": {**entry.get("options", {}), **stage.get("options", {})}}
    taught = {"teacher", "teachers"} & set(stage)
    for key in ("teacher", "teachers"):
        if key not in stage and (taught or not (whole.get("terms") or whole.get("recipe"))):
            whole.pop(key, None)
    return _run(name, whole, folder)


def _choice(name: str, given: Any) -> Choice:
    where = f"run {name!r}: choose"
    given = {"by": given} if isinstance(given, str) else given
    if not isinstance(given, dict):
        raise DistillError(f"{where} must be a metric or a table such as {{ by = 'accuracy' }}, got {given!r}")
    _known(where, given, ("by", "midway"))
    by, midway = given.get("by"), given.get("midway", [])
    if not isinstance(by, str) or not by.removeprefix("-"):
        raise DistillError(f"{where} needs by = 'metric', or '-metric' for the lowest, got {by!r}")
    if midway and by.startswith("-"):
        raise DistillError(f"{where}: midway is nearest to the mean of two runs, not the lowest; write by = {by[1:]!r}")
    if "midway" in given and not (
        isinstance(midway, list) and all(isinstance(run, str) for run in midway) and len(midway) == len({*midway}) == 2
    ):
        raise DistillError(f"{where}: midway must be two different runs, such as ['teacher', 'alone'], got {midway!r}")
    return Choice(name, (), by, tuple(midway))
