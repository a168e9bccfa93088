"""Base classes of terms, and building terms from configs."""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from ..auxiliary import Auxiliary
from ..balance import AutoWeight, Gauge, Norms, Weight
from ..batch import Batch
from ..distributed import rank
from ..errors import DistillError, WiringError, check_number
from ..losses import Ratio
from ..passes import Passes
from ..readers import NEEDS, Reader, Taps, paired, parse_taps
from ..recorder import Change
from ..registry import TERMS, Registry, call
from ..schedules import Step, build_schedule
from ..sources import STUDENT, Extractor, FeatureTeacher, Source
from ..sources.features import LAST
from ..taps import Recording, Tap
from ..wiring import Wiring, WiringRow

T = TypeVar("T")
logger = logging.getLogger("kdgraft")

Examiner = Callable[[Change], Tensor]
"""Runs a frozen source on the host's own loss, with the tensors of the term's taps changed; returns the loss, with gradient."""


class Term(nn.Module):
    """Base of all terms: a subclass declares its taps, builds its trainable parts in :meth:`wire` and implements :meth:`forward`.

    Args:
        weight: factor on the loss, >= 0; ``"auto"``, or ``dict(type="auto", share=…)``, sets it once from the first steps, by the
            term's share of the gradient: see :class:`~kdgraft.balance.AutoWeight`.
        schedule: schedule of the weight over training; see :func:`kdgraft.schedules.build_schedule`.
        name: name of the term in logs and of its parameters; the class name in snake case by default.
        source: the name of the source that the student imitates.

    Example:
        >>> class Sparsity(Term):
        ...     student_taps = teacher_taps = [Tap.parse("conv")]
        ...
        ...     def forward(self, student, teacher, batch):
        ...         return weighted_ratio(student[self.student_taps[0]].abs())
        >>> Distiller(student, teacher, [Sparsity(weight=0.5, schedule=WarmUp(10))], example=images)(images).figures
        {'distill.sparsity.weight': tensor(0.)}
    """

    needs: ClassVar[tuple[str, ...]] = ()
    """Kinds of tensors and facts that the term needs, of :data:`kdgraft.readers.NEEDS`; a host that lacks one refuses the term."""
    student_taps: Sequence[Tap] = ()
    teacher_taps: Sequence[Tap] = ()
    compares_classes = False
    """True if the term compares class outputs, so that both models must have the same class names."""
    hears_ensembles = False
    """True if the term reads predictions through :func:`~kdgraft.sources.combined`, so that its source may be an Ensemble."""
    hears_features = False
    """True if the term reads nothing of its source but features, so that the source may be a :class:`~kdgraft.FeatureTeacher`."""
    takes_gradients = False
    """True if the term differentiates predictions by the input, so that its source runs with gradients while it is active."""
    reading: Any = None
    """Settings, beside the taps, with which the source is read; equal for all members of an Ensemble. :meth:`prepare` sets it."""
    host_losses: Sequence[str] = ()
    """Names of the host's own losses that the term reduces; empty for all of them."""
    host_share: float = 1.0
    """Factor on those losses while the term is active."""
    reader: Reader
    """Interprets the tensors of both models. The engine sets it before :meth:`prepare`."""
    examines = False
    """True if the term runs the source on the host's own loss, so that both models must have the same classes in one order."""
    runs_again = False
    """True if the term runs its source and the student on other inputs within the step, through :attr:`passes`."""
    runs_teacher = False
    """True if the term runs a part of its source itself, so that what a store has of the source's own pass is not enough."""
    passes: Passes | None = None
    """Runs both models on other inputs. The engine sets it for :meth:`forward` of a term that :attr:`runs_again`."""
    examiner: Examiner | None = None
    """Runs the source on the host's own loss, with changed features. The engine sets it for :meth:`forward`, where the host can."""
    listener = STUDENT
    """The name of the model that learns: the student, or, in the twin of a term on a peer, the peer."""
    alone = False
    """True for a term without a loss, which hears no source and has a twin on every peer."""
    origin = ""
    """The name of the user's term that this one was made from; empty for the user's own."""
    part = 1.0
    """This term's part of the user's: the weight of the user's term, and what it takes of the host's loss, are divided by parts."""

    def __init__(
        self, *, weight: Weight = 1.0, schedule: Any = None, name: str | None = None, source: str = "teacher"
    ) -> None:
        super().__init__()
        kind = type(self).__name__
        self.balance: Gauge | None = _auto_weight(kind, weight)
        """Sets the weight by the term's share of the gradient, or only measures the share; ``None`` does neither."""
        self.weight = 1.0 if self.balance is not None else float(weight)  # type: ignore[arg-type]
        self.schedule = build_schedule(schedule)
        check_number(kind, "weight times the schedule's largest factor", self.weight * self.schedule.largest)
        self.name = (
            name if name is not None else re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", kind.removesuffix("Loss")).lower()
        )
        if not isinstance(self.name, str) or not re.fullmatch(r"\w+", self.name) or hasattr(nn.ModuleDict, self.name):
            raise DistillError(
                f"{kind}: a name must be letters, digits and underscores, and not that of a method, got {self.name!r}"
            )
        if "loss" in self.name:
            raise DistillError(
                f"{kind}: a name must not contain 'loss' (hosts add up all values with such names), got {self.name!r}"
            )
        if not isinstance(source, str):
            raise DistillError(f"{kind}: source must be the name of a source, got {source!r}")
        self.source = source
        self.auxiliaries: dict[str, Auxiliary] = {}
        """Networks that the term trains with their own optimizers, beside the student."""
        self.rows: list[WiringRow] = []
        self.monitor: dict[str, Tensor] = {}
        """Figures of the last step, logged as ``distill.<term>.<key>``; no key may contain "loss"."""

    def between(self, listener: str, source: str) -> Term:
        """Return a copy of the term in which ``listener`` imitates ``source``; call it before the term is wired.

        Settings for the student, such as ``student_tap``, go with the student, and those for the teacher with all other models.
        """
        twin = copy.deepcopy(self)
        twin.listener, twin.source = listener, source
        twin.origin = self.origin or self.name
        twin.student_taps, twin.teacher_taps = twin.of_sides(self.student_taps, self.teacher_taps)
        return twin

    def of_sides(self, student: T, teacher: T) -> tuple[T, T]:
        """Return the settings of the listener and of the source, given those for the student and for all other models."""
        return (student if self.listener == STUDENT else teacher), (student if self.source == STUDENT else teacher)

    @property
    def told_apart(self) -> bool:
        """True if the user gave other taps for the student than for other models."""
        return list(self.student_taps) != list(self.teacher_taps)

    def weigh(self, norms: Norms | None) -> None:
        """Count a step in which the term is active, and set the weight if its share of the gradient decides it.

        Args:
            norms: the norms of the gradients in this step; ``None`` if they were not measured.

        Raises:
            DistillError: there is nothing to compare.
        """
        assert self.balance is not None
        auto = isinstance(self.balance, AutoWeight)
        if auto and norms is not None and norms.tensors == 0:
            raise DistillError(
                f"{self.name}: weight='auto' compares its gradient with that of the host's own loss, and no trained parameter of the "
                "student has both (those inside reentrant checkpoints are not seen); set weight to a number"
            )
        told = self.balance.count(None if norms is None else norms.ratio)
        if self.balance.weight is not None:
            self.weight = self.balance.weight * self.part
        if told and rank() == 0:
            logger.info("%s: %s", self.name, told)

    def kept_state(self) -> dict[str, Any]:
        """Return :meth:`hidden_state`, and that of a weight that is set by the share of the gradient."""
        auto = {"auto_weight": self.balance.state()} if isinstance(self.balance, AutoWeight) else {}
        return {**self.hidden_state(), **auto}

    def load_kept_state(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`kept_state`."""
        self.load_hidden_state(state)
        if isinstance(self.balance, AutoWeight) and "auto_weight" in state:
            self.balance.load(state["auto_weight"])
            if self.balance.weight is not None:
                self.weight = self.balance.weight * self.part

    def hidden_state(self) -> dict[str, Any]:
        """Return state beyond parameters and buffers that a resumed run needs: an optimizer, a random state, a counter."""
        return {name: auxiliary.state() for name, auxiliary in self.auxiliaries.items()}

    def load_hidden_state(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`hidden_state`."""
        for name, auxiliary in self.auxiliaries.items():
            auxiliary.load(state[name])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Term:
        super()._apply(fn, recurse)
        for auxiliary in self.auxiliaries.values():
            auxiliary.apply(fn)
        return self

    def weight_at(self, step: Step) -> float:
        """Return the weight at this step."""
        return self.weight * self.schedule(step)

    def check_settings(self, reader: type[Reader]) -> None:
        """Raise a :class:`DistillError` for a need or a setting that the host of this reader does not support."""
        for need in self.needs:
            if need in reader.lacks:
                raise DistillError(f"{type(self).__name__} needs {NEEDS[need]}: {reader.lacks[need]}")

    def prepare(self, student: nn.Module, teacher: nn.Module) -> None:
        """Inspect both models before the dry run: set the taps that depend on them, and reject unsuitable models."""

    def wire(self, wiring: Wiring) -> None:
        """Check the recordings of the dry run and build the trainable parts; called once.

        Raises:
            WiringError: the term does not work on these models; the message says why.
        """

    def forward(self, student: Recording, teacher: Recording, batch: Batch) -> Ratio:
        """Compute this process's sum and count of the loss, before the weight is applied."""
        raise NotImplementedError

    def count(self, batch: Batch) -> Tensor | None:
        """Return the denominator of :meth:`forward`, computed from the batch alone; ``None`` if it depends on the predictions."""
        return None

    def row(
        self, student: Any, teacher: Any, *, taps: tuple[Tap | str, Tap | str], adapter: str = "–", region: str = "–"
    ) -> WiringRow:
        """Build a row for ``kdgraft check``; ``student`` and ``teacher`` are tensors or texts."""
        schedule = "" if type(self.schedule).__name__ == "Constant" else f" × {self.schedule!r}"
        return WiringRow(
            self.name,
            str(taps[0]),
            _shape(student),
            adapter,
            str(taps[1]),
            _shape(teacher),
            region,
            f"{self.balance!r}{schedule}" if isinstance(self.balance, AutoWeight) else f"{self.weight:g}{schedule}",
        )


class TapTerm(Term):
    """Base of terms that compare tapped tensors in pairs.

    Args:
        tap: one tap or several, on both models; by default the host's tap for :attr:`reads`, if it has one.
        student_tap, teacher_tap: the taps of each model, where they differ. Of a :class:`~kdgraft.FeatureTeacher`, ``tap`` means the
            student alone, and ``teacher_tap`` is ``"last"`` by default.

    Example:
        >>> term = Hint(student_tap="conv", teacher_tap=["conv"], name="early")
        >>> term.student_taps == term.teacher_taps, term.name
        (True, 'early')
    """

    hears_features = True
    reads: str | None = None
    """Key of the default taps in :attr:`kdgraft.readers.Reader.default_taps`; ``None`` if the user must give taps."""

    def __init__(
        self,
        tap: Taps | None = None,
        *,
        student_tap: Taps | None = None,
        teacher_tap: Taps | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        given = [own if own is not None else tap for own in (student_tap, teacher_tap)]
        if self.reads is None:
            self._check_taps(given)
        self.student_taps, self.teacher_taps = ([] if taps is None else parse_taps(taps) for taps in given)
        self._own_teacher_tap = teacher_tap is not None

    def _check_taps(self, given: Sequence[Any]) -> None:
        for side, taps in zip(("student_tap", "teacher_tap"), given, strict=True):
            if taps is None:
                raise DistillError(
                    f"{type(self).__name__} needs a tap, or both student_tap and teacher_tap; {side} is missing"
                )

    def prepare(self, student: nn.Module, teacher: nn.Module) -> None:
        default = self.reader.default_taps.get(self.reads or "")
        if isinstance(teacher, Extractor) and not self._own_teacher_tap:
            self.teacher_taps = [Tap.parse(LAST)]
        found = [
            taps or ([] if default is None else [Tap.parse(default)]) for taps in (self.student_taps, self.teacher_taps)
        ]
        self._check_taps([taps or None for taps in found])
        self.student_taps, self.teacher_taps = (
            [self.reader.settle(tap, model) for tap in taps]
            for taps, model in zip(found, (student, teacher), strict=True)
        )
        self.reading = self.reader.reading

    def pairs(self, student: Recording, teacher: Recording) -> list[tuple[Tensor, Tensor, Tap, Tap]]:
        """Return the tensors of both models in pairs, each with its tap.

        Raises:
            WiringError: the taps of the two models yield different numbers of tensors.
        """
        return paired(self.reader, (self.student_taps, self.teacher_taps), student, teacher)


def check_heard(term: Term, source: Source | None) -> None:
    """Raise a :class:`WiringError` for a term that needs more than features of a source that has nothing else."""
    if not isinstance(source, FeatureTeacher):
        return
    examines = term.examines or term.takes_gradients or term.runs_again
    if examines or not term.hears_features:
        needs = "runs its teacher on the host's loss or on other images" if examines else "reads predictions or weights"
        raise WiringError(
            f"{term.name}: a {type(term).__name__} {needs}, and {source.name!r}, a {type(source.weighed).__name__}, gives features "
            "alone; use a term on features (FeatureImitation), or a teacher of the student's host"
        )


def _auto_weight(kind: str, weight: Any) -> AutoWeight | None:
    """Return what sets a weight that is not a number; raise a :class:`DistillError` for what is no weight."""
    settings = {"type": weight} if isinstance(weight, str) else dict(weight) if isinstance(weight, Mapping) else None
    if settings is None:
        check_number(kind, "weight", weight)
        return None
    if settings.pop("type", None) != "auto":
        raise DistillError(
            f'{kind}: weight must be a number >= 0, "auto" or dict(type="auto", share=…), got {weight!r}'
        )
    found: AutoWeight = call(AutoWeight, settings, f"{kind}: weight='auto'")
    return found


def build_terms(specs: Sequence[Any], registry: Registry = TERMS, reader: type[Reader] = Reader) -> list[Term]:
    """Build terms from a list of names, dicts and instances; a second term of the same name is renamed to ``name_2``.

    Args:
        specs: the list.
        registry: the registry in which names are looked up.
        reader: the host's reader, which defines further arguments of terms on predictions.

    Raises:
        DistillError: an entry is not a term, or has a setting that the host does not support.
    """
    if isinstance(specs, (str, dict)) or not isinstance(specs, Sequence):
        raise DistillError(f"terms must be a list, got {specs!r}")
    terms: dict[str, Term] = {}
    for spec in specs:
        term = registry.build(spec)
        if not isinstance(term, Term):
            raise DistillError(f"a term is a name, a dict with a type, or a Term; got {spec!r}")
        term.check_settings(reader)
        if any(term is other for other in terms.values()):
            raise DistillError(f"terms lists the same {type(term).__name__} twice; build a second one")
        stem, number = term.name, 1
        while term.name in terms:
            number += 1
            term.name = f"{stem}_{number}"
        terms[term.name] = term
    return list(terms.values())


def mean_of(ratios: Sequence[Ratio]) -> Ratio:
    """Return the mean of several losses, each with its own denominator."""
    numerators, denominators = sum_of(ratios)
    return Ratio(numerators / len(ratios), denominators)


def sum_of(ratios: Sequence[Ratio]) -> Ratio:
    """Return the sum of several losses, each with its own denominator."""
    numerators, denominators = zip(*ratios, strict=True)
    return Ratio(torch.stack(numerators), torch.stack(denominators))


def check_choice(term: Term, name: str, value: Any, choices: Sequence[str]) -> None:
    """Raise a :class:`DistillError` unless a setting of a term is one of ``choices``."""
    if value not in choices:
        raise DistillError(f"{type(term).__name__}: {name} must be one of {', '.join(choices)}, got {value!r}")


def _shape(value: Any) -> str:
    return "×".join(map(str, value.shape)) if isinstance(value, Tensor) else str(value)
