"""What the benchmark asks of MMDetection and MMSegmentation alike."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any, ClassVar

import cv2
import torch
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.hooks import Hook
from mmengine.registry import DefaultScope

from kdgraft.errors import DistillError
from kdgraft.files import written_whole
from kdgraft.hosts import Job, TrainedModel, host_named
from kdgraft.plans import PlannedRun
from kdgraft_mm.checkpoints import export_student
from kdgraft_mm.configs import load_config
from kdgraft_mm.evaluation import evaluate, open_model
from kdgraft_mm.run import begin, make_runner
from kdgraft_mm.trainer import STUDENT, MMTrainer

from ..spec import Benchmark, Model
from . import efficientnet
from .base import BenchHost, Dataset, Opened, Step, Tested, endless
from .mm_setup import RunnerSetup, silent

_steps = count()


class RunnerBench(BenchHost):
    """A host that mmengine's Runner trains.

    Attributes:
        name: the host's name.
        scope: its registry scope.
        data_parts: the parts of a data set that a config names.
    """

    name: ClassVar[str]
    scope: ClassVar[str]
    lengths = ("train_cfg.max_iters",)

    @abstractmethod
    def setup(self, dataset: Dataset, settings: Mapping[str, Any] | None = None) -> RunnerSetup:
        """Return the setup of a data set; a small model of these settings may have a schedule or a training set of its own."""

    @abstractmethod
    def small(self, model: Model, dataset: Dataset, classes: int) -> dict[str, Any]:
        """Return the ``model`` entry of a small model."""

    @abstractmethod
    def collector(self, dataset_meta: Mapping[str, Any]) -> Collector:
        """Return a collector of the decisions of a test."""

    def config(self, model: Model, dataset: Dataset, benchmark: Benchmark, name: str) -> tuple[str, dict[str, Any]]:
        if model.config is not None and dataset.folder is None:
            return model.config, {}
        if model.config is not None:
            config = load_config(model.config)
            _use_data(config, self.setup(dataset), dataset)
        else:
            config = self._small(model, dataset, benchmark)
        return write_config(config, benchmark.out / "configs" / f"{name}.py"), {}

    def _small(self, model: Model, dataset: Dataset, benchmark: Benchmark) -> Config:
        setup = self.setup(dataset, model.settings)
        assert dataset.folder is not None
        made = self.small(model, dataset, len(setup.classes))
        setup = replace(setup, batch_size=benchmark.batch or setup.batch_size)
        config = setup.config(made, dataset.folder.resolve(), benchmark.iterations or setup.iterations, benchmark.split)
        if made["backbone"]["type"] == "EfficientNetLite":
            config.custom_imports = dict(imports=[efficientnet.__name__])
        return config

    def length(self, model: Model, benchmark: Benchmark) -> dict[str, Any]:
        found = super().length(model, benchmark)
        if found and "max_iters" not in (load_config(str(model.config)).get("train_cfg") or {}):
            raise DistillError(
                f"{model.config} counts epochs; leave iterations out, and say options = {{ 'train_cfg.max_epochs' = 1 }}"
            )
        return found

    def test(self, run: PlannedRun, trained: TrainedModel, dataset: Dataset, split: str) -> Tested:
        config = load_config(trained.config, imports=False)
        with self.entered():
            collector = self.collector(self._dataset_meta(config))
            found = evaluate(trained.config, trained.weights, hooks=[collector])
        return Tested({**self.named(found), **collector.metrics()}, collector.decisions())

    def open(self, run: PlannedRun, trained: TrainedModel, dataset: Dataset) -> Opened:
        with self.entered():
            model, samples = open_model(trained.config, trained.weights)
        device = next(model.parameters()).device

        def ready(size: int) -> Callable[[], object]:
            batch = pseudo_collate([samples[place % len(samples)] for place in range(size)])

            @torch.no_grad()
            def predict() -> object:
                return model.test_step(copy.copy(batch))

            return predict

        one: Any = model.data_preprocessor(pseudo_collate([samples[0]]), False)

        @torch.no_grad()
        def forward() -> object:
            return model(one["inputs"].to(device), one["data_samples"], mode="tensor")

        return Opened(model, ready, forward)

    def all_open(self, models: Mapping[str, TrainedModel]) -> tuple[dict[str, Any], Any]:
        """Return models by their titles, each with its config as the host's inference wants it, and their test set."""
        opened, samples = {}, None
        with self.entered():
            for title, trained in models.items():
                opened[title], samples = open_model(trained.config, trained.weights)
                opened[title].cfg = load_config(trained.config, imports=False)
        return opened, samples

    def step(self, job: Job) -> Step:
        trainer: MMTrainer = host_named(self.name).make_trainer()  # type: ignore[assignment]
        config = trainer.config_of(job)
        config.log_level, config.experiment_name = "ERROR", f"step{next(_steps)}"
        with self.entered():
            runner = make_runner(config)
            loader: Any = runner.train_loop.dataloader
            begin(runner, loader)
            batches = endless(loader)
            batch = next(batches)
        model: Any = runner.model

        def load() -> object:
            with self.entered():
                return next(batches)

        def save(folder: Path) -> TrainedModel:
            with self.entered():
                runner.save_checkpoint(str(folder), "begun.pth", save_optimizer=False, save_param_scheduler=False)
                weights, described = export_student(folder / "begun.pth", folder / STUDENT, force=True)
            return TrainedModel(str(described), str(weights))

        def step() -> None:
            # preprocessing changes the samples of a batch: segmentation pads their labels
            loss, _ = model.parse_losses(model(**model.data_preprocessor(copy.deepcopy(batch), True), mode="loss"))
            loss.backward()
            model.zero_grad()

        return Step(step, load, runner.max_iters, save)

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Enter the host's scope, without its messages, while the body runs."""
        cv2.setNumThreads(0)
        with silent(), DefaultScope.overwrite_default_scope(self.scope):
            yield

    def _dataset_meta(self, config: Config) -> Mapping[str, Any]:
        dataset = (config.get("test_dataloader") or config.val_dataloader)["dataset"]
        while "dataset" in dataset:
            dataset = dataset["dataset"]
        return dict(dataset.get("metainfo") or {})


class Collector(Hook):
    """A hook that collects a model's decisions during a test."""

    def metrics(self) -> dict[str, float]:
        """Return the figures that the host does not measure."""
        return {}

    @abstractmethod
    def decisions(self) -> Any:
        """Return the decisions; ``None`` without any item."""


def write_config(config: Config, path: Path) -> str:
    """Write a config, unless it is there already, and return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = config.pretty_text
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        with written_whole(path) as part:
            part.write_text(text, encoding="utf-8")
    return str(path)


def _use_data(config: Config, own: RunnerSetup, dataset: Dataset) -> None:
    """Make a config train and test on a data set, with its own pipelines, and its heads have the classes of the set.

    Args:
        config: the user's config, which is changed.
        own: the setup that knows the set.
        dataset: the set.
    """
    assert dataset.folder is not None
    root = dataset.folder.resolve()
    for part in ("train", "val", "test"):
        holder = config.get(f"{part}_dataloader")
        if holder is None:
            continue
        while "dataset" in holder["dataset"]:  # of a wrapper, such as RepeatDataset
            holder = holder["dataset"]
        pipeline = holder["dataset"].get("pipeline")
        holder["dataset"] = own.images(root, own.splits[part], train=part == "train")
        if pipeline is not None:
            holder["dataset"]["pipeline"] = pipeline
        if part != "train":
            config[f"{part}_evaluator"] = own.evaluator(root, own.splits[part])
    _set_classes(config.model, len(own.classes))


def _set_classes(model: Any, classes: int) -> None:
    """Set every head's number of classes."""
    for key, value in model.items() if isinstance(model, Mapping) else enumerate(model):
        if key == "num_classes" and isinstance(value, int) and value > 0:
            model[key] = classes
        elif isinstance(value, (dict, list)):
            _set_classes(value, classes)
