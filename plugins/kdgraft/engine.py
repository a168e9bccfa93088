"""The engine, which carries out one step in the same way for every host.

Each source of an active term runs on the same view of the batch. The student runs the host's own loss, and is recorded. Parts of
a source that need the student's proposals follow. Then each term computes: tap → adapter → region → loss × weight(step).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .batch import Batch
from .directions import directed
from .errors import DistillError, WiringError, nearest
from .examining import RunLoss, examiners, passes
from .isolation import Turns, isolated_rng, own_random_stream
from .readers import Reader
from .recorder import Recorder
from .registry import TERMS, Registry
from .rehearsal import Rehearsal, Replay, RunSource, members, same_shapes, taps_of
from .schedules import Step
from .sources import STUDENT, Ensemble, Itself, Source, with_parts
from .sources.base import check_names
from .sources.peer import check_peers
from .step import StepInProgress
from .taps import NeverFired, Recording, Tap
from .terms import Term, build_terms
from .terms.base import check_heard
from .terms.share import check_auto
from .wiring import Wiring, WiringRow

logger = logging.getLogger("kdgraft")


class Engine(nn.Module):
    """Owner of the sources and of the terms with their trainable parts, beside a student that the host owns.

    Call :meth:`wire` once; then run each step of the host's own loss in :meth:`step`.

    Args:
        sources: one source, which is named ``"teacher"``, or several by name.
        terms: names, dicts or :class:`~kdgraft.Term` instances.
        registry: the registry in which names are looked up.
        recorder: the class that records the models; hosts with their own kinds of taps pass their own.
        reader: the class that interprets the tensors of the host's models.

    Example:
        >>> engine = Engine(Teacher(teacher), [SoftTargets(temperature=4.0)])
        >>> wirings = engine.wire(student, lambda: student(images), lambda source: source.model(images))
        >>> with engine.step(student, Batch(), Step(0), lambda source: source.model(images), images.device) as step:
        ...     output = student(images)
        >>> list(step.losses())
        ['distill.soft_targets.loss']
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
        self.sources = with_parts({"teacher": sources} if isinstance(sources, Source) else sources)
        check_names(self.sources)
        self._check_members()
        with isolated_rng():
            asked = build_terms(terms, registry, reader)
            self._check_heard(asked)
            check_auto(asked, [name for name, source in self.sources.items() if source.trains])
            built, means = directed(asked, self.sources)
        self.sources.update(means)
        self.terms = nn.ModuleDict({term.name: term for term in built})
        self.peers = nn.ModuleDict({name: source.model for name, source in self.sources.items() if source.trains})
        self.dropped = dict.fromkeys(self.terms, 0)
        self.recorder, self.reader = recorder, reader
        self._rehearsal, self._turns = Rehearsal((), {}, recorder, None), Turns()

    def _check_members(self) -> None:
        models = [name for name, source in self.sources.items() if source.members == (name,)]
        for name, source in self.sources.items():
            for member in source.members if isinstance(source, Ensemble) else ():
                if member not in models:
                    raise DistillError(
                        f"{type(source).__name__} {name!r}: {member!r} is not a source with its own model{nearest(member, models)}"
                    )

    def _check_heard(self, terms: Sequence[Term]) -> None:
        for term in terms:
            if not term.alone and term.source not in self.sources:
                raise DistillError(
                    f"{term.name}: there is no source {term.source!r}{nearest(term.source, self.sources)}; "
                    "set source=… to one of the sources"
                )
        heard = {term.source for term in terms}
        heard |= {member for name in heard - {STUDENT} for member in self.sources[name].members}
        heard |= {part for source in self.sources.values() for part in source.parts()}  # told by their whole
        silent = [name for name in self.sources if name not in heard]
        if terms and silent:
            raise DistillError(
                f"no term uses {', '.join(map(repr, silent))}; add source={silent[0]!r} to a term, or remove the source"
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
        """Size every adapter by a dry run of all models in eval mode, and check every term.

        The student's modes and buffers and the random state are restored afterwards.

        Args:
            student: the student.
            run_student: runs the student on a small example.
            run_source: runs a source's model on the same example.
            fields: the fields of :class:`Batch` that the host fills.
            facts: further facts for the host's own terms; see :class:`~kdgraft.wiring.Wiring`.
            replay: the part of a teacher that runs on the student's proposals, in case a term taps it.

        Returns:
            The wiring of each term by its name, with both recordings of the dry run.

        Raises:
            WiringError: a term cannot be wired; the message gives the taps, the shapes and the remedy.
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
        check_peers(models, list(self.peers))
        for term in self.all_terms:
            if not term.alone:
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
                    same_shapes(term, theirs, self.sources.get(term.source))
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
        """Name the term in the error of a tap that never fired, as recipes and defaults use taps that the user did not write."""
        try:
            yield
        except NeverFired as error:
            names = [term.name for term in self.all_terms if error.tap in (*term.student_taps, *term.teacher_taps)]
            raise WiringError(f"{', '.join(names)}: {error}") from None

    def _prepare(self, term: Term, models: Mapping[str, nn.Module]) -> None:
        """Prepare a term for its models; all members of an ensemble must be read with the same taps and settings."""
        source = self.sources.get(term.source)
        readings = []
        for name in self.members(term.source):
            check_heard(term, self.sources.get(name))
            term.reader = self.reader(models[term.listener], models[name], term.name)
            term.prepare(models[term.listener], models[name])
            readings.append((list(term.teacher_taps), term.reading))
        if isinstance(source, Ensemble):
            source.check(term.name, term.reader, getattr(term, "predictions", None))
            if not term.hears_ensembles:
                raise WiringError(
                    f"{term.name}: the predictions that it compares have no mean over several models; add a term for each of "
                    f"{', '.join(source.members)}, source={source.members[0]!r}"
                )
            if any(found != readings[0] for found in readings):
                raise WiringError(f"{term.name}: the members of the Ensemble {source.name!r} are not of one kind")

    @property
    def _leaves(self) -> list[str]:
        """The sources with a model of their own."""
        return [name for name, source in self.sources.items() if source.members == (name,)]

    def members(self, source: str) -> tuple[str, ...]:
        """Return the names of the models that a source consists of."""
        return members(self.sources, source)

    def taps(self, model: str) -> list[Tap]:
        """Return the taps of all terms on one model."""
        return taps_of(model, self.all_terms, self.sources)

    def _tell_of_frozen(self, recordings: Mapping[str, Recording]) -> None:
        """Warn about terms whose student features are frozen, so that only their adapters would learn."""
        for term in self.all_terms:
            frozen = ", ".join(str(tap) for tap in term.student_taps if recordings[term.listener].frozen(tap))
            if frozen:
                logger.warning(
                    "%s: no trained parameter of the student contributes to %s (frozen_stages?), so that it learns nothing there; "
                    "tap a later module",
                    term.name,
                    frozen,
                )

    # Looking at it.

    @property
    def all_terms(self) -> list[Term]:
        """The terms in order, as :func:`~kdgraft.directions.directed` gives them."""
        return [term for term in self.terms.values() if isinstance(term, Term)]

    @property
    def teacher(self) -> Source:
        """The only source, or the first of several."""
        return next(iter(self.sources.values()))

    @property
    def rows(self) -> list[WiringRow]:
        """The wiring, one row per pair of tensors."""
        return [row for term in self.all_terms for row in term.rows]

    def replays(self, *terms: Term) -> bool:
        """Return true if some term, by default of all, taps the part of a teacher that is replayed."""
        return self._rehearsal.replays(terms or self.all_terms)

    def active(self, at: Step) -> list[Term]:
        """Return the terms whose weight is not 0 at this step."""
        return [term for term in self.all_terms if term.weight_at(at) != 0]

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """Return the denominators on this batch of those terms that know them before the forward pass."""
        found = {term.name: term.count(batch) for term in self.all_terms}
        return {name: count for name, count in found.items() if count is not None}

    def load(self) -> None:
        """Read the weights of sources that are not loaded yet."""
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
        parts: float = 1,
        run_loss: RunLoss | None = None,
    ) -> Iterator[StepInProgress]:
        """Record everything that the terms of one step need, while the body runs the student on the host's own loss.

        All processes must take part in the step. Without active terms only the student and its peers run.

        Args:
            student: the student, whose modules are recorded.
            batch: the facts about the batch for terms, or a function that returns them for the student and for each peer.
            at: the position in training.
            run_source: runs a source's model; for a peer it runs the host's own loss, and its result is kept in ``outputs``.
            device: the device for the zero losses of inactive terms.
            totals: for a batch in parts (gradient accumulation), each term's denominator over all parts and all processes, from
                :meth:`counts`; the losses of the parts then add up to the loss of the whole batch.
            parts: number of parts, or the batch's size by this part's; a term without a total weighs the part by its inverse.
            run_loss: runs a source's model on the host's own loss, and returns it; for terms that train networks on it.

        Yields:
            The step; call its ``losses`` after the body.
        """
        active = self.active(at)
        where = torch.device(device)
        current = StepInProgress(
            self.sources, self.all_terms, active, batch, student, at, where, totals or {}, parts, self.dropped
        )
        if run_loss is not None:
            current.examiners = examiners(active, self.sources, self._rehearsal.recorders, run_loss, current.device)
        current.passes = passes(active, self.sources, self._rehearsal.recorders, student, where)
        for source in self.sources.values():
            source.begin(student, at)
        heard = {name for term in active if not term.alone for name in (term.listener, *self.members(term.source))}
        live = {n for term in active if term.takes_gradients for n in (term.listener, *self.members(term.source))}
        for name, recorder in self._rehearsal.recorders.items():
            recorder.by_input = name in live
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
        turn = self._turns.next(at.iteration)
        for place, name in enumerate(self.peers):
            source = self.sources[name]
            with own_random_stream(place, *turn), self._rehearsal.recorders[name].record(source.model) as recording:
                current.outputs[name] = run_source(source)
            current.recordings[name] = source.marked(recording)
        for name in heard & self._rehearsal.replayers.keys():
            self._run_replay(current, name)

    def record(self, name: str, run_source: RunSource, batch: Batch, device: torch.device) -> Recording:
        """Record a source that does not train.

        The source has its own random stream, so that the student draws the same numbers as without a teacher.
        """
        source = self.sources[name]
        with own_random_stream():
            found = source.record(self._rehearsal.recorders[name], lambda: run_source(source), batch, device)
        return source.marked(found)

    def _run_replay(self, current: StepInProgress, name: str) -> None:
        """Run the part of a teacher that processes the student's proposals."""
        replay, model, first = self._rehearsal.replay, self.sources[name].model, current.recordings[name]
        assert replay is not None
        with own_random_stream(), self.sources[name].context(current.device.type):
            part = self._rehearsal.replayers[name].record_prefix(
                model, lambda: replay.run(model, current.recordings[STUDENT], first, current.batch)
            )
        current.recordings[name] = first.joined(part)

    # Its state.

    def live_state(self) -> dict[str, Any]:
        """Return the state of terms, sources and counters, which a resumed run needs beside the student and the optimizer."""
        return {
            "terms": dict(self.terms.state_dict()),
            "dropped": dict(self.dropped),
            "hidden": {term.name: state for term in self.all_terms if (state := term.kept_state())},
            "sources": {name: state for name, source in self.sources.items() if (state := source.state())},
        }

    def load_live_state(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`live_state`.

        Raises:
            DistillError: the state belongs to other terms or sources.
        """
        self.check_live_state(state)
        self.terms.load_state_dict(dict(state["terms"]))
        self.load_beyond_modules(state)
        self.dropped.update({name: int(n) for name, n in state["dropped"].items() if name in self.dropped})

    def check_live_state(self, state: Mapping[str, Any]) -> None:
        """Raise a :class:`DistillError` unless a :meth:`live_state` belongs to these terms and sources."""
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
        """Restore that part of :meth:`live_state` which is neither a parameter nor a buffer."""
        hidden = state.get("hidden", {})
        for term in self.all_terms:
            if term.name in hidden:
                term.load_kept_state(hidden[term.name])
        for name, own in state.get("sources", {}).items():
            self.sources[name].load_state(own)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Engine:
        super()._apply(fn, recurse)
        for source in self.sources.values():
            source.apply(fn)
        return self
