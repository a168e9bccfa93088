"""Benchmarks as they are written down: teachers, students, methods, data and schedule in a short TOML file."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from kdgraft.errors import DistillError, check_number, nearest
from kdgraft.hosts import hosts
from kdgraft.plans import located, read_toml

SHIPPED = Path(__file__).with_name("benchmarks")
"""The folder of the benchmarks that ship."""
KEYS = (
    *("host", "data", "out", "seeds", "processes", "device", "iterations", "tune", "split", "batches", "metric"),
    *("batch", "fraction", "texts", "default_methods", "teacher", "students", "methods", "peers", "runs", "demo"),
)
DEMO_KEYS = ("students", "methods", "iterations", "batch", "processes", "batches")
MODEL_KEYS = ("config", "options", "published")
METHOD_KEYS = ("published", "recipe", "terms", "teacher", "teachers", "options", "start", "stop", "data")
TEACHER, PLAIN = "teacher", "plain"


@dataclass(frozen=True)
class Model:
    """A model that a benchmark trains.

    Attributes:
        config: the host's own config; ``None`` for one of the benchmark's small models.
        settings: of a small model: its name, ``model``, and its arguments.
        options: overrides of the config.
        checkpoint: its weights, for a teacher that is trained already: a file, or a folder of Hugging Face.
        published: metric -> the figure that its authors published.
    """

    config: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    checkpoint: str | None = None
    published: Mapping[str, float] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """The model in words: its config's name, or its own with its arguments."""
        if self.config is not None:
            return re.sub(r"^.*[/:]|\.\w+$", "", self.config)
        arguments = ", ".join(f"{key} {value}" for key, value in self.settings.items() if key != "model")
        return f"{self.settings['model']}, {arguments}" if arguments else str(self.settings["model"])

    def without(self, arguments: Collection[str]) -> Model:
        """Return the model without some of its arguments."""
        return replace(self, settings={key: value for key, value in self.settings.items() if key not in arguments})


@dataclass(frozen=True)
class Benchmark:
    """A comparison of methods that train students under a teacher.

    Attributes:
        name: its file's name.
        host: the host's name.
        teacher, students: what is trained; every student is also trained alone.
        methods: the entries of the distilled runs, as in a plan: ``recipe``, ``terms`` …
        peers: trainings by other packages' code, from a config or by the benchmark's own name for them, ``model``.
        runs: further runs of a plan, such as assistants, which methods may name as their teacher.
        folder: the folder of the file, to which paths of configs are relative.
        out: the folder of the results.
        data: the folder of the data set; ``None`` for the embedded one, or that of the configs.
        seeds: the seeds of all trainings.
        processes: the number of trainings side by side.
        device: ``"cpu"`` or ``"cuda"``.
        iterations: the length of every training; by default that of the small models, or the configs' own.
        batch: the samples of a training step of the small models; by default their own number.
        tune: the number of trainings that tune the weights of each method on the validation split; ``None`` for the weights as given.
        split: the split of the table, ``"test"`` or ``"val"``.
        batches: the batch sizes of which latency is measured.
        metric: the metric that decides; by default the host's first.
        fraction: the share of the training set to use, drawn with the seed; ``None`` for all of it. Of Hugging Face alone.
        texts: the number of texts that each language model writes to be measured by its teacher; ``None`` for none.
        published: method -> metric -> the figure that its authors published; of benchmarks with one student.
    """

    name: str
    host: str
    teacher: Model
    students: Mapping[str, Model]
    methods: Mapping[str, Mapping[str, Any]]
    peers: Mapping[str, Model]
    runs: Mapping[str, Any]
    folder: Path
    out: Path
    data: str | None = None
    seeds: tuple[int, ...] = (0,)
    processes: int = 1
    device: str = "cpu"
    iterations: int | None = None
    batch: int | None = None
    tune: int | None = None
    split: str = "test"
    batches: tuple[int, ...] = (1, 16)
    metric: str | None = None
    fraction: float | None = None
    texts: int | None = None
    published: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    @property
    def measured(self) -> str:
        """The split that the table is of: a real set has no third one, and is tested on that of validation."""
        return "val" if self.data is not None else self.split

    def trained(self) -> Iterator[tuple[str, str, str]]:
        """Yield the name, the student and the method of every run of the table; those of the teacher are ``"teacher"``."""
        yield TEACHER, TEACHER, TEACHER
        for student in self.students:
            for method in (PLAIN, *self.methods, *self.peers):
                yield run_name(student, method), student, method


def run_name(student: str, method: str) -> str:
    """Return the name of a run in the benchmark's plan."""
    return f"{student}-{method}"


def shipped_demos() -> list[str]:
    """Return the names of the benchmarks that ship and say how they are shown in some minutes, in the order of their names."""
    return [path.stem for path in sorted(SHIPPED.glob("*.toml")) if "demo" in read_toml(path, path.stem)]


def read_benchmark(named: str, *, demo: bool = False, **changes: Any) -> Benchmark:
    """Read a benchmark.

    Args:
        named: a file, or the name of a benchmark that ships.
        demo: take the values of its table ``[demo]`` for those of the file, the first seed alone, and no peers.
        **changes: values that replace those of the file, such as ``seeds=(0,)``, or the names of those ``methods`` that are kept,
            ``["all"]`` for all, or the weights of a trained ``teacher``; ``None`` leaves the file's own.

    Raises:
        DistillError: there is no such benchmark, or an entry is unknown or has a wrong value.
    """
    file = Path(named)
    known = sorted(path.stem for path in SHIPPED.glob("*.toml"))
    if not file.suffix:
        if named not in known:
            hint = nearest(named, known) or f"; those that ship are {', '.join(known)}"
            raise DistillError(f"no benchmark is called {named!r}{hint}; or name a file, such as mine.toml")
        file = SHIPPED / f"{named}.toml"
    where = f"benchmark {named}"
    told = read_toml(file, where)
    short = told.pop("demo", {})
    if not isinstance(short, dict):
        raise DistillError(f"{where}: demo must be a table [demo], got {short!r}")
    _known(f"{where}: demo", short, DEMO_KEYS)
    changes = {key: value for key, value in changes.items() if value is not None}
    if demo:
        changes = {"seeds": told.get("seeds", [0])[:1], **short, **changes}
        told.pop("peers", None)
    if (teacher := changes.pop("teacher", None)) is not None and isinstance(told.get("teacher"), dict):
        told["teacher"] = {**told["teacher"], "checkpoint": str(Path(teacher).resolve())}
    usual = told.pop("default_methods", None)
    for kind, names in (("methods", changes.pop("methods", usual)), ("students", changes.pop("students", None))):
        if names is not None and names != ["all"] and isinstance(told.get(kind), dict):
            told[kind] = _chosen(where, kind, told[kind], names)
    found = _read(told | changes, where, file)
    return replace(found, out=Path((told | changes).get("out") or f"runs/bench/{_place(found)}"))


def _chosen(where: str, kind: str, entries: Mapping[str, Any], names: Any) -> dict[str, Any]:
    if not isinstance(names, (list, tuple)) or not names:
        raise DistillError(f"{where}: {kind} must be a list of names, got {names!r}")
    for name in names:
        if name not in entries:
            raise DistillError(f"{where} has no {kind[:-1]} {name!r}{nearest(str(name), entries)}")
    return {name: entries[name] for name in names}


def _place(benchmark: Benchmark) -> str:
    """Return a folder for the results that is different for another data set."""
    return benchmark.name if benchmark.data is None else f"{benchmark.name}_{Path(benchmark.data).resolve().name}"


def _read(told: Mapping[str, Any], where: str, file: Path) -> Benchmark:
    _known(where, told, KEYS)
    host = told.get("host")
    if host not in hosts():
        raise DistillError(f"{where} needs host = '…', one of {', '.join(hosts())}, got {host!r}")
    for key in ("teacher", "students", "methods"):
        if not isinstance(told.get(key), dict) or not told[key]:
            example = "[teacher]" if key == "teacher" else f"[{key}.NAME]"
            raise DistillError(f"{where} needs a table {example}")
    for key in ("peers", "runs"):
        if not isinstance(told.get(key, {}), dict):
            raise DistillError(f"{where}: {key} must be tables [{key}.NAME], got {told[key]!r}")
    _check_names(where, told)
    numbers = {key: told[key] for key in ("processes", "iterations", "batch", "tune", "texts") if key in told}
    for key, value in numbers.items():
        check_number(where, key, value, 2 if key == "iterations" else 1, whole=True)  # a warm-up, and the rest
    if "texts" in told and host != "nlp":
        raise DistillError(f"{where}: texts are of language models, in Hugging Face; leave texts out")
    if "fraction" in told:
        numbers["fraction"] = _share(where, told["fraction"], str(host))
    return Benchmark(
        name=file.stem,
        host=str(host),
        teacher=_teacher(f"{where}: teacher", told["teacher"], file.parent),
        students={
            name: _model(f"{where}: student {name!r}", one, file.parent) for name, one in told["students"].items()
        },
        methods={name: _method(f"{where}: method {name!r}", one) for name, one in told["methods"].items()},
        published=_published(where, told),
        peers={
            name: _model(f"{where}: peer {name!r}", one, file.parent) for name, one in told.get("peers", {}).items()
        },
        runs=told.get("runs", {}),
        folder=file.parent,
        out=Path(),
        data=_text(where, told, "data"),
        seeds=_numbers(where, told, "seeds", (0,), least=0),
        batches=_numbers(where, told, "batches", (1, 16), least=1),
        device=_one_of(where, told, "device", ("cpu", "cuda")),
        split=_one_of(where, told, "split", ("test", "val")),
        metric=_text(where, told, "metric"),
        **numbers,
    )


def _known(where: str, entry: Mapping[str, Any], keys: tuple[str, ...]) -> None:
    for key in entry:
        if key not in keys:
            raise DistillError(f"{where} has no entry {key!r}{nearest(key, keys)}")


def _check_names(where: str, told: Mapping[str, Any]) -> None:
    """Refuse names that are no folder's, or that mean something else already."""
    reserved = {TEACHER, PLAIN}
    for kind in ("students", "methods", "peers", "runs"):
        for name in told.get(kind, {}):
            if not name.isidentifier() or name in reserved:
                taken = "; teacher and plain are taken" if name in reserved else ""
                raise DistillError(f"{where}: a name in {kind} must be letters, digits and '_', got {name!r}{taken}")
    for one, other in (("students", "runs"), ("methods", "peers")):
        for name in told.get(other, {}):
            if name in told[one]:
                raise DistillError(f"{where}: {name} is in {one} and in {other}; give one of them another name")


def _teacher(where: str, entry: Any, folder: Path) -> Model:
    """Read the teacher, which may be trained already."""
    checkpoint = entry.get("checkpoint") if isinstance(entry, dict) else None
    if checkpoint is None:
        return _model(where, entry, folder)
    if not isinstance(checkpoint, str) or not (folder / checkpoint).exists():
        raise DistillError(f"{where}: there is no checkpoint {checkpoint}")
    found = _model(where, {key: value for key, value in entry.items() if key != "checkpoint"}, folder)
    return replace(found, checkpoint=str((folder / checkpoint).resolve()))


def _model(where: str, entry: Any, folder: Path) -> Model:
    if not isinstance(entry, dict) or ("model" in entry) == ("config" in entry):
        raise DistillError(f"{where} needs either config = '…' or model = '…', one of the benchmark's small models")
    if "model" in entry:
        if "options" in entry:
            raise DistillError(f"{where}: a small model takes its arguments beside model, not options")
        return Model(settings=dict(entry))
    _known(where, entry, MODEL_KEYS)
    if not isinstance(entry["config"], str) or not isinstance(entry.get("options", {}), dict):
        raise DistillError(f"{where}: config must be a text, and options a table")
    published = _figures(where, entry.get("published", {}))
    return Model(config=located(entry["config"], folder), options=entry.get("options", {}), published=published)


def _method(where: str, entry: Any) -> dict[str, Any]:
    if not isinstance(entry, dict) or not ({"recipe", "terms", "start"} & set(entry)):
        raise DistillError(f"{where} needs recipe = '…', terms = […], or start = '…' for a training without a teacher")
    _known(where, entry, METHOD_KEYS)
    return {key: value for key, value in entry.items() if key != "published"}


def _published(where: str, told: Mapping[str, Any]) -> dict[str, Mapping[str, float]]:
    """Return the published figures of all methods that have some."""
    found: dict[str, Mapping[str, float]] = {
        name: _figures(f"{where}: method {name!r}", entry["published"])
        for name, entry in told["methods"].items()
        if "published" in entry
    }
    if found and len(told["students"]) > 1:
        raise DistillError(f"{where}: published figures of methods are of one student; leave the others out")
    return found


def _figures(where: str, published: Any) -> dict[str, float]:
    numbers = isinstance(published, dict) and all(isinstance(value, (int, float)) for value in published.values())
    if not numbers:
        raise DistillError(f"{where}: published must be a table such as {{ AP = 0.402 }}, got {published!r}")
    return dict(published)


def _text(where: str, told: Mapping[str, Any], key: str) -> str | None:
    value = told.get(key)
    if value is not None and (not isinstance(value, str) or not value):
        raise DistillError(f"{where}: {key} must be a text, got {value!r}")
    return value


def _share(where: str, value: Any, host: str) -> float:
    if host != "nlp":
        raise DistillError(f"{where}: fraction is a setting of Hugging Face's training sets; leave it out")
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 1:
        raise DistillError(f"{where}: fraction must be in (0, 1], got {value!r}")
    return float(value)


def _one_of(where: str, told: Mapping[str, Any], key: str, values: tuple[str, ...]) -> str:
    value = told.get(key, values[0])
    if value not in values:
        raise DistillError(f"{where}: {key} must be {' or '.join(map(repr, values))}, got {value!r}")
    return str(value)


def _numbers(where: str, told: Mapping[str, Any], key: str, default: tuple[int, ...], *, least: int) -> tuple[int, ...]:
    values = told.get(key, default)
    if not isinstance(values, (list, tuple)) or not values or len({*map(str, values)}) < len(values):
        raise DistillError(f"{where}: {key} must be a list of different whole numbers, got {values!r}")
    for value in values:
        check_number(where, key, value, least, whole=True)
    return tuple(values)
