"""Pictures of the experiments of ``kdgraft experiments``, mean ± standard deviation over seeds."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .claims import Figures
from .data import pictures_of
from .experiments.assistants import TEACHERS
from .experiments.hinton import NARROW, TEMPERATURES, WIDE
from .experiments.patience import LENGTHS, MODES
from .nets import CLASSES
from .report import PERCENT


def draw_temperature(figures: Figures, path: Path) -> None:
    """Draw the accuracy against the temperature, a panel for each width of the student."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for axis, width in zip(figure.subplots(1, 2), (NARROW, WIDE), strict=True):
        _line(axis, TEMPERATURES, [figures[f"{width} units, T = {t:g}"] for t in TEMPERATURES], "soft targets")
        _level(axis, figures[f"{width} units, hard"], "hard targets")
        axis.set_xscale("log")
        axis.set_xticks(TEMPERATURES, [f"{t:g}" for t in TEMPERATURES])
        axis.minorticks_off()
        axis.set(title=f"student of {width} units a layer", xlabel="temperature", ylabel="test accuracy (%)")
        _finish(axis)
    figure.savefig(path, dpi=130)


def draw_gap(figures: Figures, path: Path) -> None:
    """Draw the student's accuracy against the teacher's width, with no teacher and with an assistant as levels."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    _line(left, TEACHERS, [figures[f"taught by width {width}"] for width in TEACHERS], "taught by it")
    _level(left, figures["none"], "no teacher")
    _level(left, figures["assistant"], f"by an assistant that width {TEACHERS[-1]} taught", style=":", colour="C2")
    left.set(title="the student", xlabel="teacher's width (channels)", ylabel="test accuracy (%)")
    _line(right, TEACHERS, [figures[f"teacher of width {width}"] for width in TEACHERS], "teacher")
    right.set(title="the teacher itself", xlabel="teacher's width (channels)", ylabel="test accuracy (%)")
    for axis in (left, right):
        axis.set_xticks(TEACHERS)
        _finish(axis)
    figure.savefig(path, dpi=130)


def draw_patience(figures: Figures, path: Path) -> None:
    """Draw the accuracy of each way of teaching against the length of the training."""
    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axis = figure.subplots()
    for turn, mode in enumerate((*MODES, "mixup")):
        label = "consistent, with mixup" if mode == "mixup" else mode
        apart = [length * 1.03 ** (turn - 1.5) for length in LENGTHS]  # so that no bar hides another
        _line(axis, apart, [figures[f"{mode}, length {length:g}"] for length in LENGTHS], label)
    axis.set_xscale("log")
    axis.set_xticks(LENGTHS, [f"{length:g}" for length in LENGTHS])
    axis.minorticks_off()
    axis.set(
        title="what the teacher sees",
        xlabel="length of the training (1: that of a teacher)",
        ylabel="test accuracy (%)",
    )
    _finish(axis)
    figure.savefig(path, dpi=130)


def draw_methods(figures: Figures, path: Path) -> None:
    """Draw the accuracy of each method, and those of teacher and plain student as levels."""
    figure = Figure(figsize=(6.4, 3.8), layout="constrained")
    axis = figure.subplots()
    names = [name for name in figures if name != "teacher"]
    for place, name in enumerate(names):
        mean, sd = _moments(figures[name])
        axis.errorbar(mean, place, xerr=sd, fmt="o", capsize=3, color="C1" if name == "none" else "C0")
    mean, _ = _moments(figures["none"])
    axis.axvline(mean, color="C1", linestyle="--", linewidth=1)
    axis.set_yticks(range(len(names)), names)
    axis.invert_yaxis()
    axis.set(title=f"student; the teacher has {_moments(figures['teacher'])[0]:.1f} %", xlabel="test accuracy (%)")
    axis.grid(alpha=0.3)
    figure.savefig(path, dpi=130)


def draw_examples(path: Path, folder: str = "") -> None:
    """Draw some training pictures of every class, each at both resolutions."""
    pictures = pictures_of("train", folder)
    sets = [torch.nonzero(pictures.labels == label).flatten().tolist() for label in range(CLASSES)]
    chosen = [sets[place % CLASSES][place // CLASSES] for place in range(24)]
    figure = Figure(figsize=(9.6, 3.4), layout="constrained")
    axes = figure.subplots(4, 12)
    for place, picture in enumerate(chosen):
        row, column = divmod(place, 12)
        for turn, shown in enumerate((pictures.large, pictures.small)):
            axis = axes[2 * row + turn][column]
            image = shown[picture].permute(1, 2, 0).numpy()
            low, high = image.min(), image.max()
            axis.imshow((image - low) / (high - low), cmap="gray")
            axis.set_axis_off()
            if not turn:
                axis.set_title(int(pictures.labels[picture]), fontsize=9)
    figure.savefig(path, dpi=110)


PICTURES: Mapping[str, Callable[[Figures, Path], None]] = {
    "temperature": draw_temperature,
    "capacity_gap": draw_gap,
    "patience": draw_patience,
    "methods": draw_methods,
}
"""The picture of an experiment by the experiment's name."""


def _moments(values: Sequence[float]) -> tuple[float, float]:
    """Return mean and standard deviation in per cent; the latter is 0 for one seed."""
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return PERCENT * statistics.mean(values), PERCENT * spread


def _line(axis: Axes, places: Sequence[float], figures: Sequence[Sequence[float]], label: str) -> None:
    means, spreads = zip(*map(_moments, figures), strict=True)
    axis.errorbar(places, means, yerr=spreads, marker="o", capsize=3, label=label)


def _level(axis: Axes, values: Sequence[float], label: str, style: str = "--", colour: str = "C1") -> None:
    mean, spread = _moments(values)
    axis.axhline(mean, linestyle=style, color=colour, label=label)
    axis.axhspan(mean - spread, mean + spread, color=colour, alpha=0.12)


def _finish(axis: Axes) -> None:
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
