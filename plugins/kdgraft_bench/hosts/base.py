"""The interface between the benchmark and a host."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from kdgraft.errors import DistillError, nearest
from kdgraft.hosts import Job, TrainedModel
from kdgraft.plans import PlannedRun

from ..decisions import Decisions
from ..spec import Benchmark, Model


@dataclass(frozen=True)
class Dataset:
    """The data of a benchmark.

    Attributes:
        name: its name in tables.
        folder: the folder of its files; ``None`` where the configs name their own data.
        real: the folder that the user named; ``None`` for the embedded set.
    """

    name: str
    folder: Path | None
    real: Path | None = None


@dataclass(frozen=True)
class Tested:
    """A model's figures on the tested split.

    Attributes:
        metrics: name -> value.
        decisions: its decisions on each item; ``None`` where the host cannot tell them.
    """

    metrics: Mapping[str, float]
    decisions: Decisions | None = None


@dataclass(frozen=True)
class Opened:
    """A plain model, ready to predict.

    Attributes:
        model: the model, in eval mode.
        run: batch size -> a function that predicts a batch of tested samples of this size as in use.
        flops: a function that runs one forward of the model alone on one sample, for the count of its operations.
    """

    model: nn.Module
    run: Callable[[int], Callable[[], object]]
    flops: Callable[[], object]


@dataclass(frozen=True)
class Step:
    """The training step of a run that has not begun.

    Attributes:
        run: the training step on one batch, always the same: forward, loss and backward.
        load: a function that draws the next batch.
        count: the number of steps of the whole training.
        save: a function that writes the plain model to a folder, for runs that need one as their teacher or start from it.
    """

    run: Callable[[], None]
    load: Callable[[], object]
    count: int
    save: Callable[[Path], TrainedModel]


def endless(loader: Iterable[Any]) -> Iterator[Any]:
    """Yield the batches of a loader over and over."""
    while True:
        yield from loader


class BenchHost(ABC):
    """The benchmark's part of a host: data, small models, tests, and steps to time.

    Attributes:
        scores: metric -> (its name in the host, digits); the first one decides unless the benchmark names another.
        lengths: the options of a config that hold the length of a training, in iterations.
        models: the names of the small models.
        peers: the names of other packages' distillation.
        embedded: the name of the embedded data set.
        of_embedded: the arguments of small models that choose from the embedded set.
        picture: the name of the picture of :meth:`draw`.
    """

    scores: ClassVar[Mapping[str, tuple[str, int]]]
    lengths: ClassVar[tuple[str, ...]]
    models: ClassVar[tuple[str, ...]]
    peers: ClassVar[tuple[str, ...]] = ()
    embedded: ClassVar[str]
    of_embedded: ClassVar[tuple[str, ...]] = ()
    picture: ClassVar[str] = ""

    @abstractmethod
    def dataset(self, benchmark: Benchmark) -> Dataset:
        """Return the data set, with its files written or checked.

        Raises:
            DistillError: a file of a real set is missing or cannot be read.
        """

    @abstractmethod
    def config(self, model: Model, dataset: Dataset, benchmark: Benchmark, name: str) -> tuple[str, dict[str, Any]]:
        """Return the config that trains a model, and options of it.

        The config of a small model, or of the user's on another data set, is written to ``out/configs``.

        Raises:
            DistillError: an argument of the model is unknown.
        """

    def peer(self, peer: Model, student: str, dataset: Dataset, benchmark: Benchmark) -> tuple[str, dict[str, Any]]:
        """Return the config that trains a student by another package's code, and options of it.

        Raises:
            DistillError: the benchmark knows no such peer in this host.
        """
        if peer.config is None:
            known = f"; there are {', '.join(self.peers)}" if self.peers else "; give a config"
            raise DistillError(f"no peer is called {peer.settings['model']!r}{known}")
        return peer.config, {}

    @abstractmethod
    def test(self, run: PlannedRun, trained: TrainedModel, dataset: Dataset, split: str) -> Tested:
        """Test a finished run."""

    @abstractmethod
    def open(self, run: PlannedRun, trained: TrainedModel, dataset: Dataset) -> Opened:
        """Build the plain model of a finished run."""

    @abstractmethod
    def step(self, job: Job) -> Step:
        """Build what a run trains, and return its training step."""

    def texts(
        self, run: PlannedRun, trained: TrainedModel, teacher: TrainedModel, dataset: Dataset, split: str, count: int
    ) -> Mapping[str, float]:
        """Return figures of texts that a language model writes by itself, by the measure of its teacher.

        Args:
            run, trained: the model.
            teacher: the teacher.
            dataset, split: what the texts begin as.
            count: the number of texts.
        """
        raise NotImplementedError  # a benchmark of another host that asks for them is refused when it is read

    def draw(self, models: Mapping[str, TrainedModel], dataset: Dataset, samples: Sequence[int], path: Path) -> None:
        """Draw the outputs of models, by their titles, on tested samples, by their places; a host without a picture need not."""
        raise NotImplementedError

    def named(self, found: Mapping[str, float]) -> dict[str, float]:
        """Return a host's evaluation under the names of the table; a metric that the host leaves out is 0: nothing was found."""
        if found and not any(key in found for key, _ in self.scores.values()):
            return {key: float(value) for key, value in found.items()}
        return {metric: float(found.get(key, 0.0)) for metric, (key, _) in self.scores.items()}

    def validated(self, metric: str) -> str:
        """Return the name of a metric of the table among those that a training measures on the validation split."""
        return self.scores[metric][0] if metric in self.scores else metric

    def length(self, model: Model, benchmark: Benchmark) -> dict[str, Any]:
        """Return the options that set the length of a training, where the benchmark sets it; the small models' configs have it already."""
        if benchmark.iterations is None or model.config is None:
            return {}
        return dict.fromkeys(self.lengths, benchmark.iterations)

    def on(self, benchmark: Benchmark, dataset: Dataset) -> Benchmark:
        """Return the benchmark on this data: on a real set, models without what chooses from the embedded one."""
        if dataset.real is None:
            return benchmark
        students = {name: model.without(self.of_embedded) for name, model in benchmark.students.items()}
        return replace(benchmark, teacher=benchmark.teacher.without(self.of_embedded), students=students)

    def known(self, settings: Mapping[str, Any], arguments: Sequence[str]) -> dict[str, Any]:
        """Return the arguments of a small model.

        Raises:
            DistillError: there is no such model, or it has no such argument.
        """
        name = settings["model"]
        if name not in self.models:
            raise DistillError(
                f"no small model is called {name!r}{nearest(str(name), self.models)}; give a config instead"
            )
        for key in settings:
            if key != "model" and key not in arguments:
                raise DistillError(f"the model {name} takes no {key!r}{nearest(key, arguments)}")
        return {key: value for key, value in settings.items() if key != "model"}
