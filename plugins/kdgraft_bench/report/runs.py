"""Finished trainings as a report needs them, read from the logs of MMEngine, of a Hugging Face Trainer, or of ``kdgraft demo``.

Only logs and checkpoints are read. No config of a run is executed, and no framework but torch is imported, apart from mmengine for the
checkpoints that mmengine wrote.
"""

from __future__ import annotations

import ast
import json
import math
import re
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from kdgraft.errors import DistillError
from kdgraft.hosts import installed

from ..finished import RECORD
from ..results import read_results

Points = Sequence[tuple[int, float]]
"""(iteration, value), in the order of the iterations."""

TEACHER, PLAIN = "teacher", "plain"
"""The labels of the runs that the others are compared with."""
PARAMETERS, ITERATION, MEMORY = "parameters (k)", "iteration (ms)", "memory (MiB)"
COSTS = (PARAMETERS, "MFLOPs", "step (ms)", ITERATION, MEMORY)
"""What a model costs; every other metric says how good it is."""
MAIN = (
    "coco/bbox_mAP",
    "coco/segm_mAP",
    "pascal_voc/mAP",
    "mIoU",
    "span_f1",
    "accuracy",
    "f1",
    "macro_f1",
    "perplexity",
    "loss",
)
"""The metrics that a report is about by default: the first of them that all runs have."""
_TIMES = ("time", "data_time", "memory", "lr", "base_lr", "epoch", "iter", "step", "grad_norm", "momentum")
"""What mmengine logs beside losses and metrics."""


@dataclass(frozen=True)
class Run:
    """A finished training.

    Attributes:
        label: the name of its method; ``"teacher"`` and ``"plain"`` have these very names.
        seed: its seed, or its place among the runs of its label.
        folder: where it was read from.
        model: the name of the model.
        metrics: name -> value at the end of the training, costs (:data:`COSTS`) among them.
        losses: name -> points of the training.
        validation: metric -> points, of the evaluations during the training.
        config: the text of its config; empty if there is none.
    """

    label: str
    seed: int
    folder: Path
    model: str
    metrics: Mapping[str, float]
    losses: Mapping[str, Points] = field(default_factory=dict)
    validation: Mapping[str, Points] = field(default_factory=dict)
    config: str = ""


def read_runs(named: Sequence[str]) -> list[Run]:
    """Read runs from folders.

    Args:
        named: ``FOLDER`` or ``LABEL=FOLDER`` of a run's work directory, the label being the folder's name by default; a label that comes
            again has another seed. The folder of ``kdgraft demo`` has many runs, with labels and seeds of its own.

    Raises:
        DistillError: a folder is missing or has no log of a run, there is no plain student, or nothing to compare with it.
    """
    found: list[Run] = []
    for name in named:
        label, folder = _named(name)
        if (folder / "results.csv").is_file():
            if label:
                raise DistillError(f"{folder} has runs with labels of their own; leave {label!r} away")
            found += _demo(folder)
        else:
            found.append(replace(_read(folder), label=label or folder.resolve().name))
    found = list(_numbered(found))
    labels = list(dict.fromkeys(run.label for run in found))
    if PLAIN not in labels:
        raise DistillError(f"which run is the plain student? name it as {PLAIN}=FOLDER; there are {', '.join(labels)}")
    if not set(labels) - {PLAIN, TEACHER}:
        raise DistillError(
            f"name a distilled student beside the plain one, as LABEL=FOLDER; there are {', '.join(labels)}"
        )
    for what, each in (
        ("folder", [run.folder.resolve() for run in found]),
        ("run", [f"{run.label}, seed {run.seed}" for run in found]),
    ):
        if twice := [one for one, count in Counter(each).items() if count > 1]:
            raise DistillError(f"the {what} {twice[0]} is named twice; each has to be another training")
    return found


def pictures_of(named: Sequence[str]) -> list[Path]:
    """Return the pictures in those folders that are a demo's, but for its curves, which a report draws itself."""
    folders = [folder for _, folder in map(_named, named) if (folder / "results.csv").is_file()]
    return [path for folder in folders for path in sorted(folder.glob("*.png")) if path.stem != "curves"]


def main_metric(runs: Sequence[Run], wanted: str | None = None) -> str:
    """Return the metric that a report is about.

    Args:
        runs: the runs; all have the metric, but for the teacher, whose scores may be on another scale.
        wanted: its name, if it was told.

    Raises:
        DistillError: the runs have no metric in common, or not this one.
    """
    students = [run for run in runs if run.label != TEACHER]
    shared = [
        name for name in students[0].metrics if name not in COSTS and all(name in run.metrics for run in students)
    ]
    if not shared:
        told = "; ".join(
            f"{run.label}: {', '.join(n for n in run.metrics if n not in COSTS) or 'none'}" for run in students
        )
        raise DistillError(f"the runs have no metric of a validation in common ({told}); evaluate during training")
    if wanted is not None:
        if wanted not in shared:
            raise DistillError(f"not every run has the metric {wanted!r}; all have {', '.join(shared)}")
        return wanted
    return next((name for name in MAIN if name in shared), shared[0])


def _named(name: str) -> tuple[str, Path]:
    """Split ``LABEL=FOLDER``; the label is empty where there is none."""
    label, equals, folder = name.partition("=")
    path = Path(folder if equals and not Path(name).exists() else name)
    if not path.is_dir():
        raise DistillError(f"there is no folder {path}")
    return (label if path == Path(folder) and equals else ""), path


def _numbered(runs: Iterable[Run]) -> Iterator[Run]:
    """Number the runs of a label that were named one by one: their seeds are 0, 1 and so on."""
    seen: Counter[str] = Counter()
    for run in runs:
        yield run if run.seed >= 0 else replace(run, seed=seen[run.label])
        seen[run.label] += 1


def _read(folder: Path) -> Run:
    readers: tuple[Callable[[Path], Run | None], ...] = (_mmengine, _trainer)
    for reader in readers:
        if (run := reader(folder)) is not None:
            return run
    raise DistillError(
        f"{folder} has no log of a run: neither TIMESTAMP/vis_data/scalars.json of MMEngine, nor trainer_state.json of a "
        "Trainer (or a checkpoint-* with it), nor results.csv of kdgraft demo"
    )


# --- kdgraft demo


def _demo(folder: Path) -> list[Run]:
    results = read_results(folder / "results.csv")
    found: dict[tuple[str, int], dict[str, float]] = {}
    models: dict[str, str] = {}
    for result in results:
        if not math.isfinite(result.value):
            continue
        found.setdefault((result.method, result.seed), {})[result.metric] = result.value
        models[result.method] = result.model
    first = next((name for name in next(iter(found.values())) if name not in COSTS), "validation")
    runs = []
    for (method, seed), metrics in found.items():
        own = folder / f"seed{seed}" / method
        curves: dict[str, Points] = {}
        if (own / RECORD).is_file():
            curves = {name: _finite(points) for name, points in _json(own / RECORD)["curves"].items()}
        validation = {first: curves.pop("validation")} if "validation" in curves else {}
        runs.append(
            Run(
                method, seed, own, models[method], metrics, curves, validation, _newest_text(own, "*.py", "config.json")
            )
        )
    return runs


# --- MMEngine


def _mmengine(folder: Path) -> Run | None:
    logs = sorted([*folder.glob("*/vis_data/scalars.json"), *folder.glob("vis_data/scalars.json")])
    losses: dict[str, dict[int, float]] = {}
    validation: dict[str, dict[int, float]] = {}
    times, memory, begun = [], 0.0, False
    for log in logs:
        at = 0
        for record in _records(log):
            if "lr" in record:  # of training; a resumed run logs again what its checkpoint did not have yet
                at, begun = int(record["step"]), True
                _record(losses, at, record)
                times.append(float(record.get("time", math.nan)))
                memory = max(memory, float(record.get("memory", 0)))
            elif at:  # the step of an evaluation is an epoch or 0; it comes after that of the training
                _record(validation, at, record)
    if not begun:
        return None
    config = _newest_text(folder, "*.py", "*/vis_data/config.py")
    metrics = _at_the_end(validation)
    times = [value for value in times if math.isfinite(value)]
    if times:
        metrics[ITERATION] = statistics.median(times) * 1e3
    if memory:
        metrics[MEMORY] = memory
    if (count := _checkpoint_size(folder)) is not None:
        metrics[PARAMETERS] = count / 1e3
    return Run("", -1, folder, _model_of(config), metrics, _points(losses), _points(validation), config)


def _record(into: dict[str, dict[int, float]], at: int, record: Mapping[str, Any]) -> None:
    for name, value in record.items():
        if name not in _TIMES and isinstance(value, (int, float)) and math.isfinite(value):
            into.setdefault(name, {})[at] = float(value)


def _checkpoint_size(folder: Path) -> int | None:
    """Return the number of weights in the newest checkpoint; ``None`` where there is none, or mmengine is not installed."""
    files = sorted(folder.glob("*.pth"), key=lambda path: path.stat().st_mtime)
    if not files or not installed("mmengine"):
        return None
    from .checkpoints import count_weights  # imports mmengine

    return count_weights(files[-1])


def _model_of(config: str) -> str:
    """Return the type of the student in the text of a config."""
    try:
        tree = ast.parse(config)
    except SyntaxError:
        return ""
    for node in tree.body:
        if (
            isinstance(node, ast.Assign)
            and ast.unparse(node.targets[0]) == "model"
            and isinstance(node.value, ast.Call)
        ):
            told = {k.arg: k.value.value for k in node.value.keywords if isinstance(k.value, ast.Constant)}
            return str(told.get("student") or told.get("type") or "")
    return ""


# --- Hugging Face


def _trainer(folder: Path) -> Run | None:
    states = [*folder.glob("checkpoint-*/trainer_state.json"), *folder.glob("trainer_state.json")]
    if not states:
        return None
    read = [_json(path) for path in states]
    state = max(read, key=lambda one: (one["global_step"], len(one["log_history"])))
    losses: dict[str, dict[int, float]] = {}
    validation: dict[str, dict[int, float]] = {}
    metrics: dict[str, float] = {}
    for record in state["log_history"]:
        at = int(record["step"])
        evaluated = {name.removeprefix("eval_"): value for name, value in record.items() if name.startswith("eval_")}
        if evaluated:
            kept = {
                k: v
                for k, v in evaluated.items()
                if k not in ("runtime", "model_preparation_time") and not k.endswith("_per_second")
            }
            _record(validation, at, kept)
        elif "train_runtime" in record:
            metrics[ITERATION] = 1e3 * record["train_runtime"] / max(at, 1)
        else:
            _record(losses, at, {name: value for name, value in record.items() if name != "learning_rate"})
    where = [
        folder,
        *sorted(folder.glob("checkpoint-*"), key=lambda path: int(re.sub(r"\D", "", path.name) or 0), reverse=True),
    ]
    config = next((path / "config.json" for path in where if (path / "config.json").is_file()), None)
    text = "" if config is None else config.read_text()
    told = {} if config is None else _json(config)
    model = next(iter(told.get("architectures") or []), told.get("model_type", ""))
    weights = next((files for path in where if (files := sorted(path.glob("model*.safetensors")))), [])
    if weights:
        metrics[PARAMETERS] = sum(map(_safetensors_size, weights)) / 1e3
    return Run(
        "", -1, folder, model, {**_at_the_end(validation), **metrics}, _points(losses), _points(validation), text
    )


def _safetensors_size(path: Path) -> int:
    """Return the number of values in a file of safetensors, from its header."""
    try:
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    except (ValueError, OverflowError, MemoryError):
        raise DistillError(f"{path} is damaged: it has no header of safetensors") from None
    return sum(math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")


# --- common


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise DistillError(f"{path} is damaged: {error}") from None


def _records(log: Path) -> Iterator[dict[str, Any]]:
    """Yield the records of a log, a line each; the last line of a run that was killed may be cut off."""
    lines = log.read_text().splitlines()
    for number, line in enumerate(lines, 1):
        try:
            yield json.loads(line)
        except ValueError as error:
            if number < len(lines):
                raise DistillError(f"{log} is damaged in line {number}: {error}") from None


def _points(found: Mapping[str, Mapping[int, float]]) -> dict[str, Points]:
    return {name: sorted(points.items()) for name, points in found.items()}


def _finite(points: Iterable[Sequence[float]]) -> Points:
    return [(int(step), float(value)) for step, value in points if math.isfinite(value)]


def _at_the_end(validation: Mapping[str, Mapping[int, float]]) -> dict[str, float]:
    """Return the metrics of the last evaluation; a host leaves one out that it could not compute."""
    last = max((at for points in validation.values() for at in points), default=0)
    return {name: points[last] for name, points in validation.items() if last in points}


def _newest_text(folder: Path, *patterns: str) -> str:
    """Return the text of the newest file of the first pattern that has any."""
    for pattern in patterns:
        if files := sorted(folder.glob(pattern), key=lambda path: path.stat().st_mtime):
            return files[-1].read_text()
    return ""


def same_schedule(runs: Sequence[Run]) -> bool:
    """Return true if the students trained for equally many iterations, as far as their logs tell."""
    lengths = {
        max(at for points in run.losses.values() for at, _ in points)
        for run in runs
        if run.losses and run.label != TEACHER
    }
    return all(abs(a - b) <= 0.02 * max(a, b) for a, b in pairwise(sorted(lengths)))
