"""Runs that can be replayed: crops, flips and sizes come from a seed of the image and of the pass, dropout from one of the iteration.

The data set and the sampler of the training loader become instances of subclasses of their own classes. The sampler yields an
image's number together with that of the pass, in one number, so that it reaches the data set in any worker.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.structures import BaseDataElement

from kdgraft.errors import DistillError, check_number
from kdgraft.isolation import isolated_rng

from .configs import REPLAY, type_name

VIEW = "view"
"""The entry of a data sample's metainfo that holds the pass and the number of its image."""


@HOOKS.register_module(REPLAY)
class ReplayViews(Hook):
    """Draws what is random in a training from seeds that a resumed run has too.

    What the training pipeline draws comes from a seed of the image and of the pass over the data set: the view that an image has in
    a pass is the same in every run, whatever the seed of the run, the number of workers or of processes, and after resuming. What a
    step draws (dropout, mixed images) comes from the seed of the run, the number of the iteration and that of the process. A run
    that is resumed is then, bit for bit, one that never stopped; without this hook mmengine's loops draw anew. A teacher with a
    ``store`` needs it, and ``kdgraft train`` adds it there.

    Args:
        views: the number of views of an image; after that many passes over the data the first one follows. By default every pass
            has its own.
        seed: the seed of the views; ``None`` for the seed of the run, so that runs of other seeds see other views.

    Example:
        In a config: ``custom_hooks = [dict(type='ReplayViews', views=10)]``.
    """

    priority = "VERY_HIGH"

    def __init__(self, views: int | None = None, seed: int | None = 0) -> None:
        if views is not None:
            check_number("ReplayViews", "views", views, 1, whole=True)
        if seed is not None:
            check_number("ReplayViews", "seed", seed, whole=True)
        self.views, self.seed = views, seed

    def before_train(self, runner: Any) -> None:
        """Replay the views of the training loader, before it is asked for its first batch."""
        loop: Any = runner.train_loop
        replay(loop.dataloader, self.views, runner.seed if self.seed is None else self.seed)
        begun: Any = getattr(loop, "dataloader_iterator", None)
        if getattr(begun, "_iterator", None) is not None:  # mmengine 0.10.7 starts the workers when it builds the loop
            loop.dataloader_iterator = type(begun)(loop.dataloader)

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        """Seed what the step draws."""
        _seed(runner.seed, runner.iter, runner.rank)


def replaying(config: Config) -> dict[str, Any] | None:
    """Return the settings of a config's hook; ``None`` if it has none."""
    for hook in config.get("custom_hooks") or ():
        if isinstance(hook, Mapping) and type_name(hook) == REPLAY:
            return {key: value for key, value in hook.items() if key not in ("type", "priority")}
    return None


def let_replay(config: Config, **settings: Any) -> None:
    """Add the hook with these settings to a config, unless it has one."""
    if replaying(config) is None:
        config.custom_hooks = [*(config.get("custom_hooks") or ()), {"type": REPLAY, **settings}]


def _seed(*words: int) -> None:
    """Seed the three generators that hosts draw from; each combination of numbers has its own seed."""
    drawn = np.random.SeedSequence(words).generate_state(1)
    random.seed(int(drawn[0]))
    np.random.seed(drawn)
    torch.manual_seed(int(drawn[0]))


def replay(loader: Any, views: int | None, seed: int) -> None:
    """Let a loader of mmengine replay its views: see :class:`ReplayViews`.

    Raises:
        DistillError: its data set has no length, or replays other views already.
    """
    dataset, sampler = loader.dataset, sampler_of(loader)
    settings = {"views": views, "seed": int(seed)}
    if hasattr(dataset, "replayed"):
        if dataset.replayed != settings:
            raise DistillError(f"two ReplayViews with other settings ({settings} and {dataset.replayed}); keep one")
        return
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise DistillError(f"ReplayViews needs a data set with a length; a {type(dataset).__name__} has none")
    dataset.replayed, sampler.replayed = settings, settings
    sampler.replayed_size, sampler.replayed_position = len(dataset), 0
    kinds: tuple[Any, Any] = type(dataset), type(sampler)
    dataset.__class__, sampler.__class__ = _data_set(kinds[0]), _sampler(kinds[1])


def sampler_of(loader: Any) -> Any:
    """Return the sampler that numbers the images of a loader."""
    return getattr(loader.batch_sampler, "sampler", None) or loader.sampler


# Subclasses are made of one class alone, as an object can only take a class of its own layout.


@cache
def _data_set(own: Any) -> Any:
    """Return the subclass of a class of data sets whose views are replayed."""

    class Replayed(own):  # type: ignore[misc]
        """A data set that draws a sample's random numbers from a seed of its image and of the pass."""

        def __getitem__(self, place: int) -> Any:
            """Return a sample; ``place`` is the image's number plus the pass times the number of images."""
            view, index = divmod(int(place), len(self))
            with isolated_rng():
                _seed(self.replayed["seed"], view, index)
                found = super().__getitem__(index)
            sample = found.get("data_samples") if isinstance(found, dict) else None
            if isinstance(sample, BaseDataElement):  # other samples cannot tell their view, which only a store asks for
                sample.set_metainfo({VIEW: (view, index)})
            return found

        def get_data_info(self, place: int) -> Any:
            """Return the description of an image, for batch samplers that group images by their shape."""
            return super().get_data_info(int(place) % len(self))

        def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
            return _rebuilt, (_data_set, own, self.__dict__)

    return Replayed


@cache
def _sampler(own: Any) -> Any:
    """Return the subclass of a class of samplers that tells the pass over the data with the number of each image.

    The pass is the sampler's epoch; a sampler that never ends counts the numbers that it has given on all processes.
    """

    class Replayed(own):  # type: ignore[misc]
        """A sampler that gives the pass with each number."""

        def __iter__(self) -> Iterator[int]:
            """Yield the number of each image, plus the pass times the number of images."""
            size, views = self.replayed_size, self.replayed["views"]
            ranks, rank = int(getattr(self, "world_size", 1)), int(getattr(self, "rank", 0))
            for index in super().__iter__():
                passed = (self.replayed_position * ranks + rank) // size
                view = self.epoch if hasattr(self, "epoch") else passed
                self.replayed_position += 1
                yield (view if views is None else view % views) * size + int(index)

        def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
            return _rebuilt, (_sampler, own, self.__dict__)

    if not hasattr(own, "skip"):
        return Replayed

    class Skipping(Replayed):
        """One that can be brought to a position."""

        def skip(self, count: int) -> None:
            """Go to a position, as a resumed run does."""
            super().skip(count)
            self.replayed_position = count

    return Skipping


def _rebuilt(subclass: Any, own: type, state: dict[str, Any]) -> Any:
    """Build an instance anew where it was pickled, for workers that are spawned."""
    made = object.__new__(subclass(own))
    made.__dict__.update(state)
    return made
