"""``kdgraft experiments``: the experiments of the literature on small nets, in plain PyTorch, with the published figures beside them.

The runs of all experiments are one plan for each seed; runs that several experiments share are trained once, and finished ones are
not repeated. Processes may share a folder if each has seeds of its own.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from tqdm import tqdm

from kdgraft.errors import DistillError, nearest
from kdgraft.files import digest
from kdgraft.hosts import TrainedModel
from kdgraft.plans import Plan, carry_out
from kdgraft.tables import print_rows

from ..data import describe
from ..results import Result, markdown, write_results
from ..timing import check_device
from . import batches, generators, nets, reading, specialists, tasks, training
from . import data as pictures
from .claims import Figures
from .data import pictures_of
from .experiments import EXPERIMENTS, Experiment
from .pictures import PICTURES, draw_examples
from .report import claim_rows, experiment_rows, figure_rows
from .runs import Runs

STEPS = 500
"""The steps of a training of length 1."""
REAL = ("methods",)
"""The experiments on a real set by default."""
NAMED = ("every", "weights")
"""The experiments that run only if they are named, or all are."""


def main(
    names: Sequence[str] = (),
    seeds: int = 1,
    out: str | Path = "runs/experiments",
    device: str = "cpu",
    first_seed: int = 0,
    split: str = "test",
    steps: int | None = None,
    data: str | None = None,
) -> list[Result]:
    """Run experiments, print their table, and write ``results.csv``, ``table.md`` and pictures to ``out``.

    Args:
        names: the experiments, ``["all"]`` for all; by default all but the comparisons of every method and of weights, on a real set
            only the short comparison of methods.
        seeds: the number of seeds.
        out: the folder of the results.
        device: ``"cpu"`` or ``"cuda"``; with ``"cpu"`` no GPU is used.
        first_seed: the first seed.
        split: the split for the test; ``"val"`` for tuning, with other seeds than those of the table.
        steps: the steps of a training of length 1; 500 by default.
        data: the folder of a real set with ``train/CLASS/*.jpg`` and ``val/CLASS/*.jpg``, ten classes.

    Raises:
        DistillError: an experiment, the split or the device is unknown, or the real set has another layout.
    """
    if split not in ("val", "test"):
        raise DistillError(f"split must be 'val' or 'test', got {split!r}")
    check_device(device)
    usual = list(REAL) if data else [name for name in EXPERIMENTS if name not in NAMED]
    chosen = list(EXPERIMENTS) if list(names) == ["all"] else list(names) or usual
    for name in chosen:
        if name not in EXPERIMENTS:
            raise DistillError(f"no experiment is called {name!r}{nearest(name, EXPERIMENTS)}")
    if data:
        chosen = _on_real(chosen, list(names) == ["all"])
        for each in ("train", "val"):  # before anything is trained
            pictures_of(each, data)
    folder, steps, started = Path(out), steps or STEPS, time.perf_counter()
    runs = Runs(steps, split=split if split != "test" else "", data=data or "")
    labels = {EXPERIMENTS[name]: EXPERIMENTS[name].plan(runs) for name in chosen}
    place = folder / "runs" / _key(steps, split, data, device)
    found: dict[int, Mapping[str, TrainedModel]] = {}
    results: list[Result] = []
    dataset = Path(data).resolve().name if data else "hard digits"
    for seed in range(first_seed, first_seed + seeds):
        with _alone(device):
            found[seed] = _carried_out(runs.plan(place, seed))
        results = list(_results(labels, found, dataset))
        write_results(results, folder / "results.csv")
    _report({experiment: _figures(named, found) for experiment, named in labels.items()}, folder, dataset, split)
    draw_examples(folder / "examples.png", data or "")
    print(f"results, pictures and runs in {folder} ({time.perf_counter() - started:.0f} s)")
    return results


def _on_real(names: list[str], all_of: bool) -> list[str]:
    """Return the experiments that can be made on a real set; refuse others that were named one by one."""
    others = [name for name in names if not EXPERIMENTS[name].real]
    if others and not all_of:
        raise DistillError(f"{', '.join(others)}: only for the embedded digits; leave it out, or leave out --data")
    return [name for name in names if name not in others]


_CODE = (pictures, batches, nets, tasks, specialists, generators, reading, training)


def _key(steps: int, split: str, data: str | None, device: str) -> str:
    """Return a name for runs of these settings, this data and this code of the trainings."""
    code = [Path(str(module.__file__)).read_text(encoding="utf-8") for module in _CODE]
    return digest([code, steps, split, describe(Path(data)) if data else "", device, torch.__version__])[:12]


@contextmanager
def _alone(device: str) -> Iterator[None]:
    """Train on one thread, which is fastest for small nets, and on no GPU unless asked; restore both afterwards."""
    threads, key = torch.get_num_threads(), "ACCELERATE_USE_CPU"
    before = os.environ.get(key)
    torch.set_num_threads(1)
    if device == "cpu":
        os.environ[key] = "true"
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        if device == "cpu":
            os.environ.pop(key) if before is None else os.environ.update({key: before})


def _carried_out(plan: Plan) -> dict[str, TrainedModel]:
    """Carry out the plan of one seed under a progress bar."""
    (seed,) = plan.seeds
    with tqdm(total=len(plan.runs), desc=f"seed {seed}", unit="run", mininterval=1.0) as bar:

        def tell(line: str) -> None:
            name, _, doing = line.partition(" ")
            if any(f": {word}" in doing for word in ("done", "finished")) or "is chosen" in doing:
                bar.update()
            bar.set_postfix_str(name, refresh=False)

        found = carry_out(plan, tell=tell)
    return {name: model for (name, _), model in found.items()}


def _figures(labels: Mapping[str, str], found: Mapping[int, Mapping[str, TrainedModel]]) -> Figures:
    return {label: [models[run].metrics["accuracy"] for models in found.values()] for label, run in labels.items()}


def _results(
    labels: Mapping[Experiment, Mapping[str, str]], found: Mapping[int, Mapping[str, TrainedModel]], dataset: str
) -> Iterator[Result]:
    """Yield a row for each label of each experiment and seed."""
    for seed, models in found.items():
        for experiment, runs in labels.items():
            for label, run in runs.items():
                options = models[run].options
                net = f"{options['net']} {options['width']}"
                value = models[run].metrics["accuracy"]
                yield Result("core", dataset, net, f"{experiment.name}: {label}", seed, "accuracy", value)


def _report(experiments: Mapping[Experiment, Figures], folder: Path, dataset: str, split: str) -> None:
    count = len(next(iter(next(iter(experiments.values())).values())))
    title = f"{dataset}, {split} split, {count} seed{'s' if count > 1 else ''}"
    claims = claim_rows(experiments)
    print_rows(claims, f"\n{title}")
    tables = [markdown(rows) for rows in (experiment_rows(experiments), claims, figure_rows(experiments))]
    (folder / "table.md").write_text("\n\n".join([title, *tables]) + "\n", encoding="utf-8")
    for experiment, measured in experiments.items():
        if experiment.name in PICTURES:
            PICTURES[experiment.name](measured, folder / f"{experiment.name}.png")
