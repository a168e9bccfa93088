"""Data, schedule and evaluation of the small detectors and segmentors, which mmengine's Runner trains."""

from __future__ import annotations

import io
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from mmengine.config import Config

CHECKPOINTS = 10
"""The number of checkpoints of a training, to resume from."""
EMBEDDED_SPLITS = {name: name for name in ("train", "val", "test")}
# For a set without a third split the tables are of val, so that nothing may be tuned on it.
TWO_SPLITS = {"train": "train", "val": "val", "test": "val"}


def resnet18(kind: str, width: int, **settings: Any) -> dict[str, Any]:
    """Return the entry of a ResNet-18 of type ``kind`` with ``width`` base channels, from scratch."""
    shape = dict(depth=18, base_channels=width, stem_channels=width, num_stages=4, out_indices=(0, 1, 2, 3))
    norm = dict(norm_cfg=dict(type="BN", requires_grad=True), norm_eval=False)
    return dict(type=kind, **shape, **norm, style="pytorch", init_cfg=None, **settings)


@dataclass(frozen=True, kw_only=True)
class RunnerSetup(ABC):
    """Training and tests of models on one data set.

    Attributes:
        classes: the names of the classes.
        iterations: the iterations of a training.
        evaluations: the number of evaluations of a training on the validation split.
        splits: ``train``, ``val``, ``test`` -> the split's name in the data set.
        batch_size: the pictures of a step.
        tested_at_once: the pictures of a batch in evaluations.
        lr: the highest learning rate.
    """

    scope: ClassVar[str]
    classes: tuple[str, ...]
    iterations: int
    evaluations: int = 6
    splits: Mapping[str, str] = field(default_factory=lambda: EMBEDDED_SPLITS)
    batch_size: int
    tested_at_once: int
    lr: float

    @abstractmethod
    def images(self, data: Path, part: str, *, train: bool) -> dict[str, Any]:
        """Return the ``dataset`` entry of a split."""

    @abstractmethod
    def evaluator(self, data: Path, part: str) -> dict[str, Any]:
        """Return the evaluator of a split."""

    def prepared(self, model: dict[str, Any]) -> dict[str, Any]:
        """Return a model whose data preprocessor fits the pictures."""
        return model

    def config(self, model: dict[str, Any], data: Path, steps: int, split: str = "test") -> Config:
        """Return the Runner's config of a training: AdamW, warm-up and cosine, for teachers and students alike.

        Args:
            model: the ``model`` entry.
            data: the folder of the data set.
            steps: the iterations.
            split: the tested split.
        """

        def loader(part: str, *, train: bool) -> dict[str, Any]:
            return dict(
                batch_size=self.batch_size if train else self.tested_at_once,
                num_workers=0,
                sampler=dict(type="InfiniteSampler" if train else "DefaultSampler", shuffle=train),
                dataset=self.images(data, self.splits[part], train=train),
            )

        warm, window, every = max(steps // 10, 1), max(steps // 30, 1), max(steps // CHECKPOINTS, 1)
        warm_up = dict(type="LinearLR", start_factor=0.05, by_epoch=False, begin=0, end=warm)
        cosine = dict(
            type="CosineAnnealingLR", by_epoch=False, begin=warm, end=steps, T_max=steps - warm, eta_min_ratio=0.01
        )
        return Config(
            dict(
                default_scope=self.scope,
                model=self.prepared(model),
                train_dataloader=loader("train", train=True),
                val_dataloader=loader("val", train=False),
                test_dataloader=loader(split, train=False),
                val_evaluator=self.evaluator(data, self.splits["val"]),
                test_evaluator=self.evaluator(data, self.splits[split]),
                train_cfg=dict(
                    type="IterBasedTrainLoop", max_iters=steps, val_interval=max(steps // self.evaluations, 1)
                ),
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
                    checkpoint=dict(type="CheckpointHook", by_epoch=False, interval=every, max_keep_ckpts=1),
                ),
                log_processor=dict(by_epoch=False, window_size=window),
                log_level="ERROR",
                env_cfg=dict(cudnn_benchmark=False, mp_cfg=dict(mp_start_method="fork", opencv_num_threads=0)),
            )
        )


@contextmanager
def silent() -> Iterator[None]:
    """Suppress the messages that the hosts' datasets and metrics print in every evaluation."""
    with redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
