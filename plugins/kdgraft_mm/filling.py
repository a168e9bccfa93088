"""Filling a store with the outputs of teachers on the views of a training: ``kdgraft cache``."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from torch.utils.data import DataLoader
from tqdm import tqdm

from kdgraft.errors import DistillError, check_number
from kdgraft.files import digest, held
from kdgraft.isolation import isolated_rng
from kdgraft.store import Index, Store

from .configs import is_distilled, type_name
from .replaying import ReplayViews, replay, replaying, sampler_of
from .resuming import safe_loading
from .run import begin, config_mistakes, data_on_this_machine, make_runner, read_config, unwrapped
from .sources import identity_of, teacher_specs
from .stored import ERRORS
from .writing import Batched, Values, Writer, columns_of

PART = 32 << 20
"""The bytes of outputs that a part has at least, if there are that many."""


def fill(
    path: str,
    folder: str | Path | None = None,
    options: Sequence[str] = (),
    *,
    epochs: int | None = None,
    values: Values = "float16",
    trusted: bool = False,
) -> dict[str, Store]:
    """Run the teachers of a config on the views of its training, and store what its terms read of them.

    A teacher with a ``store`` is stored there, and a single one without in ``folder``. Nothing is trained. Several processes
    (``torchrun``, ``accelerate launch``) share the work. A call that was interrupted goes on where it was, and ends with the same
    files, byte for byte.

    Args:
        path: the config file of the training, with the teachers' checkpoints.
        folder: the folder of the store, instead of the config's own.
        options: ``KEY=VALUE`` overrides.
        epochs: the number of views of each image; by default as many as the training has passes over the data.
        values: the type of the numbers; int8 has one unit for each channel of a map.
        trusted: read checkpoints with arbitrary pickled objects.

    Returns:
        The stores, by the name of the teacher.

    Raises:
        DistillError: outputs cannot be stored, views cannot be replayed, or a folder has a store of something else.
    """
    if epochs is not None:
        check_number("cache", "--epochs", epochs, 1, whole=True)
    config = read_config(path, options)
    if not is_distilled(config.model):
        raise DistillError(f"{path} trains a plain {type_name(config.model)}; nothing is read of a teacher")
    specs = teacher_specs(config.model)
    folders = _folders(specs, folder)
    for spec in specs.values():
        spec.pop("store", None)
    config.randomness = {"seed": 0, **(config.get("randomness") or {})}
    made: dict[str, Store] = {}
    with safe_loading(trusted), tempfile.TemporaryDirectory() as scratch, _alone() as (process, processes):
        config.work_dir, config.log_level = scratch, "WARNING"
        config.experiment_name = f"cache {scratch}"
        filler = _Filler(config, path, epochs)
        for name, where in folders.items():
            with held(where) if process == 0 else nullcontext():
                made[name] = filler.fill(name, where, identity_of(specs[name]), values, (process, processes))
            if process == 0:
                print(_summary(made[name], name, where))
    return made


def _folders(specs: Mapping[str, Any], folder: str | Path | None) -> dict[str, str]:
    """Return the folder of each teacher that is to be stored."""
    found = {name: str(spec["store"]) for name, spec in specs.items() if spec.get("store") is not None}
    if folder is not None:
        one = list(found or specs)
        if len(one) != 1:
            raise DistillError(
                f"--out is the folder of one teacher, and there are {', '.join(one) or 'none'}; give each store='…' in the config"
            )
        found = {one[0]: str(folder)}
    if not found:
        raise DistillError("name a folder: --out FOLDER, or teacher=dict(…, store='FOLDER') in the config")
    wrong = [
        name
        for name in found
        if "config" not in specs[name] and specs[name].get("type") in (None, "Itself", "Peer", "Peers", "Ensemble")
    ]
    if wrong:
        raise DistillError(f"a store holds the outputs of a frozen teacher, and {wrong[0]!r} is none")
    return found


@contextmanager
def _alone() -> Iterator[tuple[int, int]]:
    """Hide from the host that a launcher started several processes, which share nothing but the folder; yield which one this is."""
    told = {name: os.environ.pop(name, default) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1"))}
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    try:
        yield int(told["RANK"]), int(told["WORLD_SIZE"])
    finally:
        os.environ.update(told)


class _Filler:
    """Runs the teachers of a config on its training loader.

    Args:
        config: the config, whose teachers run.
        path: its name in messages.
        epochs: see :func:`fill`.
    """

    def __init__(self, config: Config, path: str, epochs: int | None) -> None:
        with config_mistakes(path):
            self.runner = make_runner(config)
            self.model: Any = unwrapped(self.runner.model)
            if getattr(self.model, "distiller", None) is None:
                self._without_terms(path)
            self.runner.optim_wrapper = self.runner.build_optim_wrapper(self.runner.optim_wrapper)
        self.engine, self.context = self.model.distiller, self.model.distill_context
        self._check_preprocessor()
        with config_mistakes(path), data_on_this_machine(config, "nothing was stored", "train_dataloader"):
            loop = self.runner.train_loop
        self.loader = loop.dataloader
        told = ReplayViews(**(replaying(config) or {}))
        if told.seed is None:
            raise DistillError(
                "a store keeps its views for runs of any seed; give ReplayViews a seed of its own, such as 0"
            )
        per_pass = len(self.loader.dataset) / max(self.loader.batch_sampler.batch_size, 1)
        own = loop.max_epochs if not hasattr(loop, "dataloader_iterator") else -(-loop.max_iters // per_pass)
        self.views = int(epochs or told.views or own)
        self.seed = told.seed
        replay(self.loader, self.views, self.seed)
        begin(self.runner, self.loader)
        self.batches = _batches(self.loader, self.views)
        self._check_replayed()

    def _without_terms(self, path: str) -> None:
        problem = getattr(getattr(self.model, "distill_context", None), "problem", None)
        if problem is not None:
            raise problem
        raise DistillError(f"nothing is read of a teacher in {path}; give it terms or a recipe")

    def _check_preprocessor(self) -> None:
        """Refuse what is drawn for a whole batch, after the pipeline."""
        augments = getattr(self.model.data_preprocessor, "batch_augments", None) or ()
        drawn = [type(one).__name__ for one in augments if type(one).__name__ != "BatchFixedSizePad"]
        if drawn or self.context.mixup:
            what = drawn[0] if drawn else "mixup"
            raise DistillError(
                f"{what} changes whole batches by numbers that no view repeats, so that no stored output would be found; leave it out, "
                "or let the teacher run"
            )

    def _check_replayed(self) -> None:
        """Refuse a pipeline that gives another view when one is replayed, as a cache of earlier images does."""
        some = [place for batch in self.batches[:2] for place in batch]
        first = [self.loader.dataset[place]["inputs"] for place in some]
        for place, before in zip(reversed(some), reversed(first), strict=True):
            again = self.loader.dataset[place]["inputs"]
            if before.shape != again.shape or not torch.equal(before, again):
                raise DistillError(
                    "the pipeline gives another view when one is replayed, as transforms do that remember earlier images "
                    "(CachedMosaic, CachedMixUp); take one that does not, such as Mosaic"
                )

    def fill(
        self, name: str, folder: str, identity: Mapping[str, Any], values: Values, share: tuple[int, int]
    ) -> Store:
        """Fill the store of one source; of several processes each fills its share of the parts."""
        writer = Writer(self.model, name, values, lambda: self.runner.optim_wrapper.optim_context(self.runner.model))
        first = next(self._drawn(self.batches[:1]))
        about, size = writer.about(first, identity)
        about |= {
            "views": self.views,
            "seed": self.seed,
            "images": len(self.loader.dataset),
            "batches": digest(self.batches),
            "samples": len(self.batches),
            "per_part": max(1, PART // max(size * len(first[1]), 1)),
        }
        store = Store.create(folder, about)
        process, processes = share
        missing = set(store.missing())
        todo = [part for part in range(store.parts)[process::processes] if part in missing]
        numbers = [number for part in todo for number in store.samples_of(part)]
        drawn = self._drawn([self.batches[number] for number in numbers])
        for part in tqdm(todo, desc=f"store {name}", unit="part", disable=process > 0):
            store.write(part, columns_of([row for _ in store.samples_of(part) for row in writer.rows(next(drawn))]))
        return store

    def _drawn(self, batches: Sequence[Sequence[int]]) -> Iterator[Batched]:
        """Yield batches as the data preprocessor returns them."""
        given = self.loader
        drawn = DataLoader(
            given.dataset,
            batch_sampler=batches,  # type: ignore[arg-type]
            num_workers=given.num_workers,
            collate_fn=given.collate_fn,
        )
        for batch in drawn:
            told = self.model.data_preprocessor(batch, True)
            yield told["inputs"], told["data_samples"]


def _batches(loader: Any, views: int) -> list[list[int]]:
    """Return the numbers of each batch of a replayed loader, and then of all images that its sampler left out of a view."""
    sampler, drawn = sampler_of(loader), loader.batch_sampler
    size = len(loader.dataset)
    found: list[list[int]] = []
    with isolated_rng():
        for epoch in range(views) if hasattr(sampler, "epoch") else (None,):
            if epoch is not None:
                sampler.set_epoch(epoch)
            for batch in drawn:
                if epoch is None and sampler.replayed_position - len(batch) >= views * size:
                    break
                found.append([int(place) for place in batch])
    seen = {place for batch in found for place in batch}
    left = [place for place in range(views * size) if place not in seen]
    step = max(int(getattr(drawn, "batch_size", 1)), 1)
    return found + [left[start : start + step] for start in range(0, len(left), step)]


def _summary(store: Store, name: str, folder: str) -> str:
    """Describe a store, or what is missing of it."""
    missing = len(store.missing())
    if missing:
        return f"{name}: {folder} lacks {missing} of {store.parts} parts, which other processes write"
    index, about = Index(store, checked=False), store.about
    errors = np.concatenate([store.whole(part, ERRORS, checked=False) for part in range(store.parts)])
    each = ", ".join(
        f"{tap} {error:.2%}" for tap, error in zip(about["taps"], np.sqrt((errors**2).mean(0)), strict=True)
    )
    return (
        f"{name}: {about['views']} views of {about['images']} images in {folder}: {store.size() / 2**20:.1f} MiB, "
        f"{store.size() / len(index) / 1000:.0f} kB a view; error of {about['values']} relative to the outputs: {each}"
    )
