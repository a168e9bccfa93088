"""A teacher whose outputs are kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ..batch import Batch
from ..errors import DistillError
from ..recorder import Recorder
from ..taps import Recording, Tap
from .teacher import Teacher


class Store(Protocol):
    """Keeps what a teacher's taps gave, by sample."""

    def look_up(self, ids: Sequence[Any], inputs: Mapping[str, Tensor], taps: Sequence[Tap]) -> Recording | None:
        """What is kept of these samples; ``None`` unless that is everything."""

    def lacks(self, ids: Sequence[Any], taps: Sequence[Tap]) -> str | None:
        """The first of these samples of which something is not there; ``None`` where all is."""

    def example(self, inputs: Mapping[str, Tensor], taps: Sequence[Tap]) -> Recording:
        """What a dry run of the teacher would record, as far as shapes go."""

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
        absent: there is no teacher, ``teacher`` stands in for it without weights: what the store lacks is an error.
    """

    def __init__(self, teacher: Teacher, store: Store, *, absent: bool = False) -> None:
        vars(self).update(vars(teacher))
        self.store, self.absent = store, absent
        self.example: Mapping[str, Tensor] = {}
        """The inputs of the dry run, where there is no teacher to run on them."""

    def rehearse(self, recorder: Recorder, run: Callable[[], Any]) -> Recording:
        return self.store.example(self.example, recorder.taps) if self.absent else super().rehearse(recorder, run)

    def record(self, recorder: Recorder, run: Callable[[], Any], batch: Batch, device: torch.device) -> Recording:
        samples = batch.samples
        found = None if samples is None else self.store.look_up(samples.ids, samples.inputs, recorder.taps)
        if found is not None:
            return found
        if self.absent:
            sample = None if samples is None else self.store.lacks(samples.ids, recorder.taps)
            raise DistillError(
                f"the cache has nothing of sample {sample}, and there is no teacher to ask; give teacher=…, so that it can be added"
            )
        found = super().record(recorder, run, batch, device)
        if samples is not None:
            self.store.store(samples.ids, samples.inputs, found, recorder.taps)
        return found
