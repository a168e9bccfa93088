"""Terms: name + taps + adapter + region + loss + weight schedule."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..auxiliary import Auxiliary
from ..batch import Batch
from ..errors import DistillError, check_number
from ..losses import Ratio
from ..readers import Reader, Taps, paired, parse_taps
from ..registry import TERMS, Registry
from ..schedules import Step, build_schedule
from ..sources import STUDENT
from ..taps import Recording, Tap
from ..wiring import Wiring, WiringRow


class Term(nn.Module):
    """Base of all terms. A subclass names its taps in ``__init__``, checks and sizes itself in :meth:`wire` and computes.

    Args:
        weight: factor on the loss, >= 0.
        schedule: of the weight over training; see :func:`kdgraft.schedules.build_schedule`.
        name: how it is logged and how its parameters are called; the class name in snake case by default.
        source: the name of the source that it listens to.
    """

    student_taps: Sequence[Tap] = ()
    teacher_taps: Sequence[Tap] = ()
    compares_classes = False
    """Whether the term compares class outputs, so that both models must have the same class names."""
    hears_ensembles = False
    """Whether the term reads predictions through :func:`~kdgraft.sources.combined`, so that an Ensemble can be its source."""
    reading: Any = None
    """Beside its taps, how the term reads its source; the members of an Ensemble must be read alike. Set by :meth:`prepare`."""
    host_losses: Sequence[str] = ()
    """Which of the host's own losses the term takes a share of; empty: all of them."""
    host_share: float = 1.0
    """What those losses count while the term is active."""
    reader: Reader
    """Reads the tensors of both models as their host means them. Set by the engine, before :meth:`prepare`."""
    listener = STUDENT
    """The name of the model that learns: the student, or in the twin of a term on a peer that peer."""

    def __init__(
        self, *, weight: float = 1.0, schedule: Any = None, name: str | None = None, source: str = "teacher"
    ) -> None:
        super().__init__()
        kind = type(self).__name__
        check_number(kind, "weight", weight)
        self.weight = float(weight)
        self.schedule = build_schedule(schedule)
        check_number(kind, "weight times the schedule's largest factor", self.weight * self.schedule.largest)
        self.name = (
            name if name is not None else re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", kind.removesuffix("Loss")).lower()
        )
        if not isinstance(self.name, str) or not re.fullmatch(r"\w+", self.name) or hasattr(nn.ModuleDict, self.name):
            raise DistillError(
                f"{kind}: a name is letters, digits and underscores, and not a method's, got {self.name!r}"
            )
        if "loss" in self.name:
            raise DistillError(
                f"{kind}: a name must not contain 'loss' (hosts add up whatever is called so), got {self.name!r}"
            )
        if not isinstance(source, str):
            raise DistillError(f"{kind}: source must be the name of a source, got {source!r}")
        self.source = source
        self.auxiliaries: dict[str, Auxiliary] = {}
        """Networks that the term trains itself, beside the student."""
        self.rows: list[WiringRow] = []
        self.monitor: dict[str, Tensor] = {}
        """Figures of the last step that are logged as ``distill.<term>.<key>`` and are no losses; no key contains "loss"."""

    def mirrored(self) -> Term:
        """The twin in which the source listens to the student; made before either is wired."""
        twin = copy.deepcopy(self)
        twin.listener, twin.source = self.source, STUDENT
        twin.student_taps, twin.teacher_taps = self.teacher_taps, self.student_taps
        twin.name = f"{self.name}_of_{self.source}"
        return twin

    def hidden_state(self) -> dict[str, Any]:
        """What a resumed run needs beyond parameters and buffers: an optimizer, a random state, a counter."""
        return {name: auxiliary.state() for name, auxiliary in self.auxiliaries.items()}

    def load_hidden_state(self, state: Mapping[str, Any]) -> None:
        """Restores :meth:`hidden_state`."""
        for name, auxiliary in self.auxiliaries.items():
            auxiliary.load(state[name])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Term:
        super()._apply(fn, recurse)
        for auxiliary in self.auxiliaries.values():
            auxiliary.apply(fn)
        return self

    def weight_at(self, step: Step) -> float:
        """The weight at this step."""
        return self.weight * self.schedule(step)

    def check_settings(self, reader: type[Reader]) -> None:
        """Raise a :class:`DistillError` for a setting that means nothing in the host of this reader."""

    def prepare(self, student: nn.Module, teacher: nn.Module) -> None:
        """Looks at both models before the dry run: settles taps that depend on them, refuses what it can refuse already."""

    def wire(self, wiring: Wiring) -> None:
        """Checks this student and teacher and builds the trainable parts. Called once.

        Raises:
            WiringError: this term cannot work on them; says why.
        """

    def forward(self, student: Recording, teacher: Recording, batch: Batch) -> Ratio:
        """This process's sum and count of the loss, before the weight."""
        raise NotImplementedError

    def count(self, batch: Batch) -> Tensor | None:
        """The denominator that :meth:`forward` will give, from the batch alone; ``None`` where only the pass can tell."""
        return None

    def row(
        self, student: Any, teacher: Any, *, taps: tuple[Tap, Tap], adapter: str = "–", region: str = "–"
    ) -> WiringRow:
        """A line for ``kdgraft check``; ``student`` and ``teacher`` are tensors or texts."""
        schedule = "" if type(self.schedule).__name__ == "Constant" else f" × {self.schedule!r}"
        return WiringRow(
            self.name,
            str(taps[0]),
            _shape(student),
            adapter,
            str(taps[1]),
            _shape(teacher),
            region,
            f"{self.weight:g}{schedule}",
        )


class TapTerm(Term):
    """A term that compares tapped tensors one to one.

    Args:
        tap: one tap or several, on both models; ``student_tap`` and ``teacher_tap`` where the two differ. Where the host has a
            tap of its own for what the term reads, that is the default.
    """

    reads: str | None = None
    """Which of the host's default taps the term takes; see :attr:`kdgraft.readers.Reader.default_taps`."""

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

    def _check_taps(self, given: Sequence[Any]) -> None:
        for side, taps in zip(("student_tap", "teacher_tap"), given, strict=True):
            if taps is None:
                raise DistillError(
                    f"{type(self).__name__} needs a tap, or both student_tap and teacher_tap; {side} is missing"
                )

    def prepare(self, student: nn.Module, teacher: nn.Module) -> None:
        default = self.reader.default_taps.get(self.reads or "")
        found = [
            taps or ([] if default is None else [Tap.parse(default)]) for taps in (self.student_taps, self.teacher_taps)
        ]
        self._check_taps(found)
        self.student_taps, self.teacher_taps = (
            [self.reader.settle(tap, model) for tap in taps]
            for taps, model in zip(found, (student, teacher), strict=True)
        )
        self.reading = self.reader.reading

    def pairs(self, student: Recording, teacher: Recording) -> list[tuple[Tensor, Tensor, Tap, Tap]]:
        """The tensors of both models side by side, each with its tap.

        Raises:
            WiringError: the taps yield different numbers of tensors.
        """
        return paired(self.reader, (self.student_taps, self.teacher_taps), student, teacher)


def build_terms(specs: Sequence[Any], registry: Registry = TERMS, reader: type[Reader] = Reader) -> list[Term]:
    """Terms from a list of names, dicts and instances; a second term of one name becomes ``name_2``.

    Args:
        specs: the list.
        registry: where names are looked up.
        reader: the host's, which says what else terms on predictions take.
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
            raise DistillError(f"terms lists one {type(term).__name__} twice; build a second one")
        stem, number = term.name, 1
        while term.name in terms:
            number += 1
            term.name = f"{stem}_{number}"
        terms[term.name] = term
    return list(terms.values())


def mean_of(ratios: Sequence[Ratio]) -> Ratio:
    """The mean of several losses, each with its own denominator."""
    numerators, denominators = sum_of(ratios)
    return Ratio(numerators / len(ratios), denominators)


def sum_of(ratios: Sequence[Ratio]) -> Ratio:
    """The sum of several losses, each with its own denominator."""
    numerators, denominators = zip(*ratios, strict=True)
    return Ratio(torch.stack(numerators), torch.stack(denominators))


def check_choice(term: Term, name: str, value: Any, choices: Sequence[str]) -> None:
    """Raises a :class:`DistillError` unless a setting of a term is one of these."""
    if value not in choices:
        raise DistillError(f"{type(term).__name__}: {name} must be one of {', '.join(choices)}, got {value!r}")


def _shape(value: Any) -> str:
    return "×".join(map(str, value.shape)) if isinstance(value, Tensor) else str(value)
