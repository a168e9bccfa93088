"""What the demos of every task share: seeds in turn, one table, one result file, pictures of the first seed."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

import numpy as np

from .errors import DistillError
from .report import Result, gap_closed, markdown, print_rows, summary, write_results


@dataclass
class Outcome:
    """A trained model and what there is to say of it.

    Attributes:
        method: ``"teacher"``, ``"plain"`` or a recipe's name.
        seed: of its training.
        metrics: name -> value on the tested split.
        curves: name -> (iteration, value): losses, ``distill.*``, and ``validation``.
    """

    method: str
    seed: int
    metrics: dict[str, float]
    curves: dict[str, list[tuple[int, float]]] = field(default_factory=dict, kw_only=True)


class Progress:
    """One line, rewritten: what trains, how far, the loss, the validation score.

    Args:
        title: what trains.
        total: iterations.
        metric: the validation score's name.
        terminal: where it is shown.
    """

    def __init__(self, title: str, total: int, metric: str, terminal: TextIO) -> None:
        self.title, self.total, self.metric, self.terminal = title, total, metric, terminal
        self.every = max(total // 60, 1)
        self.start = time.perf_counter()

    def due(self, done: int) -> bool:
        """Whether the line is to be rewritten after ``done`` iterations."""
        return done % self.every == 0 or done == self.total

    def show(self, done: int, loss: float, score: float | None) -> None:
        """Rewrites the line; ends it with the last iteration."""
        seconds = time.perf_counter() - self.start
        left = seconds / done * (self.total - done)
        shown = f"  val {self.metric} {score:.3f}" if score is not None else ""
        print(
            f"\r{self.title:<28} {done:>5}/{self.total}  loss {loss:6.3f}{shown}  {seconds:4.0f} s, {left:4.0f} s left ",
            end="\n" if done == self.total else "",
            file=self.terminal,
            flush=True,
        )


def choose(recipes: str, known: Sequence[str], default: Sequence[str]) -> list[str]:
    """Names from ``"default"``, ``"all"``, ``"none"`` or a list with commas between."""
    if recipes in ("all", "none"):
        return list(known) if recipes == "all" else []
    names = list(default) if recipes == "default" else [n.strip() for n in recipes.split(",") if n.strip()]
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise DistillError(f"the demo has no recipe {', '.join(map(repr, unknown))}; known: {', '.join(known)}")
    return names


def check_split(split: str) -> None:
    """Raises a :class:`DistillError` unless it is ``"val"`` or ``"test"``."""
    if split not in ("val", "test"):
        raise DistillError(f"split must be 'val' or 'test', got {split!r}")


def compare(
    task: str,
    dataset: str,
    folder: Path,
    seeds: Sequence[int],
    train: Callable[[int], Sequence[Outcome]],
    *,
    models: Callable[[str], str],
    digits: Mapping[str, int],
    draw: Callable[[Sequence[Outcome]], None],
    tested: str,
) -> list[Result]:
    """Trains with every seed, prints the table and writes ``results.csv``, ``table.md`` and the pictures to ``folder``.

    Args:
        task, dataset: as they stand in the results.
        seeds: trained in turn; the results are written after each, so that an interrupted run keeps what it has.
        train: trains teacher, plain student and recipes with one seed.
        models: method -> the name of its model.
        digits: metric -> digits in the table; the first metric is the main one.
        draw: draws what the models of the first seed do.
        tested: what was tested on, for the title.
    """
    started = time.perf_counter()
    results: list[Result] = []
    metric = next(iter(digits))
    for seed in seeds:
        outcomes = train(seed)
        results += [
            Result(task, dataset, models(outcome.method), outcome.method, seed, name, value)
            for outcome in outcomes
            for name, value in outcome.metrics.items()
        ]
        write_results(results, folder / "results.csv")
        if seed == seeds[0]:
            draw(outcomes)
            draw_curves(outcomes, metric, folder / "curves.png")
    rows = summary(results, digits)
    print_rows(rows, title=f"\n{dataset}, {tested}, {len(seeds)} seed{'s' if len(seeds) > 1 else ''}")
    (folder / "table.md").write_text(markdown(rows) + "\n")
    for name in dict.fromkeys(result.method for result in results):
        if name not in ("teacher", "plain"):
            closed = gap_closed(results, metric, name)
            told = "has no gap to close" if math.isnan(closed) else f"closes {closed:.0%} of the gap"
            print(f"{name} {told} from plain student to teacher")
    print(f"results, pictures and checkpoints in {folder} ({time.perf_counter() - started:.0f} s)")
    return results


def draw_curves(runs: Sequence[Outcome], metric: str, path: Path) -> None:
    """The host's loss and the validation score of every model, the distillation terms, and a critic's figures if there is one."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    apart = (".loss", ".raw", ".weight")  # a critic's figures are the others
    watched = [key for run in runs for key in run.curves if key.startswith("distill.") and not key.endswith(apart)]
    figure, axes = plt.subplots(1, 4 if watched else 3, figsize=(17 if watched else 13, 3.8))
    left, middle, right, *rest = axes
    for axis in (left, middle) if len(runs) > 10 else ():
        axis.set_prop_cycle(color=plt.get_cmap("tab20").colors)
    right.set_prop_cycle(color=plt.get_cmap("tab20").colors)
    for run in runs:
        host = [key for key in run.curves if "loss" in key and key != "loss" and not key.startswith("distill.")]
        steps = [step for step, _ in run.curves[host[0]]]
        total = np.sum([[value for _, value in run.curves[key]] for key in host], axis=0)
        left.plot(steps, total, label=run.method)
        if "validation" in run.curves:
            middle.plot(*zip(*run.curves["validation"], strict=True), marker=".", label=run.method)
        for key, points in run.curves.items():
            if key.startswith("distill.") and not key.endswith(apart[1:]):
                label = f"{run.method}: {key.removeprefix('distill.').removesuffix('.loss')}"
                axis = right if key.endswith(".loss") else rest[0]
                axis.plot(*zip(*points, strict=True), label=label)
    left.set(title="host's training loss", xlabel="iteration", yscale="log")
    middle.set(title=f"{metric} on the validation split", xlabel="iteration")
    # A critic's term may be negative.
    right.set(title="distillation terms (weighted)", xlabel="iteration")
    right.set_yscale("symlog", linthresh=1e-2)
    if rest:
        rest[0].set(title="the critic", xlabel="iteration")
    for axis in axes:
        axis.grid(alpha=0.3)
        labels = len(axis.get_legend_handles_labels()[0])
        if labels > 6:  # beside the lines there is no room
            axis.legend(fontsize=6, loc="upper center", bbox_to_anchor=(0.5, -0.32), ncol=2)
        elif labels:
            axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=130, bbox_inches="tight")
    plt.close(figure)
