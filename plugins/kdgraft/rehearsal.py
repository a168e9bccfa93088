"""The rehearsal: a dry run of all models, which builds the recorder of each for later steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .batch import Batch
from .errors import WiringError
from .isolation import DROPOUTS, eval_mode
from .recorder import Recorder
from .sources import STUDENT, Ensemble, Source
from .taps import Recording, Tap
from .terms import Term

RunSource = Callable[[Source], Any]
"""Runs a source's model on the step's batch, in the source's own view of it."""


@dataclass(frozen=True)
class Replay:
    """A part of a teacher, such as a RoI head, that runs after the student, on the *student's* proposals.

    Attributes:
        path: the module; the teacher's taps in it are recorded in the replay, not in the teacher's own pass.
        student_taps: taps of the student's pass that the replay reads.
        teacher_taps: taps of the teacher's own pass that the replay reads.
        run: runs the part, given ``(teacher's model, student's recording, teacher's recording, batch)``.
    """

    path: str
    student_taps: Sequence[Tap]
    teacher_taps: Sequence[Tap]
    run: Callable[[nn.Module, Recording, Recording, Batch], None]


class Rehearsal:
    """Builder of the recorders of the student and of every source, which runs each model once.

    Args:
        terms: the terms, whose taps are set.
        sources: the sources by name.
        recorder: the class that records a model.
        replay: the part of a teacher that runs on the student's proposals.

    Attributes:
        recorders: the recorder of each model's own pass, by the model's name.
        replayers: the recorder of the replayed part of a teacher, by the teacher's name.
        replay: the part that is replayed; ``None`` if no term taps it.
    """

    def __init__(
        self,
        terms: Sequence[Term],
        sources: Mapping[str, Source],
        recorder: type[Recorder],
        replay: Replay | None,
    ) -> None:
        self._terms, self._sources, self._recorder_class = terms, sources, recorder
        self.recorders: dict[str, Recorder] = {}
        self.replayers: dict[str, Recorder] = {}
        self._replayed = [] if replay is None else self._sources_replayed(replay)
        self.replay = replay if self._replayed else None

    def _sources_replayed(self, replay: Replay) -> list[str]:
        """Return the sources whose replayed part is tapped by some term."""
        found = []
        for term in self._terms:
            for name in members(self._sources, term.source):
                if name == STUDENT or not any(tap.below(replay.path) for tap in term.teacher_taps):
                    continue
                if self._sources[name].trains:
                    raise WiringError(
                        f"{term.name}: {name!r} trains on its own proposals, so that it cannot be compared on the "
                        f"student's; tap a module before '{replay.path}'"
                    )
                found.append(name)
        return list(dict.fromkeys(found))

    def replays(self, terms: Sequence[Term]) -> bool:
        """Return true if one of these terms taps the part of a teacher that is replayed."""
        path = None if self.replay is None else self.replay.path
        return path is not None and any(tap.below(path) for term in terms for tap in term.teacher_taps)

    def run(
        self, models: Mapping[str, nn.Module], run_student: Callable[[], Any], run_source: RunSource
    ) -> dict[str, Recording]:
        """Build the recorders, run every model once, and return the recordings by the model's name."""
        replay = self.replay
        found: dict[str, Recording] = {}
        for name, model in models.items():
            taps = taps_of(name, self._terms, self._sources)
            if replay is not None and name == STUDENT:
                taps += replay.student_taps
            if replay is not None and name in self._replayed:
                taps = [*(tap for tap in taps if not tap.below(replay.path)), *replay.teacher_taps]
            recorder = self._recorder(model, name, taps)
            self.recorders[name] = recorder
            run = run_student if name == STUDENT else lambda name=name: run_source(self._sources[name])  # type: ignore[misc]
            if name == STUDENT or self._sources[name].trains:
                found[name] = _rehearsed(recorder, model, run)
            else:
                found[name] = self._sources[name].rehearse(recorder, run)
            if name != STUDENT:
                self._sources[name].marked(found[name])
        for name in self._replayed:
            assert replay is not None
            inside = [tap for tap in taps_of(name, self._terms, self._sources) if tap.below(replay.path)]
            self.replayers[name] = self._recorder(models[name], name, inside)
            part = self.replayers[name].rehearse(
                models[name],
                lambda name=name: replay.run(models[name], found[STUDENT], found[name], Batch()),  # type: ignore[misc]
            )
            found[name] = found[name].joined(part)
        return found

    def _recorder(self, model: nn.Module, name: str, taps: Sequence[Tap]) -> Recorder:
        owner = name if name in (STUDENT, "teacher") else f"source {name!r}"
        for term in self._terms:
            own = [*term.student_taps] if term.listener == name else []
            own += term.teacher_taps if name in members(self._sources, term.source) else ()
            try:
                self._recorder_class(model, own, owner, name)
            except WiringError as error:
                raise WiringError(f"{term.name}: {error}") from None
        return self._recorder_class(model, taps, owner, name)


def members(sources: Mapping[str, Source], source: str) -> tuple[str, ...]:
    """Return the names of the models that a source consists of."""
    return (STUDENT,) if source == STUDENT else sources[source].members


def taps_of(model: str, terms: Sequence[Term], sources: Mapping[str, Source]) -> list[Tap]:
    """Return the taps of the terms on one model."""
    found: list[Tap] = []
    for term in terms:
        found += term.student_taps if term.listener == model else ()
        found += term.teacher_taps if model in members(sources, term.source) else ()
    return found


def _rehearsed(recorder: Recorder, model: nn.Module, run: Callable[[], Any]) -> Recording:
    """Record a dry run, with gradient, of a model that trains."""
    with eval_mode(model):
        for module in model.modules():
            # In-place dropout overwrites a tapped tensor in training mode only; the rehearsal must detect this.
            module.training = getattr(module, "inplace", False) and isinstance(module, DROPOUTS)
        with torch.enable_grad():
            return recorder.rehearse(model, run)


def same_shapes(term: Term, members: Sequence[Recording], source: Source | None) -> None:
    """Raise a :class:`WiringError` unless the members of an ensemble predict tensors of the shapes that it combines."""
    if not isinstance(source, Ensemble) or term.reader.chunked:
        return
    for tap in term.teacher_taps:
        shapes = {m.model: [tuple(t.shape) for t in m.tensors(tap)] for m in members if m.calls(tap)}
        first, *others = shapes or [""]
        for other in others:
            wanted = [source.shape_of(other, shape) for shape in shapes[first]]
            if shapes[other] != wanted:
                counts = tuple(f"{len(shapes[name])} tensors" for name in (other, first))
                places = [i for i, (x, y) in enumerate(zip(shapes[other], wanted, strict=False)) if x != y]
                theirs, ours = (shapes[other][places[0]], shapes[first][places[0]]) if places else counts
                raise WiringError(
                    f"{term.name}: '{tap}' gives {theirs} in {other!r} and {ours} in {first!r}; {source.alike}"
                )
