"""What the benchmark asks of plain PyTorch."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence, Sized
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from matplotlib.axes import Axes
from torch import Tensor, nn

from kdgraft.errors import DistillError
from kdgraft.fit import student_of, training_loss
from kdgraft.hosts import Job, TrainedModel
from kdgraft.plain import TRAINER, WEIGHTS, Task
from kdgraft.plans import PlannedRun
from kdgraft.sources.teacher import load_strictly, read_checkpoint
from kdgraft.training import pair_of

from ..core import peers
from ..core.data import pictures_of
from ..core.runs import CONFIG
from ..data.digits import CLASSES
from ..decisions import Decisions
from ..pictures import draw_grid
from ..spec import TEACHER, Benchmark, Model
from .base import BenchHost, Dataset, Opened, Step, Tested, endless

STEPS = 1000
"""The length of a training of a small model."""
TORCHDISTILL = f"{peers.__file__}:torchdistill_kd"
ARGUMENTS = ("width", "depth", "dropout", "rate", "mode", "mixup")
"""The arguments of a small model, which are those of :func:`kdgraft_bench.core.tasks.task`."""


class PlainBench(BenchHost):
    """The benchmark's part of plain PyTorch."""

    scores: ClassVar = {"accuracy": ("accuracy", 3)}
    lengths = ("steps",)
    models = ("conv", "mlp")
    peers = ("torchdistill_kd",)
    embedded = "hard digits"
    picture = "pictures"

    def named(self, found: Mapping[str, float]) -> dict[str, float]:
        """Return what the task measures, without its loss and its accuracy on the validation split."""
        return {name: float(value) for name, value in found.items() if name not in ("loss", "val")}

    def validated(self, metric: str) -> str:
        """Return the validation accuracy of the small models; tasks of the user name theirs as they like."""
        return "val" if metric == "accuracy" else metric

    def dataset(self, benchmark: Benchmark) -> Dataset:
        if all(model.config is not None for model in (benchmark.teacher, *benchmark.students.values())):
            if benchmark.data is not None:
                raise DistillError("tasks of plain PyTorch read their own data; leave data out")
            return Dataset("own data", None)
        if benchmark.data is None:
            return Dataset(self.embedded, Path())
        root = Path(benchmark.data)
        for split in ("train", "val"):
            pictures_of(split, str(root))  # says what is missing
        return Dataset(root.resolve().name, root, root)

    def config(self, model: Model, dataset: Dataset, benchmark: Benchmark, name: str) -> tuple[str, dict[str, Any]]:
        if model.config is not None:
            return model.config, {}
        told = self.known(model.settings, ARGUMENTS)
        options = {
            "net": model.settings["model"],
            "width": told.pop("width", 8),
            "steps": benchmark.iterations or STEPS,
            **({} if benchmark.batch is None else {"batch": benchmark.batch}),
            **told,
        }
        if benchmark.split != "test":
            options["split"] = benchmark.split
        return CONFIG, options | ({"data": str(dataset.real)} if dataset.real is not None else {})

    def peer(self, peer: Model, student: str, dataset: Dataset, benchmark: Benchmark) -> tuple[str, dict[str, Any]]:
        small = benchmark.students[student].config is None and benchmark.teacher.config is None
        if peer.settings.get("model") not in self.peers or not small:
            return super().peer(peer, student, dataset, benchmark)
        _, options = self.config(benchmark.students[student], dataset, benchmark, student)
        _, teacher = self.config(benchmark.teacher, dataset, benchmark, TEACHER)
        return TORCHDISTILL, {**options, "teacher": teacher, "teacher_weights": "{teacher.weights}"}

    def test(self, run: PlannedRun, trained: TrainedModel, dataset: Dataset, split: str) -> Tested:
        task, model = self._opened(run, trained)
        kept: list[tuple[Tensor, ...]] = []
        begun = 0
        with torch.no_grad():
            for inputs, labels in map(pair_of, task.tested or ()):
                confidence, predicted = model(inputs).float().softmax(-1).max(-1)
                kept.append((labels, predicted, confidence, torch.arange(begun, begun + len(labels))))
                begun += len(labels)
        if not kept:
            return Tested(self.named(trained.metrics))
        label, predicted, confidence, sample = (torch.cat(parts).numpy() for parts in zip(*kept, strict=True))
        classes = int(max(label.max(), predicted.max())) + 1
        names = CLASSES if classes <= len(CLASSES) and dataset.folder is not None else [*map(str, range(classes))]
        return Tested(
            self.named(trained.metrics), Decisions.of(names, label, predicted, confidence.astype(np.float64), sample)
        )

    def open(self, run: PlannedRun, trained: TrainedModel, dataset: Dataset) -> Opened:
        task, model = self._opened(run, trained)
        inputs, _ = pair_of(next(iter(task.tested or task.loader)))

        def ready(size: int) -> Callable[[], object]:
            batch = inputs[torch.arange(size) % len(inputs)]

            @torch.no_grad()
            def predict() -> object:
                return model(batch)

            return predict

        return Opened(model, ready, ready(1))

    def _opened(self, run: PlannedRun, trained: TrainedModel) -> tuple[Task, nn.Module]:
        """Return the task of a run, and its trained model on the CPU in eval mode."""
        with tempfile.TemporaryDirectory() as scratch:
            task, _ = TRAINER.build(Job(run.config, run.options, Path(scratch), 0))
        model = student_of(task.model)
        load_strictly(model, read_checkpoint(trained.weights), trained.weights, "student")
        return task, model.eval()

    def step(self, job: Job) -> Step:
        task, model = TRAINER.build(job)
        batches, views = endless(task.loader), task.settings.get("views")

        def load() -> tuple[Any, Any]:
            inputs, targets = pair_of(next(batches))
            return (inputs, targets) if views is None else views(inputs, targets)

        inputs, targets = load()
        model.train()

        def save(folder: Path) -> TrainedModel:
            torch.save(student_of(model).state_dict(), folder / WEIGHTS)
            return TrainedModel(job.config, str(folder / WEIGHTS), {}, dict(job.options))

        def step() -> None:
            training_loss(model, inputs, targets, task.loss).backward()
            model.zero_grad()

        loader = task.loader
        batches_of_an_epoch = len(loader) if isinstance(loader, Sized) else sum(1 for _ in loader)
        return Step(step, load, (job.stop or task.epochs) * batches_of_an_epoch, save)

    def draw(self, models: Mapping[str, TrainedModel], dataset: Dataset, samples: Sequence[int], path: Path) -> None:
        if dataset.folder is None:
            return
        pictures = pictures_of("test", str(dataset.real or ""))
        opened = {}
        for title, trained in models.items():
            run = PlannedRun(title, trained.config, options=trained.options)
            opened[title] = self._opened(run, trained)[1]
        rows = []
        for place in samples:
            shown = pictures.large[place]
            image = (shown - shown.min()) / (shown.max() - shown.min()).clamp_min(1e-6)
            truth = str(CLASSES[int(pictures.labels[place])])
            row = [(image.permute(1, 2, 0).numpy(), truth, truth)]
            for model in opened.values():
                with torch.no_grad():
                    share, found = model(pictures.small[place : place + 1]).softmax(-1)[0].max(0)
                row.append((row[0][0], f"{CLASSES[int(found)]}, {share:.0%}", truth))
            rows.append(row)

        def draw(axis: Axes, cell: tuple[Any, str, str]) -> None:
            image, said, truth = cell
            axis.imshow(image, cmap="gray_r" if image.shape[-1] == 1 else None)
            colour = "#1a7f4b" if said.partition(",")[0] == truth else "#b3362f"
            axis.text(0.5, -0.02, said, fontsize=7, color=colour, ha="center", va="top", transform=axis.transAxes)

        draw_grid(["truth", *opened], rows, draw, 1.15, path)
