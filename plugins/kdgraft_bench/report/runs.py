"""Finished trainings as a report needs them, read from the logs of MMEngine, of a Hugging Face Trainer, or of ``kdgraft bench``.

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
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from kdgraft.errors import DistillError
from kdgraft.hosts import installed

from .benchmarked import bench_runs, is_bench
from .reading import (
    ITERATION,
    MEMORY,
    PARAMETERS,
    TEACHER,
    Points,
    Run,
    is_cost,
    newest_text,
    read_json,
    records,
)

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


def read_runs(named: Sequence[str]) -> list[Run]:
    """Read runs from folders.

    Args:
        named: ``FOLDER`` or ``LABEL=FOLDER`` of a run's work directory, the label being the folder's name by default; a label that comes
            again has another seed. The folder of ``kdgraft bench`` has many runs, with labels and seeds of their own.

    Raises:
        DistillError: a folder is missing or has no log of a run, there is no plain student, or nothing to compare with it.
    """
    found: list[Run] = []
    for name in named:
        label, folder = _named(name)
        if is_bench(folder) and not (folder / "results.csv").is_file():
            raise DistillError(f"the benchmark in {folder} is not finished; start kdgraft bench again to go on")
        if is_bench(folder):
            if label:
                raise DistillError(f"{folder} has runs with labels of their own; leave {label!r} away")
            found += bench_runs(folder, _logged)
        else:
            found.append(replace(_read(folder), label=label or folder.resolve().name))
    found = list(_numbered(found))
    labels = list(dict.fromkeys(run.label for run in found))
    if lacking := [run.plain for run in found if run.label != TEACHER and run.plain not in labels]:
        raise DistillError(
            f"which run is the plain student? name it as {lacking[0]}=FOLDER; there are {', '.join(labels)}"
        )
    if all(run.label in (run.plain, TEACHER) for run in found):
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
    """Return the pictures in the folders of benchmarks."""
    folders = [folder for _, folder in map(_named, named) if is_bench(folder)]
    return [path for folder in folders for path in sorted(folder.glob("*.png"))]


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
        name for name in students[0].metrics if not is_cost(name) and all(name in run.metrics for run in students)
    ]
    if not shared:
        told = "; ".join(
            f"{run.label}: {', '.join(n for n in run.metrics if not is_cost(n)) or 'none'}" for run in students
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
    run = _logged(folder)
    if run is not None:
        return run
    raise DistillError(
        f"{folder} has no log of a run: neither TIMESTAMP/vis_data/scalars.json of MMEngine, nor trainer_state.json of a "
        "Trainer (or a checkpoint-* with it), nor runs.jsonl of kdgraft bench"
    )


def _logged(folder: Path) -> Run | None:
    """Return the run of a folder with a log of a host."""
    readers: tuple[Callable[[Path], Run | None], ...] = (_mmengine, _trainer)
    return next((run for reader in readers if (run := reader(folder)) is not None), None)


# --- MMEngine


def _mmengine(folder: Path) -> Run | None:
    logs = sorted([*folder.glob("*/vis_data/scalars.json"), *folder.glob("vis_data/scalars.json")])
    losses: dict[str, dict[int, float]] = {}
    validation: dict[str, dict[int, float]] = {}
    times, memory, begun = [], 0.0, False
    for log in logs:
        at = 0
        for record in records(log):
            if "lr" in record:  # of training; a resumed run logs again what its checkpoint did not have yet
                at, begun = int(record["step"]), True
                _record(losses, at, record)
                times.append(float(record.get("time", math.nan)))
                memory = max(memory, float(record.get("memory", 0)))
            elif at:  # the step of an evaluation is an epoch or 0; it comes after that of the training
                _record(validation, at, record)
    if not begun:
        return None
    config = newest_text(folder, "*.py", "*/vis_data/config.py")
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
    read = [read_json(path) for path in states]
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
    text = "" if config is None else config.read_text(errors="replace")
    told = {} if config is None else read_json(config)
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


def _points(found: Mapping[str, Mapping[int, float]]) -> dict[str, Points]:
    return {name: sorted(points.items()) for name, points in found.items()}


def _at_the_end(validation: Mapping[str, Mapping[int, float]]) -> dict[str, float]:
    """Return the metrics of the last evaluation; a host leaves one out that it could not compute."""
    last = max((at for points in validation.values() for at in points), default=0)
    return {name: points[last] for name, points in validation.items() if last in points}


def same_schedule(runs: Sequence[Run]) -> bool:
    """Return true if the students trained for equally many iterations, as far as their logs tell."""
    lengths = {
        max(at for points in run.losses.values() for at, _ in points)
        for run in runs
        if run.losses and run.label != TEACHER
    }
    return all(abs(a - b) <= 0.02 * max(a, b) for a, b in pairwise(sorted(lengths)))
