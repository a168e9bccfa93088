"""Comparisons of detectors and of segmentors, all trained by mmengine's own Runner."""

from __future__ import annotations

import copy
import io
import logging
import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field, replace
from importlib import import_module
from itertools import count
from pathlib import Path
from typing import Any, ClassVar

import cv2
import torch
from mmengine.analysis import get_model_complexity_info
from mmengine.config import Config
from mmengine.device import utils as device_utils
from mmengine.hooks import Hook
from mmengine.registry import MODELS, DefaultScope
from mmengine.runner import Runner
from mmengine.structures import BaseDataElement
from torch import Tensor, nn
from tqdm import tqdm

from kdgraft.files import written_whole
from kdgraft.hiding import own_children
from kdgraft.sources.teacher import load_strictly, read_checkpoint, weights_of
from kdgraft_mm.checkpoints import SAFE_TYPES

from ..comparison import Comparison, Outcome, Training
from ..finished import code
from ..pictures import Curves

WEIGHTS = "weights.pth"
"""The file with the weights only of a checkpoint, which the code of other packages can load on every stack."""
_runs = count()


def resnet18(kind: str, width: int, **settings: Any) -> dict[str, Any]:
    """Return the entry of a ResNet-18 of type ``kind`` with ``width`` base channels, from scratch."""
    shape = dict(depth=18, base_channels=width, stem_channels=width, num_stages=4, out_indices=(0, 1, 2, 3))
    norm = dict(norm_cfg=dict(type="BN", requires_grad=True), norm_eval=False)
    return dict(type=kind, **shape, **norm, style="pytorch", init_cfg=None, **settings)


@dataclass(frozen=True, kw_only=True)
class RunnerComparison(Comparison):
    """A comparison of models that mmengine's Runner trains on one dataset.

    Attributes:
        scope: the host's registry scope.
        kind: the distilled model's type.
        classes: the names of the dataset's classes.
        size: (height, width) of the pictures, for the count of FLOPs.
        batch_size: the pictures of a step.
        tested_at_once: the pictures of a batch in evaluations.
        lr: the highest learning rate.
        references: other packages' distillation by name: (student's model, teacher's config, teacher's checkpoint) -> model.
    """

    costs: ClassVar[Mapping[str, int]] = {"parameters (k)": 0, "MFLOPs": 0, "step (ms)": 0}
    scope: str
    kind: str
    classes: tuple[str, ...]
    size: tuple[int, int]
    batch_size: int
    tested_at_once: int
    lr: float
    references: Mapping[str, Callable[[dict[str, Any], dict[str, Any], str], dict[str, Any]]] = field(
        default_factory=dict
    )

    @abstractmethod
    def images(self, data: Path, part: str, *, train: bool) -> dict[str, Any]:
        """Return the ``dataset`` entry of a split."""

    @abstractmethod
    def evaluator(self, data: Path, part: str) -> dict[str, Any]:
        """Return the evaluator of a split."""

    @property
    def methods(self) -> Sequence[str]:
        """The names of the recipes and of the references."""
        return [*self.recipes, *self.references]

    def model(self, method: str, teacher: Path) -> dict[str, Any]:
        """Return the ``model`` entry of a method, given the teacher's checkpoint."""
        if method in ("teacher", "plain"):
            return (self.teacher if method == "teacher" else self.student)[1]
        if method in self.references:
            weights = str(teacher.with_name(WEIGHTS))
            return self.references[method](self.student[1], dict(model=self.teacher[1]), weights)
        student = copy.deepcopy(self.student[1])
        kind = student.pop("type")
        return dict(
            student,
            type=self.kind,
            student=kind,
            teacher=dict(config=copy.deepcopy(self.teacher[1]), checkpoint=str(teacher)),
            **copy.deepcopy(dict(self.recipes[method])),
        )

    def config(self, training: Training) -> Config:
        """Return the Runner's config of a training: AdamW, warm-up and cosine for the teacher and for all students."""

        def loader(part: str, *, train: bool) -> dict[str, Any]:
            return dict(
                batch_size=self.batch_size if train else self.tested_at_once,
                num_workers=0,
                sampler=dict(type="InfiniteSampler" if train else "DefaultSampler", shuffle=train),
                dataset=self.images(training.data, self.splits[part], train=train),
            )

        model = self.model(training.method, self.weights(training.teacher))
        end, warm, window = training.iterations, max(training.iterations // 10, 1), max(training.iterations // 30, 1)
        warm_up = dict(type="LinearLR", start_factor=0.05, by_epoch=False, begin=0, end=warm)
        cosine = dict(
            type="CosineAnnealingLR", by_epoch=False, begin=warm, end=end, T_max=end - warm, eta_min_ratio=0.01
        )
        return Config(
            dict(
                default_scope=self.scope,
                model=copy.deepcopy(model),
                work_dir=str(training.folder),
                train_dataloader=loader("train", train=True),
                val_dataloader=loader("val", train=False),
                test_dataloader=loader(training.split, train=False),
                val_evaluator=self.evaluator(training.data, self.splits["val"]),
                test_evaluator=self.evaluator(training.data, self.splits[training.split]),
                randomness=dict(seed=training.seed),
                train_cfg=dict(type="IterBasedTrainLoop", max_iters=end, val_interval=self.every(end)),
                val_cfg=dict(type="ValLoop"),
                test_cfg=dict(type="TestLoop"),
                optim_wrapper=dict(
                    type="OptimWrapper",
                    optimizer=dict(type="AdamW", lr=self.lr, weight_decay=0.05),
                    clip_grad=dict(max_norm=10.0),
                    paramwise_cfg=dict(norm_decay_mult=0, bias_decay_mult=0),
                ),
                param_scheduler=[warm_up, cosine],
                default_hooks=dict(
                    logger=dict(type="LoggerHook", interval=window),
                    checkpoint=dict(type="CheckpointHook", by_epoch=False, interval=end, save_optimizer=False),
                ),
                log_processor=dict(by_epoch=False, window_size=window),
                log_level="ERROR",
                env_cfg=dict(cudnn_benchmark=False, mp_cfg=dict(mp_start_method="fork", opencv_num_threads=0)),
            )
        )

    @contextmanager
    def entered(self, device: str) -> Iterator[None]:
        """Enter the host's scope, and set mmengine's device, which it sets when it is imported."""
        before = device_utils.DEVICE
        device_utils.DEVICE = device
        cv2.setNumThreads(0)
        try:
            with DefaultScope.overwrite_default_scope(self.scope):
                yield
        finally:
            device_utils.DEVICE = before

    def settings(self, training: Training) -> dict[str, Any]:
        """Return the config, the terms of the recipe and the versions of the code."""
        recipe = self.recipes.get(training.method, {}).get("recipe")
        hosts = [import_module(name).__version__ for name in ("mmcv", "mmengine", self.scope)]
        versions = [code("kdgraft", "kdgraft_mm", f"kdgraft_{self.task}", "kdgraft_bench"), torch.__version__, *hosts]
        with silent():
            return dict(
                config=self.config(replace(training, data=Path("data"), root=Path("work"))).to_dict(),
                # The config does not contain a recipe's default weights.
                terms=MODELS.get(f"{self.scope}.{self.kind}").expand(recipe) if recipe is not None else None,
                versions=versions,
            )

    def weights(self, training: Training) -> Path:
        return training.folder / f"iter_{training.iterations}.pth"

    def train(self, training: Training) -> Outcome:
        """Train and test a model through the Runner, and count its parameters and FLOPs."""
        with training.progress() as bar, silent():
            runner = self._runner(training)
            runner.register_hook(_Watch(bar, self))
            runner.train()
            metrics = self.figures(runner.test())
            plain = plain_view(runner.model)
            complexity = get_model_complexity_info(
                _Sized(plain, self.size), (3, *self.size), show_table=False, show_arch=False
            )
        metrics["parameters (k)"] = sum(p.numel() for p in plain.parameters()) / 1e3
        metrics["MFLOPs"] = complexity["flops"] / 1e6
        return Outcome(training, metrics, runner, self._curves(runner, training.iterations))

    def restore(self, training: Training) -> Runner:
        """Build the Runner, and load its model's weights and its message hub, which has the distiller's own state."""
        checkpoint = self.weights(training)
        with silent():
            runner = self._runner(training)
            found = read_checkpoint(checkpoint, safe_types=SAFE_TYPES)
            load_strictly(runner.model, weights_of(found), str(checkpoint))
        for key, value in found["message_hub"]["runtime_info"].items():
            runner.message_hub.update_info(key, value)
        return runner

    def batch(self, run: Runner) -> Any:
        with silent():
            return next(iter(run.train_dataloader))

    def loss(self, run: Runner, batch: Any) -> Tensor:
        """Return the loss on a copy of the batch, as preprocessing changes its samples (segmentation pads their labels)."""
        model: Any = run.model
        loss, _ = model.parse_losses(model(**model.data_preprocessor(copy.deepcopy(batch), True), mode="loss"))
        return loss

    def _runner(self, training: Training) -> Runner:
        if training.method in self.references:
            write_bare_weights(self.weights(training.teacher))
        cfg = self.config(training)
        # mmengine names a Runner's message hub after the second it is made in, so that two Runners of one second would share it.
        cfg.experiment_name = f"demo{next(_runs)}"
        runner = Runner.from_cfg(cfg)
        for handler in runner.logger.handlers:
            handler.setLevel(logging.ERROR)
        return runner

    def _curves(self, runner: Runner, iterations: int) -> Curves:
        """Return the logged losses and distillation figures, averaged over sixtieths of the run, and the validation score."""
        scalars = runner.message_hub.log_scalars
        curves = {}
        for key in scalars:
            if "loss" in key or "distill." in key:
                values = scalars[key].data[0]
                window = max(len(values) // 60, 1)
                curves[key.removeprefix("train/")] = [
                    (i + window, float(values[i : i + window].mean()))
                    for i in range(0, len(values) - window + 1, window)
                ]
        validated = f"val/{self.scores[self.metric][0]}"
        if validated in scalars:
            curves["validation"] = [
                (min((i + 1) * self.every(iterations), iterations), float(value))
                for i, value in enumerate(scalars[validated].data[0])
            ]
        return curves


class _Watch(Hook):
    """Updates the progress bar after each iteration of the Runner."""

    priority = "VERY_LOW"

    def __init__(self, bar: tqdm, comparison: RunnerComparison) -> None:
        self.bar, self.metric, self.score = bar, comparison.metric, f"val/{comparison.scores[comparison.metric][0]}"

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        hub = runner.message_hub
        shown = {"loss": hub.get_scalar("train/loss").current()}
        if self.score in hub.log_scalars:
            shown[self.metric] = hub.get_scalar(self.score).current()
        self.bar.set_postfix(shown, refresh=False)
        self.bar.update()


class _Sized(nn.Module):
    """A model's forward pass on pictures of one size alone; detectors with queries ask for the size beside the pictures."""

    def __init__(self, model: nn.Module, size: tuple[int, int]) -> None:
        super().__init__()
        self.model = model
        self.sample = BaseDataElement(metainfo=dict(img_shape=size, batch_input_shape=size))

    def forward(self, pictures: Tensor) -> Any:
        return self.model(pictures, [self.sample] * len(pictures), mode="tensor")


@contextmanager
def silent() -> Iterator[None]:
    """Suppress the messages that the hosts' datasets and metrics print in every evaluation."""
    with redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def write_bare_weights(checkpoint: Path) -> None:
    """Write the weights of a checkpoint, without anything else, to ``weights.pth`` beside it."""
    weights = weights_of(read_checkpoint(checkpoint, safe_types=SAFE_TYPES))
    with written_whole(checkpoint.with_name(WEIGHTS)) as part, part.open("wb") as file:
        torch.save({"state_dict": weights}, file)


def plain_view(model: Any) -> Any:
    """Return a student without its distiller, to count parameters and FLOPs."""
    if getattr(model, "distiller", None) is None:
        return model
    plain = copy.copy(model)
    own_children(plain)
    del plain.distiller
    return plain
