"""The engine: one step, the same in every host.

Each source that an active term hears runs on the same view of the batch; the student runs the host's own loss, recorded; parts of
a source that need what the student drew follow; then each term: tap → adapter → region → loss × weight(step).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .batch import Batch
from .errors import DistillError, WiringError, nearest
from .isolation import isolated_rng, own_random_stream
from .readers import Reader
from .recorder import Recorder
from .registry import TERMS, Registry
from .rehearsal import Rehearsal, Replay, RunSource, members, same_shapes, taps_of
from .schedules import Step
from .sources import STUDENT, Ensemble, Itself, Source
from .sources.base import check_names
from .step import StepInProgress
from .taps import NeverFired, Recording, Tap
from .terms import Term, build_terms
from .wiring import Wiring, WiringRow

logger = logging.getLogger("kdgraft")


class Engine(nn.Module):
    """Owns the terms with their trainable parts and the sources, beside a student that a host owns.

    Call :meth:`wire` once; then run each step of the host's own loss in :meth:`step`.

    Args:
        sources: who teaches: one source, which is called ``"teacher"``, or several by name.
        terms: names, dicts or :class:`~kdgraft.Term` instances.
        registry: where names are looked up.
        recorder: what records the models; a host with taps of its own has a recorder of its own.
        reader: what reads their tensors for terms; a host's own knows its models.
    """

    def __init__(
        self,
        sources: Source | Mapping[str, Source],
        terms: Sequence[Any],
        registry: Registry = TERMS,
        recorder: type[Recorder] = Recorder,
        reader: type[Reader] = Reader,
    ) -> None:
        super().__init__()
        self.sources = {"teacher": sources} if isinstance(sources, Source) else dict(sources)
        check_names(self.sources)
        for name, source in self.sources.items():
            source.name = name
        self._check_members()
        with isolated_rng():
            built = self._with_mirrors(build_terms(terms, registry, reader))
        self._check_heard(built)
        self.terms = nn.ModuleDict({term.name: term for term in built})
        self.peers = nn.ModuleDict({name: source.model for name, source in self.sources.items() if source.trains})
        self.dropped = dict.fromkeys(self.terms, 0)
        self.recorder, self.reader = recorder, reader
        self._rehearsal = Rehearsal((), {}, recorder, None)

    def _check_members(self) -> None:
        for name, source in self.sources.items():
            for member in source.members if isinstance(source, Ensemble) else ():
                found = self.sources.get(member)
                if found is None or isinstance(found, Ensemble) or found.members == (STUDENT,):
                    known = [other for other, one in self.sources.items() if not isinstance(one, Ensemble)]
                    raise DistillError(
                        f"Ensemble {name!r}: {member!r} is no source with a model of its own{nearest(member, known)}"
                    )

    def _with_mirrors(self, terms: list[Term]) -> list[Term]:
        """The terms, and after each one that listens to a peer its twin in which the peer listens to the student."""
        found: list[Term] = []
        for term in terms:
            source = self.sources.get(term.source)
            if source is None:
                raise DistillError(
                    f"{term.name}: there is no source {term.source!r}{nearest(term.source, self.sources)}; "
                    "source=… says which one it listens to"
                )
            found.append(term)
            if source.trains:
                found.append(term.mirrored())
        return found

    def _check_heard(self, terms: Sequence[Term]) -> None:
        heard = {term.source for term in terms}
        heard |= {member for name in heard - {STUDENT} for member in self.sources[name].members}
        silent = [name for name in self.sources if name not in heard]
        if terms and silent:
            raise DistillError(
                f"no term listens to {', '.join(map(repr, silent))}; add source={silent[0]!r} to a term, or leave it out"
            )

    # Building.

    def wire(
        self,
        student: nn.Module,
        run_student: Callable[[], Any],
        run_source: RunSource,
        fields: frozenset[str] = frozenset(),
        facts: Mapping[str, Any] | None = None,
        replay: Replay | None = None,
    ) -> dict[str, Wiring]:
        """Sizes every adapter by one dry run of all models in eval mode, and checks every term.

        The student's modes, buffers and the random state are afterwards as they were.

        Args:
            run_student: runs the student on a small example.
            run_source: runs a source's model on it.
            fields: which fields of :class:`Batch` the host fills.
            facts: what else the host's own terms ask for (see :class:`~kdgraft.terms.Wiring`).
            replay: the part of a teacher that runs on what the student drew, where some term taps it.

        Returns:
            What each term was wired to, by its name, with both recordings of the dry run.

        Raises:
            WiringError: the first term that cannot be wired, with taps, shapes and what to do.
        """
        for term in self.all_terms:
            if term.rows:
                raise WiringError(
                    f"{term.name} is wired to another student already; build a new term for each distiller"
                )
        with isolated_rng():
            for source in self.sources.values():
                if isinstance(source, Itself):
                    source.adopt(student)
        models = {STUDENT: student} | {name: self.sources[name].model for name in self._leaves}
        for term in self.all_terms:
            self._prepare(term, models)
        self._rehearsal = Rehearsal(self.all_terms, self.sources, self.recorder, replay)
        found: dict[str, Wiring] = {}
        with isolated_rng(), torch.no_grad(), self._naming_terms():
            recordings = self._rehearsal.run(models, run_student, run_source)
            self._tell_of_frozen(recordings)
            outside = () if replay is None else (replay.path,)
            with torch.enable_grad():
                for term in self.all_terms:
                    ours, theirs = recordings[term.listener], [recordings[name] for name in self.members(term.source)]
                    same_shapes(term, theirs)
                    found[term.name] = Wiring(
                        models[term.listener],
                        models[theirs[0].model],
                        ours.heard_as("student"),
                        theirs[0].heard_as("teacher"),
                        fields,
                        facts or {},
                        self.sources.get(theirs[0].model),
                        outside,
                    )
                    term.wire(found[term.name])
        return found

    @contextmanager
    def _naming_terms(self) -> Iterator[None]:
        """Says whose tap never fired: recipes and defaults write taps that the user never saw."""
        try:
            yield
        except NeverFired as error:
            names = [term.name for term in self.all_terms if error.tap in (*term.student_taps, *term.teacher_taps)]
            raise WiringError(f"{', '.join(names)}: {error}") from None

    def _prepare(self, term: Term, models: Mapping[str, nn.Module]) -> None:
        """Lets a term look at its models; all members of an ensemble have to be read alike."""
        source = self.sources.get(term.source)
        readings = []
        for name in self.members(term.source):
            term.reader = self.reader(models[term.listener], models[name], term.name)
            term.prepare(models[term.listener], models[name])
            readings.append((list(term.teacher_taps), term.reading))
        if isinstance(source, Ensemble):
            if not term.hears_ensembles:
                raise WiringError(
                    f"{term.name}: an Ensemble gives predictions, which this term does not compare; "
                    f"take one of its members, source={source.members[0]!r}"
                )
            if any(found != readings[0] for found in readings):
                raise WiringError(f"{term.name}: the members of the Ensemble {source.name!r} are not of one kind")

    @property
    def _leaves(self) -> list[str]:
        """The sources with a model of their own."""
        return [name for name, source in self.sources.items() if source.members == (name,)]

    def members(self, source: str) -> tuple[str, ...]:
        """The names of the models that a source is made of."""
        return members(self.sources, source)

    def taps(self, model: str) -> list[Tap]:
        """The taps that the terms have on one model."""
        return taps_of(model, self.all_terms, self.sources)

    def _tell_of_frozen(self, recordings: Mapping[str, Recording]) -> None:
        """Warns about terms whose student features are frozen: only their adapters would learn."""
        for term in self.all_terms:
            frozen = ", ".join(str(tap) for tap in term.student_taps if recordings[term.listener].frozen(tap))
            if frozen:
                logger.warning(
                    "%s: no trained parameter of the student has a part in %s (frozen_stages?), so that it learns nothing there; "
                    "tap a later module",
                    term.name,
                    frozen,
                )

    # Looking at it.

    @property
    def all_terms(self) -> list[Term]:
        """The terms in their order, the twins of those that listen to a peer among them."""
        return [term for term in self.terms.values() if isinstance(term, Term)]

    @property
    def teacher(self) -> Source:
        """The one source of a distillation that has one; of several the first."""
        return next(iter(self.sources.values()))

    @property
    def rows(self) -> list[WiringRow]:
        """The wiring, a row a tensor pair."""
        return [row for term in self.all_terms for row in term.rows]

    @property
    def replays(self) -> bool:
        """Whether some term taps the part of a teacher that is replayed."""
        return self._rehearsal.replay is not None

    def active(self, at: Step) -> list[Term]:
        """The terms whose weight is not 0 at this step."""
        return [term for term in self.all_terms if term.weight_at(at) != 0]

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """Each term's denominator on this batch, of the terms that know it before the forward pass."""
        found = {term.name: term.count(batch) for term in self.all_terms}
        return {name: count for name, count in found.items() if count is not None}

    def load(self) -> None:
        """Reads the sources' weights that are not there yet."""
        for source in self.sources.values():
            source.load()

    # The step.

    @contextmanager
    def step(
        self,
        student: nn.Module,
        batch: Batch | Callable[[nn.Module], Batch],
        at: Step,
        run_source: RunSource,
        device: torch.device | str = "cpu",
        *,
        totals: Mapping[str, Tensor] | None = None,
        parts: int = 1,
    ) -> Iterator[StepInProgress]:
        """Records everything that the terms of one step need, while its body runs the student on the host's own loss.

        On several processes all of them have to make it. With no active term nothing but the student (and its peers) runs.

        Args:
            student: the student, whose modules are recorded.
            batch: what terms may know of the batch; or what gives it for the student and for each peer.
            at: where training stands.
            run_source: runs a source's model; a peer on the host's own loss, and what it returns is in ``outputs``.
            device: where losses of terms that rest are put.
            totals: for a batch that comes in parts (gradient accumulation), each term's denominator over all of them and over
                all processes, from :meth:`counts`; the parts' losses then add up to that of the whole batch.
            parts: how many there are; a term without a total weighs them alike.

        Yields:
            The step; call its ``losses`` when the body has run.
        """
        active = self.active(at)
        current = StepInProgress(
            self.sources,
            self.all_terms,
            active,
            batch,
            student,
            at,
            torch.device(device),
            totals or {},
            parts,
            self.dropped,
        )
        for source in self.sources.values():
            source.begin(student, at)
        heard = {name for term in active for name in (term.listener, *self.members(term.source))}
        for name in self._leaves:
            source = self.sources[name]
            if name in heard and not source.trains:
                current.recordings[name] = self.record(name, run_source, current.batch, current.device)
        if STUDENT in heard:
            with self._rehearsal.recorders[STUDENT].record(student) as recording:
                current.recordings[STUDENT] = recording
                yield current
        else:
            yield current
        for name in self.peers:
            source = self.sources[name]
            with own_random_stream(), self._rehearsal.recorders[name].record(source.model) as recording:
                current.outputs[name] = run_source(source)
            current.recordings[name] = source.marked(recording)
        for name in heard & self._rehearsal.replayers.keys():
            self._run_replay(current, name)

    def record(self, name: str, run_source: RunSource, batch: Batch, device: torch.device) -> Recording:
        """Records one source that does not train.

        What it draws at random comes from a stream of its own: the student draws what it would without a teacher.
        """
        source = self.sources[name]
        with own_random_stream():
            found = source.record(self._rehearsal.recorders[name], lambda: run_source(source), batch, device)
        return source.marked(found)

    def _run_replay(self, current: StepInProgress, name: str) -> None:
        """Runs what of a teacher works on the student's proposals."""
        replay, model, first = self._rehearsal.replay, self.sources[name].model, current.recordings[name]
        assert replay is not None
        with own_random_stream(), self.sources[name].context(current.device.type):
            part = self._rehearsal.replayers[name].record_prefix(
                model, lambda: replay.run(model, current.recordings[STUDENT], first, current.batch)
            )
        current.recordings[name] = first.joined(part)

    # Its state.

    def live_state(self) -> dict[str, Any]:
        """What a resumed run needs beyond the student and the optimizer: of the terms, of the sources, and counters."""
        return {
            "terms": dict(self.terms.state_dict()),
            "dropped": dict(self.dropped),
            "hidden": {term.name: state for term in self.all_terms if (state := term.hidden_state())},
            "sources": {name: state for name, source in self.sources.items() if (state := source.state())},
        }

    def load_live_state(self, state: Mapping[str, Any]) -> None:
        """Restores :meth:`live_state`.

        Raises:
            DistillError: the state belongs to other terms or sources.
        """
        self.check_live_state(state)
        self.terms.load_state_dict(dict(state["terms"]))
        self.load_beyond_modules(state)
        self.dropped.update({name: int(n) for name, n in state["dropped"].items() if name in self.dropped})

    def check_live_state(self, state: Mapping[str, Any]) -> None:
        """Raises a :class:`DistillError` unless a :meth:`live_state` is that of these terms and sources."""
        own, given = self.terms.state_dict(), state["terms"]
        wrong = [k for k in own if k not in given or given[k].shape != own[k].shape] + [
            k for k in given if k not in own
        ]
        ours = {name for name, source in self.sources.items() if source.state()}
        wrong += sorted(ours ^ set(state.get("sources", {})))
        if wrong:
            raise DistillError(
                f"the checkpoint to resume was made with other distillation terms ({', '.join(wrong[:4])} do not fit); "
                "resume with the terms it was made with, or load it without resuming"
            )

    def load_beyond_modules(self, state: Mapping[str, Any]) -> None:
        """Restores of :meth:`live_state` what terms and sources have beside parameters and buffers."""
        hidden = state.get("hidden", {})
        for term in self.all_terms:
            if term.name in hidden:
                term.load_hidden_state(hidden[term.name])
        for name, own in state.get("sources", {}).items():
            self.sources[name].load_state(own)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Engine:
        super()._apply(fn, recurse)
        for source in self.sources.values():
            source.apply(fn)
        return self
