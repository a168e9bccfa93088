"""A teacher whose outputs are kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ..regions import Batch
from ..taps import Recorder, Recording, Tap
from .teacher import Teacher


class Store(Protocol):
    """Keeps what a teacher's taps gave, by sample."""

    def look_up(self, ids: Sequence[Any], inputs: Mapping[str, Tensor], taps: Sequence[Tap]) -> Recording | None:
        """What is kept of these samples; ``None`` unless that is everything."""

    def store(
        self, ids: Sequence[Any], inputs: Mapping[str, Tensor], recording: Recording, taps: Sequence[Tap]
    ) -> None:
        """Keeps what the taps gave."""


class Cached(Teacher):
    """A teacher that runs only for samples whose outputs are not in a store yet.

    The host says in ``batch.samples`` which samples a batch holds; a batch without it runs the teacher.

    Args:
        teacher: the teacher; shared.
        store: what keeps its outputs.
    """

    def __init__(self, teacher: Teacher, store: Store) -> None:
        vars(self).update(vars(teacher))
        self.store = store

    def record(self, recorder: Recorder, run: Callable[[], Any], batch: Batch, device: torch.device) -> Recording:
        samples = batch.samples
        if samples is None:
            return super().record(recorder, run, batch, device)
        found = self.store.look_up(samples.ids, samples.inputs, recorder.taps)
        if found is None:
            found = super().record(recorder, run, batch, device)
            self.store.store(samples.ids, samples.inputs, found, recorder.taps)
        return found
