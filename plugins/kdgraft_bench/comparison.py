"""Comparison of a teacher, a plain student and distilled students over seeds: one runner for every host.

A :class:`Comparison` provides a host's models, trainings, metrics and pictures; :func:`run` does everything else. Finished
trainings are not repeated, and several processes may share one folder.
"""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from torch import Tensor
from tqdm import tqdm

from kdgraft.errors import DistillError
from kdgraft.files import digest
from kdgraft.tables import print_rows

from .finished import RECORD, Finished, alone, describe
from .pictures import Curves, draw_curves
from .report import pictures_of, read_runs, write_report
from .results import Result, gap_closed, markdown, summary, write_results
from .timing import check_device, interleave

# For a set without a third split the tables are of val, so that nothing may be tuned on it.
TWO_SPLITS = {"train": "train", "val": "val", "test": "val"}


@dataclass(frozen=True)
class Training:
    """One training of a comparison.

    Attributes:
        method: ``"teacher"``, ``"plain"`` or a recipe's name.
        seed: the random seed of the whole training.
        iterations: the number of iterations.
        split: the split for the test, ``"val"`` or ``"test"``.
        device: ``"cpu"`` or ``"cuda"``.
        data: the folder of the dataset.
        root: the folder of the comparison.
    """

    method: str
    seed: int
    iterations: int
    split: str
    device: str
    data: Path
    root: Path

    @property
    def title(self) -> str:
        """The training's name in messages."""
        return f"{self.method} (seed {self.seed})"

    @property
    def folder(self) -> Path:
        """The folder of the checkpoints and the record."""
        return self.root / f"seed{self.seed}" / self.method

    @property
    def teacher(self) -> Training:
        """The training of the teacher that this one learns from."""
        return replace(self, method="teacher")

    @contextmanager
    def progress(self) -> Iterator[tqdm]:
        """Show a bar of the iterations while the body runs."""
        with tqdm(total=self.iterations, desc=f"{self.title:<28}", mininterval=1.0) as bar:
            yield bar


@dataclass
class Outcome:
    """A trained model and its figures.

    Attributes:
        training: how it was trained.
        metrics: name -> value on the tested split.
        run: the host's Runner or Trainer, with the model in ``run.model``.
        curves: name -> (iteration, value): losses, ``distill.*``, and ``validation``.
    """

    training: Training
    metrics: dict[str, float]
    run: Any = None
    curves: Curves = field(default_factory=dict)

    @property
    def method(self) -> str:
        """The method that it was trained with."""
        return self.training.method


@dataclass(frozen=True, kw_only=True)
class Comparison(ABC):
    """One teacher, one student, some recipes and one dataset: everything that depends on the host.

    Attributes:
        task: the host's name.
        dataset: the dataset's name in tables and results.
        teacher, student: (name, the host's description of the model).
        recipes: settings of a distilled model by name.
        default: the recipes to run by default; a comparison without any runs only where one of its recipes is named.
        scores: metric -> (its name in the host, digits in the table); the first metric measures the gap.
        iterations: the iterations of every training.
        evaluations: the number of evaluations of a training on the validation split.
        rounds: the number of rounds in which steps are timed.
        splits: ``train``, ``val``, ``test`` -> the split's name in the dataset.
        tested: the name of the test split in the table's title.
        picture: the file of :meth:`draw`.
        folder: the folder of the results below the demo's own; empty for the first comparison.
        one_scale: the teacher's scores are on the scale of the students', so that there is a gap between them to close.
    """

    task: str
    dataset: str
    teacher: tuple[str, Any]
    student: tuple[str, Any]
    recipes: Mapping[str, Mapping[str, Any]]
    default: tuple[str, ...]
    scores: Mapping[str, tuple[str, int]]
    iterations: int
    evaluations: int = 6
    rounds: int = 20
    splits: Mapping[str, str] = field(default_factory=lambda: {name: name for name in ("train", "val", "test")})
    tested: str
    picture: str
    folder: str = ""
    one_scale: bool = True
    costs: ClassVar[Mapping[str, int]]
    """The costs of a model: metric -> digits in the table."""

    @property
    def methods(self) -> Sequence[str]:
        """The names of everything that can be compared with the plain student."""
        return list(self.recipes)

    @property
    def metric(self) -> str:
        """The metric that measures the gap between plain student and teacher."""
        return next(iter(self.scores))

    def figures(self, found: Mapping[str, Any]) -> dict[str, float]:
        """Pick the metrics out of a host's evaluation; hosts leave a metric out where a model finds nothing at all."""
        return {metric: float(found.get(key, 0.0)) for metric, (key, _) in self.scores.items()}

    def every(self, iterations: int) -> int:
        """Return the number of iterations from one evaluation on the validation split to the next."""
        return max(iterations // self.evaluations, 1)

    @abstractmethod
    def entered(self, device: str) -> AbstractContextManager[object]:
        """Make the host build models on ``device``, without its messages, while the body runs."""

    @abstractmethod
    def settings(self, training: Training) -> Any:
        """Return the plain data, independent of file locations, that a training depends on beside dataset and device."""

    @abstractmethod
    def weights(self, training: Training) -> Path:
        """Return the file with the weights of a finished training."""

    @abstractmethod
    def train(self, training: Training) -> Outcome:
        """Train a model through the host, save it and evaluate it."""

    @abstractmethod
    def restore(self, training: Training) -> Any:
        """Return the Runner or Trainer of a finished training, as it was at its end."""

    @abstractmethod
    def batch(self, run: Any) -> Any:
        """Return one training batch."""

    def batches(self, runs: Sequence[Any]) -> list[Any]:
        """Return a training batch for each model: the same for all."""
        return [self.batch(runs[0])] * len(runs)

    @abstractmethod
    def loss(self, run: Any, batch: Any) -> Tensor:
        """Return the loss of a training step."""

    @abstractmethod
    def draw(self, outcomes: Sequence[Outcome], path: Path) -> None:
        """Draw the outputs of the models of one seed."""


def run(
    comparisons: Sequence[Comparison],
    write_data: Callable[[Path], Path],
    out: str | Path,
    *,
    seeds: int = 1,
    recipes: str = "default",
    device: str = "cpu",
    iterations: int | None = None,
    first_seed: int = 0,
    split: str = "test",
) -> list[Result]:
    """Train everything, print the tables and write ``results.csv``, ``table.md``, ``report.html`` and pictures to ``out``.

    Trainings that finished in ``out`` before with the same settings are reused. Several processes may work in one folder at a
    time, best on different seeds; the same call with all seeds then writes their table.

    Args:
        comparisons: the comparisons; those without any of the named recipes are left out.
        write_data: makes or finds the dataset in a folder, and returns the folder of the dataset.
        out: the folder of the results.
        seeds: the number of seeds.
        recipes: ``"default"``, ``"all"``, ``"none"`` (teachers and plain students alone), or names separated by commas.
        device: ``"cpu"`` or ``"cuda"``; with ``"cpu"`` no GPU is used.
        iterations: the iterations of every training; by default the comparisons' own.
        first_seed: the first seed.
        split: the split for the test; use ``"val"`` for tuning (with other seeds than those of the table).

    Raises:
        DistillError: the recipe, the split or the device is unknown.
    """
    if split not in ("val", "test"):
        raise DistillError(f"split must be 'val' or 'test', got {split!r}")
    check_device(device)
    chosen = choose(recipes, list(dict.fromkeys(name for each in comparisons for name in each.methods)))
    folder = Path(out)
    with alone(folder / "data.lock", "data"):
        data = write_data(folder / "data")
    results: list[Result] = []
    for comparison in comparisons:
        wanted = comparison.default if recipes == "default" else chosen
        names = [name for name in wanted if name in comparison.methods]
        if names or (recipes == "none" and comparison.default):
            steps = iterations or comparison.iterations
            teacher = Training("teacher", first_seed, steps, split, device, data, folder / comparison.folder)
            with comparison.entered(device):
                results += compare(comparison, teacher, names, range(first_seed, first_seed + seeds))
    return results


def choose(recipes: str, known: Sequence[str]) -> list[str]:
    """Return the names in a list separated by commas, all for ``"default"`` and ``"all"``, and none for ``"none"``."""
    if recipes in ("default", "all", "none"):
        return [] if recipes == "none" else list(known)
    names = [name.strip() for name in recipes.split(",") if name.strip()]
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise DistillError(f"the demo has no recipe {', '.join(map(repr, unknown))}; known: {', '.join(known)}")
    return names


def compare(comparison: Comparison, teacher: Training, names: Sequence[str], seeds: Sequence[int]) -> list[Result]:
    """Train with each seed in turn, and write the results after each, so that an interrupted run keeps its results.

    Args:
        comparison: the comparison.
        teacher: the training of the teacher with any seed.
        names: the methods besides teacher and plain student.
        seeds: the seeds; pictures are of the first one.
    """
    started = time.perf_counter()
    folder, results = teacher.root, []
    world = [describe(teacher.data), teacher.device]
    for seed in seeds:
        trainings = [replace(teacher, method=method, seed=seed) for method in ("teacher", "plain", *names)]
        outcomes = [train_once(comparison, training, world) for training in trainings]
        for outcome, seconds in zip(outcomes, time_steps(comparison, outcomes), strict=True):
            outcome.metrics["step (ms)"] = seconds * 1e3
            model = (comparison.teacher if outcome.method == "teacher" else comparison.student)[0]
            known = (comparison.task, comparison.dataset, model, outcome.method, seed)
            results += [Result(*known, name, value) for name, value in outcome.metrics.items()]
        write_results(results, folder / "results.csv")
        if seed == seeds[0]:
            comparison.draw(outcomes, folder / comparison.picture)
            draw_curves({o.method: o.curves for o in outcomes}, comparison.metric, folder / "curves.png")
    tested = comparison.tested if teacher.split == "test" else f"{teacher.split} split"
    title = f"\n{comparison.dataset}, {tested}, {len(seeds)} seed{'s' if len(seeds) > 1 else ''}"
    digits = {metric: digits for metric, (_, digits) in comparison.scores.items()}
    rows = summary(results, {**digits, **comparison.costs})
    print_rows(rows, title)
    (folder / "table.md").write_text(markdown(rows) + "\n")
    for name in names if comparison.one_scale else ():
        closed = gap_closed(results, comparison.metric, name)
        told = "has no gap to close" if math.isnan(closed) else f"closes {closed:.0%} of the gap"
        print(f"{name} {told} from plain student to teacher")
    if names and comparison.one_scale:
        print(write_report(read_runs([str(folder)]), folder / "report.html", pictures=pictures_of([str(folder)])))
        print(f"report in {folder / 'report.html'}")
    print(f"results, pictures and checkpoints in {folder} ({time.perf_counter() - started:.0f} s)")
    return results


def train_once(comparison: Comparison, training: Training, world: Any) -> Outcome:
    """Train a method, or restore the finished training in its folder if it had the same settings.

    Args:
        comparison: the comparison.
        training: the training.
        world: other data that the result depends on: the dataset's files and the device.
    """
    settings = digest([comparison.settings(training), world])
    folder = training.folder
    with alone(folder.with_name(f"{training.method}.lock"), training.title):
        found = Finished.read(folder, settings)
        if found is None or not comparison.weights(training).is_file():
            (folder / RECORD).unlink(missing_ok=True)
            outcome = comparison.train(training)
            Finished(settings, outcome.metrics, outcome.curves).write(folder)
            return outcome
    print(f"{training.title}: taken from {folder}, which was trained with these settings")
    return Outcome(training, found.metrics, comparison.restore(training), found.curves)


def time_steps(comparison: Comparison, outcomes: Sequence[Outcome]) -> list[float]:
    """Return the median seconds of a training step (forward, loss, backward) of each model, timed in turn on its batch.

    The statistics of batch norms, which steps change, are restored afterwards, and the models are left as they predict.
    """

    def step(run: Any, batch: Any) -> Callable[[], None]:
        run.model.train()

        def once() -> None:
            comparison.loss(run, batch).backward()
            run.model.zero_grad()

        return once

    models = [outcome.run.model for outcome in outcomes]
    before = [{name: buffer.clone() for name, buffer in model.named_buffers()} for model in models]
    device = next(models[0].parameters()).device.type
    batches = comparison.batches([outcome.run for outcome in outcomes])
    steps = {one.method: step(one.run, batch) for one, batch in zip(outcomes, batches, strict=True)}
    seconds = interleave(steps, comparison.rounds, device=device)
    for model, buffers in zip(models, before, strict=True):
        model.eval()
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])
    return [float(np.median(seconds[outcome.method])) for outcome in outcomes]
