"""What the demos of detection and segmentation share: train teacher, plain and distilled students alike, then tell.

Everything goes through the host's own Runner; a :class:`Demo` says what differs between tasks and datasets.
"""

from __future__ import annotations

import copy
import io
import logging
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from importlib import import_module
from itertools import count
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from mmengine.analysis import get_model_complexity_info
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.logging import MMLogger
from mmengine.registry import MODELS, DefaultScope
from mmengine.runner import Runner

from kdgraft.bench import interleave
from kdgraft.comparison import Outcome, Progress, check_split, choose, compare
from kdgraft.files import digest
from kdgraft.hiding import own_children
from kdgraft.report import Result

from .finished import RECORD, WEIGHTS, Finished, alone, bare_weights, code, describe, restore
from .run import on_device

_runs = count()


@dataclass
class Demo:
    """A comparison: one teacher, one student, some recipes, one dataset.

    Attributes:
        task: ``"det"`` or ``"seg"``.
        dataset: its name in tables and results.
        scope: the host's registry scope.
        kind: the distilled model's type.
        teacher, student: (name, ``model`` entry).
        recipes: settings of a distilled model by name.
        default: the recipes that run when none are named.
        write_data: makes the data in a folder (or finds it) and returns where it is.
        config: the Runner's config from (model, data, work_dir, seed, iterations, split to test on).
        iterations, evaluations: of a training; evaluations on the validation split.
        scores: metric -> the host's name of it; the first is the main one.
        size: (height, width) of the input whose FLOPs are counted.
        picture: file name and function that draws what the models of one seed predict.
        tested: what the test split is called.
        peers: others' distillation by name: the model from (student's model, teacher's config, teacher's checkpoint).
        rounds: of timing the steps.
    """

    task: str
    dataset: str
    scope: str
    kind: str
    teacher: tuple[str, dict[str, Any]]
    student: tuple[str, dict[str, Any]]
    recipes: Mapping[str, Mapping[str, Any]]
    default: tuple[str, ...]
    write_data: Callable[[Path], Path]
    config: Callable[[dict[str, Any], Path, Path, int, int, str], Config]
    iterations: int
    scores: dict[str, str]
    size: tuple[int, int]
    picture: tuple[str, Callable[[Sequence[Trained], Path], None]]
    evaluations: int = 6
    tested: str = "test scenes"
    peers: Mapping[str, Callable[[dict[str, Any], dict[str, Any], str], dict[str, Any]]] = field(default_factory=dict)
    rounds: int = 20

    @property
    def main_metric(self) -> str:
        """The metric that the gap is measured by."""
        return next(iter(self.scores))

    def model(self, method: str, teacher: Path) -> dict[str, Any]:
        """The ``model`` entry of a method, given the teacher's checkpoint."""
        if method in ("teacher", "plain"):
            return (self.teacher if method == "teacher" else self.student)[1]
        if method in self.peers:
            weights = str(teacher.with_name(WEIGHTS))
            return self.peers[method](self.student[1], dict(model=self.teacher[1]), weights)
        return self.distilled(teacher, self.recipes[method])

    def settings(self, method: str, seed: int, iterations: int, split: str) -> dict[str, Any]:
        """What a training depends on beside data and device, wherever its files lie."""
        model = self.model(method, Path("teacher.pth"))
        recipe = self.recipes.get(method, {}).get("recipe")
        hosts = [import_module(name).__version__ for name in ("mmcv", "mmengine", self.scope)]
        versions = [code("kdgraft", "kdgraft_mm", f"kdgraft_{self.task}"), torch.__version__, *hosts]
        return dict(
            config=self.config(model, Path("data"), Path("work"), seed, iterations, split).to_dict(),
            # A recipe's own weights stand in no config.
            terms=MODELS.get(f"{self.scope}.{self.kind}").expand(recipe) if recipe is not None else None,
            versions=versions,
        )

    def distilled(self, teacher: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
        """The student's model with a distiller entry."""
        student = copy.deepcopy(self.student[1])
        kind = student.pop("type")
        return dict(
            student,
            type=self.kind,
            student=kind,
            teacher=dict(config=copy.deepcopy(self.teacher[1]), checkpoint=str(teacher)),
            **copy.deepcopy(dict(settings)),
        )


@dataclass
class Trained(Outcome):
    """A trained model with its Runner and checkpoint."""

    runner: Runner
    checkpoint: Path


class _Watch(Hook):
    """Rewrites the line of progress as the Runner goes."""

    priority = "VERY_LOW"

    def __init__(self, progress: Progress, score: str) -> None:
        self.progress, self.score = progress, f"val/{score}"

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        done = runner.iter + 1
        if self.progress.due(done):
            score = runner.message_hub.log_scalars.get(self.score)
            loss = runner.message_hub.get_scalar("train/loss").mean(self.progress.every)
            self.progress.show(done, loss, None if score is None else score.current())


def schedule(iterations: int, lr: float, evaluations: int) -> dict[str, Any]:
    """The part of a Runner's config that every model of a demo shares: AdamW, warm-up, cosine, validation, logging."""
    warm = max(iterations // 10, 1)
    return dict(
        train_cfg=dict(type="IterBasedTrainLoop", max_iters=iterations, val_interval=max(iterations // evaluations, 1)),
        val_cfg=dict(type="ValLoop"),
        test_cfg=dict(type="TestLoop"),
        optim_wrapper=dict(
            type="OptimWrapper",
            optimizer=dict(type="AdamW", lr=lr, weight_decay=0.05),
            clip_grad=dict(max_norm=10.0),
            paramwise_cfg=dict(norm_decay_mult=0, bias_decay_mult=0),
        ),
        param_scheduler=[
            dict(type="LinearLR", start_factor=0.05, by_epoch=False, begin=0, end=warm),
            dict(
                type="CosineAnnealingLR",
                by_epoch=False,
                begin=warm,
                end=iterations,
                T_max=iterations - warm,
                eta_min_ratio=0.01,
            ),
        ],
        default_hooks=dict(
            logger=dict(type="LoggerHook", interval=max(iterations // 30, 1)),
            checkpoint=dict(type="CheckpointHook", by_epoch=False, interval=iterations, save_optimizer=False),
        ),
        log_processor=dict(by_epoch=False, window_size=max(iterations // 30, 1)),
        log_level="ERROR",
        env_cfg=dict(cudnn_benchmark=False, mp_cfg=dict(mp_start_method="fork", opencv_num_threads=0)),
    )


def train(
    demo: Demo,
    method: str,
    model: dict[str, Any],
    data: Path,
    work_dir: Path,
    seed: int,
    iterations: int | None = None,
    split: str = "test",
) -> Trained:
    """Trains one model through the host's Runner and evaluates it on ``split``."""
    iterations = iterations or demo.iterations
    cfg = demo.config(model, data, work_dir, seed, iterations, split)
    progress = Progress(f"{method} (seed {seed})", iterations, demo.main_metric, sys.stdout)
    with _silent():
        runner = _runner(cfg)
        runner.register_hook(_Watch(progress, demo.scores[demo.main_metric]))
        runner.train()
        tested = runner.test()
        complexity = get_model_complexity_info(
            plain_view(runner.model), (3, *demo.size), show_table=False, show_arch=False
        )
    # A metric is silent when a model finds nothing at all, as an untrained one does.
    metrics = {metric: float(tested.get(key, 0.0)) for metric, key in demo.scores.items()}
    metrics["parameters (k)"] = sum(p.numel() for p in plain_view(runner.model).parameters()) / 1e3
    metrics["MFLOPs"] = complexity["flops"] / 1e6
    curves = _curves(runner, iterations, demo)
    return Trained(method, seed, metrics, runner, work_dir / f"iter_{iterations}.pth", curves=curves)


def _runner(cfg: Config) -> Runner:
    # mmengine names a Runner's message hub after the second it is made in: two of one second would share one.
    cfg.experiment_name = f"demo{next(_runs)}"
    runner = Runner.from_cfg(cfg)
    _quiet(runner.logger)
    return runner


@contextmanager
def _silent() -> Iterator[None]:
    """The hosts' datasets and metrics print a page at every evaluation."""
    with redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def train_once(
    demo: Demo, method: str, data: Path, folder: Path, seed: int, iterations: int, split: str, world: Any
) -> Trained:
    """Trains a method in ``folder/method``, or takes the finished training there if it had the same settings.

    Args:
        demo, method, data, seed, iterations, split: see :func:`train`.
        folder: of the seed; the teacher's checkpoint is in ``folder/teacher``.
        world: what else the result depends on: the dataset's files, the device.
    """
    work, name = folder / method, f"iter_{iterations}.pth"
    with _silent():
        settings = digest([demo.settings(method, seed, iterations, split), world])
    model = demo.model(method, folder / "teacher" / name)
    with alone(folder / f"{method}.lock", f"{method} (seed {seed})"):
        found = Finished.read(work, settings)
        if found is None or not (work / name).is_file():
            (work / RECORD).unlink(missing_ok=True)
            trained = train(demo, method, model, data, work, seed, iterations, split)
            Finished(settings, trained.metrics, trained.curves).write(work)
            return trained
    print(f"{method} (seed {seed}): taken from {work}, which was trained with these settings")
    with _silent():
        runner = _runner(demo.config(model, data, work, seed, iterations, split))
        restore(runner, work / name)
    return Trained(method, seed, found.metrics, runner, work / name, curves=found.curves)


def _curves(runner: Runner, iterations: int, demo: Demo) -> dict[str, list[tuple[int, float]]]:
    """Means over a sixtieth of the run of every logged loss and distillation figure, and the validation score."""
    scalars = runner.message_hub.log_scalars
    curves = {}
    for key in scalars:
        if "loss" in key or "distill." in key:
            values = scalars[key].data[0]
            window = max(len(values) // 60, 1)
            curves[key.removeprefix("train/")] = [
                (i + window, float(values[i : i + window].mean())) for i in range(0, len(values) - window + 1, window)
            ]
    validated = f"val/{demo.scores[demo.main_metric]}"
    if validated in scalars:
        interval = max(iterations // demo.evaluations, 1)
        curves["validation"] = [
            (min((i + 1) * interval, iterations), float(value)) for i, value in enumerate(scalars[validated].data[0])
        ]
    return curves


def time_steps(runs: Sequence[Trained], rounds: int = 20) -> dict[str, float]:
    """Milliseconds of a training step (forward, loss, backward) of each method, timed in turn on one batch: medians.

    The models are afterwards as they were: steps move the statistics of batch norms.
    """
    with _silent():
        batch = next(iter(runs[0].runner.train_dataloader))

    def step(model: Any) -> Callable[[], None]:
        model.train()

        def run() -> None:
            # Preprocessing changes the samples that it is given: segmentation pads their labels.
            loss, _ = model.parse_losses(model(**model.data_preprocessor(copy.deepcopy(batch), True), mode="loss"))
            loss.backward()
            model.zero_grad()

        return run

    device = next(runs[0].runner.model.parameters()).device.type
    before = [{name: buffer.clone() for name, buffer in run.runner.model.named_buffers()} for run in runs]
    seconds = interleave({run.method: step(run.runner.model) for run in runs}, rounds, device=device)
    for run, buffers in zip(runs, before, strict=True):
        for name, buffer in run.runner.model.named_buffers():
            buffer.copy_(buffers[name])
    return {method: float(np.median(values)) * 1e3 for method, values in seconds.items()}


def plain_view(model: Any) -> Any:
    """A student without its distiller, to count parameters and FLOPs."""
    if getattr(model, "distiller", None) is None:
        return model
    plain = copy.copy(model)
    own_children(plain)
    del plain.distiller
    return plain


def _quiet(logger: MMLogger) -> None:
    for handler in logger.handlers:
        handler.setLevel(logging.ERROR)


def run(
    demo: Demo,
    seeds: int = 1,
    recipes: str = "default",
    out: str | Path = "runs/demo",
    device: str = "cpu",
    iterations: int | None = None,
    first_seed: int = 0,
    split: str = "test",
) -> list[Result]:
    """Trains everything, prints the table and writes ``results.csv``, ``table.md``, the picture and ``curves.png`` to ``out``.

    What was trained in ``out`` before, with the same settings, is taken from there. Several processes may work on one folder
    at a time, best on a seed each; the same call for all of them then writes their table.

    Args:
        demo: what to compare.
        seeds, first_seed: how many seeds, and the first of them.
        recipes: ``"default"``, ``"all"``, ``"none"``, or names with commas between.
        out: where results go.
        device: ``"cpu"`` keeps a machine's GPUs out of it.
        iterations: of every training; the demo's own by default.
        split: ``"val"`` to tune on (with other seeds than the table's).
    """
    names = choose(recipes, [*demo.recipes, *demo.peers], demo.default)
    check_split(split)
    cv2.setNumThreads(0)
    DefaultScope.get_instance(f"kdgraft_demo_{demo.task}", scope_name=demo.scope)
    folder = Path(out)
    with alone(folder / "data.lock", "data"):
        data = demo.write_data(folder / "data")
    world = [describe(data), device]

    def train_all(seed: int) -> list[Trained]:
        found: list[Trained] = []
        for method in ("teacher", "plain", *names):
            if method in demo.peers:
                bare_weights(found[0].checkpoint)
            found.append(
                train_once(
                    demo, method, data, folder / f"seed{seed}", seed, iterations or demo.iterations, split, world
                )
            )
        steps = time_steps(found, demo.rounds)
        for trained in found:
            trained.metrics["step (ms)"] = steps[trained.method]
        return found

    with on_device(device):
        return compare(
            demo.task,
            demo.dataset,
            folder,
            range(first_seed, first_seed + seeds),
            train_all,
            models=lambda method: (demo.teacher if method == "teacher" else demo.student)[0],
            digits={**dict.fromkeys(demo.scores, 3), "parameters (k)": 0, "MFLOPs": 0, "step (ms)": 0},
            draw=lambda runs: demo.picture[1](runs, folder / demo.picture[0]),  # type: ignore[arg-type]
            tested=demo.tested if split == "test" else f"{split} split",
        )
