"""A teacher whose outputs are cached."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from typing import Any, Protocol

import torch
from torch import Tensor

from ..batch import Batch
from ..errors import DistillError
from ..recorder import Recorder
from ..taps import NeverFired, Recording, Tap, mapped
from .teacher import Teacher


class KnownRecording(Recording):
    """The recording of a teacher that did not run.

    Args:
        values: the value of each tap; that of a tap which the teacher did not reach is missing.
    """

    def __init__(self, values: Mapping[Tap, Any]) -> None:
        super().__init__("teacher", {}, set())
        self._values = dict(values)

    def __getitem__(self, tap: Tap) -> Any:
        if tap not in self._values:
            raise NeverFired(tap, self.owner)
        return self._values[tap]

    def calls(self, tap: Tap) -> int:
        return int(tap in self._values)

    def mapped(self, function: Callable[[Tensor], Tensor]) -> KnownRecording:
        other = copy(self)
        other._values = {tap: mapped(value, function) for tap, value in self._values.items()}
        return other


class Outputs(Protocol):
    """Stores the tapped outputs of a teacher by sample."""

    def look_up(self, ids: Sequence[Any], inputs: Mapping[str, Tensor], taps: Sequence[Tap]) -> Recording | None:
        """Return the stored recording of these samples; ``None`` unless all outputs of all samples are stored."""

    def lacks(self, ids: Sequence[Any], taps: Sequence[Tap]) -> str | None:
        """Describe the first of these samples that lacks an output; return ``None`` if none does."""

    def example(self, inputs: Mapping[str, Tensor], taps: Sequence[Tap]) -> Recording:
        """Return a recording with the shapes that a dry run of the teacher would give."""

    def store(
        self, ids: Sequence[Any], inputs: Mapping[str, Tensor], recording: Recording, taps: Sequence[Tap]
    ) -> None:
        """Store the tapped outputs of these samples."""


class Cached(Teacher):
    """A teacher that runs only for samples whose outputs are not stored yet.

    The host identifies the samples in ``batch.samples``; without them the teacher runs.

    Args:
        teacher: the teacher, whose model is shared.
        store: the store of its outputs.
        absent: true if ``teacher`` is a stand-in without weights; an output that the store lacks is then an error.
    """

    def __init__(self, teacher: Teacher, store: Outputs, *, absent: bool = False) -> None:
        vars(self).update(vars(teacher))
        self.store, self.absent = store, absent
        self.example: Mapping[str, Tensor] = {}
        """The inputs of the dry run, for a teacher that is absent."""

    def rehearse(self, recorder: Recorder, run: Callable[[], Any]) -> Recording:
        if not self.absent:
            return super().rehearse(recorder, run)
        found = self.store.example(self.example, recorder.taps)
        found.model = self.name
        return found

    def record(self, recorder: Recorder, run: Callable[[], Any], batch: Batch, device: torch.device) -> Recording:
        samples = batch.samples
        found = None if samples is None else self.store.look_up(samples.ids, samples.inputs, recorder.taps)
        if found is not None:
            found.model = self.name
            return found
        if self.absent:
            sample = None if samples is None else self.store.lacks(samples.ids, recorder.taps)
            raise DistillError(
                f"there is no teacher, and no stored output of sample {sample}; give teacher=… to compute them"
            )
        found = super().record(recorder, run, batch, device)
        if samples is not None:
            self.store.store(samples.ids, samples.inputs, found, recorder.taps)
        return found
