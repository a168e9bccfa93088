"""Views that can be replayed: a pipeline draws its crops, flips and sizes from a seed of the image and of the pass over the data.

The data set and the sampler of the training loader become instances of subclasses of their own classes. The sampler yields an
image's number together with that of the pass, in one number, so that it reaches the data set in any worker.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

from kdgraft.errors import DistillError, check_number
from kdgraft.isolation import isolated_rng

VIEW = "view"
"""The entry of a data sample's metainfo that holds the pass and the number of its image."""


@HOOKS.register_module()
class ReplayViews(Hook):
    """Draws what is random in the training pipeline from a seed of the image and of the pass over the data set.

    The view that an image has in a pass is then the same in every run, whatever the seed of the run, the number of workers or of
    processes, and after resuming. A teacher with a ``store`` needs it, and ``kdgraft train`` adds it there.

    Args:
        views: the number of views of an image; after that many passes over the data the first one follows. By default every pass
            has its own.
        seed: the seed of the views.

    Example:
        In a config: ``custom_hooks = [dict(type='ReplayViews', views=10)]``.
    """

    priority = "VERY_HIGH"

    def __init__(self, views: int | None = None, seed: int = 0) -> None:
        if views is not None:
            check_number("ReplayViews", "views", views, 1, whole=True)
        check_number("ReplayViews", "seed", seed, whole=True)
        self.views, self.seed = views, seed

    def before_train(self, runner: Any) -> None:
        """Replay the views of the training loader, before it is asked for its first batch."""
        loop: Any = runner.train_loop
        replay(loop.dataloader, self.views, self.seed)
        begun: Any = getattr(loop, "dataloader_iterator", None)
        if getattr(begun, "_iterator", None) is not None:  # mmengine 0.10.7 starts the workers when it builds the loop
            loop.dataloader_iterator = type(begun)(loop.dataloader)


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
                drawn = np.random.SeedSequence((self.replayed["seed"], view, index)).generate_state(1)
                random.seed(int(drawn[0]))
                np.random.seed(drawn)
                torch.manual_seed(int(drawn[0]))
                found = super().__getitem__(index)
            found["data_samples"].set_metainfo({VIEW: (view, index)})
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
