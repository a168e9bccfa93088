"""Finished runs of every host, made once a process, whose files are attacked before the same command runs again."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kdgraft.cli import main
from kdgraft.files import digest_of_file
from kdgraft_bench.records import read_rows


def command(*arguments: str) -> tuple[int, str]:
    """Run a command; the exit code, which must be 0 or 2, with one line of an error if it is 2, and what stands on stdout."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(list(arguments))
        except SystemExit as ended:  # of argparse
            code = ended.code if isinstance(ended.code, int) else 1
    assert code in (0, 2), f"exit code {code}"
    told = [line for line in err.getvalue().splitlines() if line.startswith("kdgraft") and "error: " in line]
    assert code == 0 or len(told) == 1, f"{len(told)} lines of errors: {err.getvalue()[-400:]!r}"
    assert "Traceback" not in err.getvalue(), f"a traceback: {err.getvalue()[-400:]!r}"
    return code, out.getvalue() + err.getvalue()


@dataclass(frozen=True)
class Job:
    """A run that can be started again.

    Args:
        prepare: writes what the run needs into the working directory.
        begin: the command that makes the run.
        again: the command that resumes it or finds it finished.
        weights: the file of the student that it leaves, or the folder of a store, or the file of a benchmark's results.
        out: the folder of the results.
        own: patterns of the files that the run wrote: whatever befalls them, the result is the same or the command refuses.
        others: patterns of files that it reads and did not write, of which only what cannot be read at all can be told.
        undone: folders of the result that are removed, so that there is something to do.
    """

    prepare: Callable[[], None]
    begin: Sequence[str]
    again: Sequence[str]
    weights: str
    out: str
    own: Sequence[str]
    others: Sequence[str] = ()
    undone: Sequence[str] = ()


@contextlib.contextmanager
def inside(folder: Path) -> Iterator[Path]:
    """Make a folder the working directory while the body runs."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield folder
    finally:
        os.chdir(before)


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """A working directory that is removed afterwards."""
    with tempfile.TemporaryDirectory(prefix="attacked") as folder, inside(Path(folder)):
        yield Path(folder)


@cache
def _made(name: str) -> tempfile.TemporaryDirectory[str]:
    """A folder with a run in ``here``, the place that it was made in and is attacked in, and a copy of it in ``whole``."""
    folder = tempfile.TemporaryDirectory(prefix=name)
    here = Path(folder.name) / "here"
    here.mkdir()
    with inside(here):
        JOBS[name].prepare()
        code, said = command(*JOBS[name].begin)
        assert code == 0, said
    here.rename(here.with_name("whole"))
    return folder


def _whole(name: str) -> Path:
    return Path(_made(name).name) / "whole"


@contextlib.contextmanager
def finished(name: str) -> Iterator[Path]:
    """A finished run, as the working directory."""
    whole = _whole(name)
    here = whole.with_name("here")
    shutil.rmtree(here, ignore_errors=True)
    shutil.copytree(whole, here)
    for folder in JOBS[name].undone:
        shutil.rmtree(here / folder)
    with inside(here):
        yield here


def matching(folder: Path, patterns: Sequence[str]) -> list[str]:
    """The files that match, relative to the folder."""
    found = {path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    return sorted(path.relative_to(folder).as_posix() for path in found)


@cache
def files_of(name: str) -> tuple[list[str], list[str]]:
    """The run's own files, and the others that it reads."""
    folder = _whole(name)
    return matching(folder, JOBS[name].own), matching(folder, JOBS[name].others)


def student(path: Path) -> Mapping[str, Any]:
    """What a run left: the weights of the student, the files of a store, or the metrics of a benchmark."""
    if path.is_dir():
        return {name: digest_of_file(path / name) for name in matching(path, ["**/*"]) if not name.endswith(".lock")}
    if path.suffix == ".jsonl":
        return {str(key): dict(row.metrics) for key, row in read_rows(path.parent).items()}
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    saved = torch.load(path, weights_only=False)
    return saved.get("state_dict", saved)


@cache
def result(name: str) -> Mapping[str, Any]:
    """The student of the run that nothing befell."""
    return student(_whole(name) / JOBS[name].weights)


def assert_as_whole(name: str, folder: Path) -> None:
    """The student is that of the run that nothing befell, bit for bit."""
    found, whole = student(folder / JOBS[name].weights), result(name)
    different = [key for key in whole if key not in found or not _equal(whole[key], found[key])]
    assert found.keys() == whole.keys() and not different, f"another result: {different[:3]}"


def _equal(one: Any, other: Any) -> bool:
    return torch.equal(one, other) if isinstance(one, Tensor) else one == other


# --- Hugging Face

BERT = dict(model_type="bert", hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
TRAINING = dict(use_cpu=True, max_steps=1, save_strategy="no", disable_tqdm=True, per_device_train_batch_size=2)
RECIPE: dict[str, Any] = dict(
    task="classification",
    data=dict(train="a.jsonl", eval="a.jsonl", text="text", label="label", length=8),
    tokenizer=dict(vocab_size=40),
    student=BERT,
    teacher=dict(type="Itself", momentum=0.9),
    terms=[dict(type="SoftTargets", temperature=2.0), dict(type="HiddenStates", weight=0.5)],
    training=TRAINING,
    output="out",
)


LAST = "out/checkpoint-10"
"""The last checkpoint of the job's run."""


def write_recipe(entry: Any, name: str = "recipe.yaml") -> str:
    """Write a recipe file, and the data that it may name."""
    import yaml

    rows = [{"text": f"word {n} of many", "label": "ab"[n % 2]} for n in range(8)]
    Path("a.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    Path(name).write_text(yaml.safe_dump(entry, sort_keys=False), encoding="utf-8")
    return name


def _texts() -> None:
    plain = {key: value for key, value in RECIPE.items() if key not in ("teacher", "terms")}
    code, said = command("train", write_recipe({**plain, "output": "teacher"}, "plain.yaml"))
    assert code == 0, said
    # Epochs of four steps, whose order is drawn with the random state that dropout draws with: a checkpoint is within the second.
    saved = dict(max_steps=10, save_strategy="steps", save_steps=5, train_sampling_strategy="group_by_length")
    training = {**TRAINING, **saved}
    given = {key: value for key, value in RECIPE.items() if key not in ("tokenizer", "task")}
    # What is needed stands last, so that a file that is cut off can be told.
    write_recipe({**given, "teacher": "teacher", "training": training, "task": RECIPE["task"]})


def _store() -> None:
    _texts()
    Path("a.jsonl").write_text("\n".join(json.dumps({"text": f"word {n}", "label": "ab"[n % 2]}) for n in range(600)))


# --- MMDetection and MMSegmentation, with pictures that are cropped, flipped and recoloured at random


REPLAYED = [dict(type="ReplayViews")]


def _drawn(config: Any, *steps: dict[str, Any]) -> None:
    """Let a training draw the order of its pictures and their views; its pipeline has these steps before the last one."""
    config.train_dataloader.sampler.shuffle = True
    pipeline = config.train_dataloader.dataset.pipeline
    config.train_dataloader.dataset.pipeline = [*pipeline[:-1], *steps, pipeline[-1]]
    config.dump("config.py")


def _scenes() -> None:
    from support.det import detector, distilled, runner_config, save_teacher, scenes

    teacher = detector(width=6, channels=12)
    terms = [dict(type="FeatureImitation", tap="neck[*]"), dict(type="FactorTransfer", tap="neck[0]", pretrain=2)]
    model = distilled(detector(), teacher, save_teacher(Path("teacher.pth"), teacher), terms=terms)
    config = runner_config(model, scenes(Path("scenes")), Path("work"), iters=4, batch_size=2, custom_hooks=REPLAYED)
    _drawn(config, dict(type="PhotoMetricDistortion"), dict(type="RandomShift", prob=0.7, max_shift_px=8))


def _masks() -> None:
    from support.seg import SMALL_CRITIC, config, distilled, save_teacher, scenes, segmentor

    terms = [dict(type="AdversarialMask", critic=SMALL_CRITIC), dict(type="FeatureImitation", tap="backbone[2]")]
    model = distilled(segmentor(dropout=0.1), save_teacher(Path("teacher.pth")), terms=terms)
    given = dict(custom_imports=dict(imports=["kdgraft_seg"]), custom_hooks=REPLAYED)
    resized = dict(type="RandomResize", scale=(96, 96), ratio_range=(0.75, 1.5), keep_ratio=True)
    found = config(model, scenes(Path("scenes")), Path("work"), **given)
    _drawn(found, resized, dict(type="RandomCrop", crop_size=(64, 64)), dict(type="RandomFlip", prob=0.5))


def _run_of_mm(prepare: Callable[[], None]) -> Job:
    return Job(
        prepare,
        ("train", "config.py", "--work-dir", "work"),
        ("train", "config.py", "--work-dir", "work", "--resume"),
        "work/iter_4.pth",
        "work",
        own=("work/*.pth", "work/last_checkpoint"),
        others=("teacher.pth", "config.py"),
    )


# --- plain PyTorch


def write_plan(text: str = "") -> None:
    """Write the tasks of a plan, and the plan."""
    from support.plans import TASKS

    Path("tasks.py").write_text(TASKS, encoding="utf-8")
    runs = '[runs.teacher]\nconfig = "tasks.py:large"\n[runs.student]\nconfig = "tasks.py:small"\nteacher = "teacher"\n'
    Path("plan.toml").write_text(text or f'out = "out"\n{runs}terms = ["SoftTargets"]\n', encoding="utf-8")


JOBS: dict[str, Job] = {
    "torch": Job(
        write_plan,
        ("plan", "plan.toml"),
        ("plan", "plan.toml"),
        "out/student/seed0/student.pth",
        "out",
        own=("out/teacher/**/*",),
        others=("plan.toml", "tasks.py"),
        undone=("out/student",),
    ),
    "transformers": Job(
        _texts,
        ("train", "recipe.yaml"),
        ("train", "recipe.yaml", "--resume"),
        "out/model.safetensors",
        "out",
        own=("out/checkpoint-*/*",),
        others=("teacher/*", "recipe.yaml"),
    ),
    "mmdet": _run_of_mm(_scenes),
    "mmseg": _run_of_mm(_masks),
    "store": Job(
        _store,
        ("cache", "recipe.yaml", "--out", "store"),
        ("cache", "recipe.yaml", "--out", "store"),
        "store",
        "store",
        own=("store/*",),
    ),
    "bench": Job(
        lambda: None,
        ("bench", "core", "--methods", "hint", "--seeds", "0", "--iterations", "30", "--out", "out"),
        ("bench", "core", "--methods", "hint", "--seeds", "0", "--iterations", "30", "--out", "out"),
        "out/runs.jsonl",
        "out",
        own=("out/**/*",),
    ),
}
"""By the framework that a run needs, or what it makes."""
HOSTS = {
    "torch": "plans in plain PyTorch",
    "transformers": "Hugging Face",
    "mmdet": "MMDetection",
    "mmseg": "MMSegmentation",
}
"""The jobs that are trainings of a host, by its framework, with its title."""
