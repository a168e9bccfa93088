"""What the demos of detection and segmentation share: train teacher, plain and distilled students alike, then tell.

Everything goes through the host's own Runner; a :class:`Demo` says what differs between tasks and datasets.
"""

from __future__ import annotations

import copy
import io
import logging
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from mmengine.analysis import get_model_complexity_info
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.logging import MMLogger
from mmengine.registry import DefaultScope
from mmengine.runner import Runner

from taskdistill.bench import interleave
from taskdistill.comparison import Outcome, Progress, check_split, choose, compare
from taskdistill.report import Result

from .run import on_device


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

    @property
    def main_metric(self) -> str:
        """The metric that the gap is measured by."""
        return next(iter(self.scores))

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
    # The hosts' metrics print a page at every evaluation.
    with redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        runner = Runner.from_cfg(cfg)
        runner.register_hook(_Watch(progress, demo.scores[demo.main_metric]))
        _quiet(runner.logger)
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
    """Milliseconds of a training step (forward, loss, backward) of each method, timed in turn on one batch: medians."""
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
    seconds = interleave({run.method: step(run.runner.model) for run in runs}, rounds, device=device)
    return {method: float(np.median(values)) * 1e3 for method, values in seconds.items()}


def plain_view(model: Any) -> Any:
    """A student without its distiller, to count parameters and FLOPs."""
    if model._modules.get("distiller") is None:
        return model
    plain = copy.copy(model)
    plain._modules = {name: child for name, child in model._modules.items() if name != "distiller"}
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

    Args:
        demo: what to compare.
        seeds, first_seed: how many seeds, and the first of them.
        recipes: ``"default"``, ``"all"``, ``"none"``, or names with commas between.
        out: where results go.
        device: ``"cpu"`` keeps a machine's GPUs out of it.
        iterations: of every training; the demo's own by default.
        split: ``"val"`` to tune on (with other seeds than the table's).
    """
    names = choose(recipes, list(demo.recipes), demo.default)
    check_split(split)
    cv2.setNumThreads(0)
    DefaultScope.get_instance(f"taskdistill_demo_{demo.task}", scope_name=demo.scope)
    folder = Path(out)
    data = demo.write_data(folder / "data")

    def train_all(seed: int) -> list[Trained]:
        work = folder / f"seed{seed}"

        def fit(method: str, model: dict[str, Any]) -> Trained:
            return train(demo, method, model, data, work / method, seed, iterations, split)

        teacher = fit("teacher", demo.teacher[1])
        found = [teacher, fit("plain", demo.student[1])]
        found += [fit(name, demo.distilled(teacher.checkpoint, demo.recipes[name])) for name in names]
        steps = time_steps(found)
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
