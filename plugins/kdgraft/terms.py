"""Terms: name + taps + adapter + region + loss + weight schedule."""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .adapters import AdapterKind, build_adapter
from .auxiliary import Auxiliary
from .distributed import total_over_ranks, world_size
from .errors import DistillError, WiringError, check_flag, check_number, check_share
from .losses import Ratio, channel_wise, hint, logit_matching, mixed_targets, pearson, soft_targets, weighted_ratio
from .losses.soft_targets import check_temperature
from .regions import All, Batch, Region
from .registry import LOSSES, REGIONS, TERMS, Registry
from .schedules import Step, build_schedule
from .sources import STUDENT, EnsembleRecording, Source, combined
from .taps import Recording, Tap

Taps = str | Sequence[str]


@dataclass
class Wiring:
    """What a term is wired to: both models, what the dry run recorded, and which :class:`Batch` fields the host fills.

    The student is whoever listens, the teacher whoever is listened to.
    """

    student: nn.Module
    teacher: nn.Module
    student_recording: Recording
    teacher_recording: Recording
    fields: frozenset[str] = frozenset()
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What else the host knows before training that its own terms ask for."""
    holder: Source | None = None
    """The source of the teacher's recording, for terms that run parts of its model: deep copies share a frozen one."""
    outside: tuple[str, ...] = ()
    """Modules whose maps are no pictures of the image (heads on regions of interest)."""

    def in_image(self, tap: Tap) -> bool:
        """Whether the positions of what a tap reads lie in the image, so that a region can place them."""
        return not any(tap.below(path) for path in self.outside)


class WiringRow(NamedTuple):
    """One line of ``kdgraft check``."""

    term: str
    student_tap: str
    student_shape: str
    adapter: str
    teacher_tap: str
    teacher_shape: str
    region: str
    weight: str


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
        tap: one tap or several, on both models; ``student_tap`` and ``teacher_tap`` where the two differ.
    """

    def __init__(
        self,
        tap: Taps | None = None,
        *,
        student_tap: Taps | None = None,
        teacher_tap: Taps | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        for side, own in (("student_tap", student_tap), ("teacher_tap", teacher_tap)):
            if tap is None and own is None:
                raise DistillError(
                    f"{type(self).__name__} needs a tap, or both student_tap and teacher_tap; {side} is missing"
                )
        self.student_taps = _parse(student_tap if student_tap is not None else tap)
        self.teacher_taps = _parse(teacher_tap if teacher_tap is not None else tap)

    def pairs(self, student: Recording, teacher: Recording) -> list[tuple[Tensor, Tensor, Tap, Tap]]:
        """The tensors of both models side by side, each with its tap.

        Raises:
            WiringError: the taps yield different numbers of tensors.
        """
        left = [(tensor, tap) for tap in self.student_taps for tensor in self.tensors_of(student, tap)]
        right = [(tensor, tap) for tap in self.teacher_taps for tensor in self.tensors_of(teacher, tap)]
        if len(left) != len(right):
            raise WiringError(
                f"{self.name}: the student's {_names(self.student_taps)} yields {len(left)} tensors "
                f"{[tuple(t.shape) for t, _ in left]}, the teacher's {_names(self.teacher_taps)} {len(right)} "
                f"{[tuple(t.shape) for t, _ in right]}; pick as many of each with [0], [1] …"
            )
        return [(s, t, s_tap, t_tap) for (s, s_tap), (t, t_tap) in zip(left, right, strict=True)]

    def scores(self, student: Recording, teacher: Recording) -> list[tuple[Tensor, Tensor]]:
        """Class scores side by side, the teacher's in the student's order of classes; of an Ensemble their mean."""
        members = teacher.members if isinstance(teacher, EnsembleRecording) else [teacher]
        pairs = {member.model: self.pairs(student, member) for member in members}
        found = []
        for place, (s, t, _, _) in enumerate(pairs[members[0].model]):
            dim = class_dim(t)

            def read(member: Recording, place: int = place, dim: int = dim) -> Tensor:
                return in_order(pairs[member.model][place][1], member.class_order, dim)

            found.append((s, combined(teacher, read, "sigmoid" if t.shape[dim] == 1 else "softmax", dim)))
        return found

    def tensors_of(self, recording: Recording, tap: Tap) -> list[Tensor]:
        """What the term compares of a tap; a host's term may bring it into another form first."""
        return recording.tensors(tap)


class AdaptedTerm(TapTerm):
    """Base of terms on features: the student's pass through an adapter to the teacher's, and a region says what counts.

    Args:
        tap, student_tap, teacher_tap: maps ``(B, C, H, W)`` or vectors ``(…, C)``.
        adapter: ``"auto"``, ``"conv1x1"``, ``"linear"`` or ``"none"``; sized by the dry run, one per tensor.
        region: ``"all"`` (padding excluded, of images and of texts), ``"foreground"`` where the host has boxes, or a third party's.
    """

    def __init__(
        self, tap: Taps | None = None, *, adapter: AdapterKind = "auto", region: Any = "all", **settings: Any
    ) -> None:
        super().__init__(tap, **settings)
        self.adapter_kind: AdapterKind = adapter
        self.region, self.region_name = build_region(region, self)
        self.adapters = nn.ModuleList()
        self.placed: list[bool] = []

    def wire(self, wiring: Wiring) -> None:
        check_region(self, self.region, self.region_name, wiring)
        for s, t, s_tap, t_tap in self.pairs(wiring.student_recording, wiring.teacher_recording):
            self.placed.append(placed(self, self.region, self.region_name, t, t_tap, wiring))
            adapter = build_adapter(self.adapter_for(s, t), s, t, f"{self.name} ({s_tap} → {t_tap})")
            self._check_adapted(adapter(s.detach(), t), t)
            self.adapters.append(adapter)
            self.rows.append(
                self.row(s, t, taps=(s_tap, t_tap), adapter=adapter_label(adapter, s, t), region=self.region_name)
            )

    def adapter_for(self, student: Tensor, teacher: Tensor) -> AdapterKind:
        """The kind of adapter between two tensors."""
        return self.adapter_kind

    def _check_adapted(self, student: Tensor, teacher: Tensor) -> None:
        """Raises a :class:`WiringError` where the term cannot compare the adapted tensor with the teacher's."""

    def aligned(
        self, student: Recording, teacher: Recording, batch: Batch
    ) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        """Tensor by tensor the adapted student's, the teacher's, and the region's weights of the positions."""
        pairs = self.pairs(student, teacher)
        for adapter, (s, t, _, t_tap), in_image in zip(self.adapters, pairs, self.placed, strict=True):
            weight = self.region(batch.at(t_tap, t), t, teacher.scale) if in_image else None
            if weight is not None:
                # Nothing outside the region may reach the gradient, not even an infinity (0 · inf is NaN).
                t = t.masked_fill((weight == 0).unsqueeze(class_dim(t)), 0)
            yield adapter(s, t), t, weight


@TERMS.register
class FeatureImitation(AdaptedTerm):
    """The student's features imitate the teacher's through an adapter, on a region, by any loss per position.

    With the defaults this is FitNets' hint (arXiv 1412.6550) with Chen et al.'s (NeurIPS 2017) adapter, on every position.
    Several tensors (the levels of a pyramid) weigh alike: the mean of their losses.

    Args:
        tap, student_tap, teacher_tap, adapter, region: see :class:`AdaptedTerm`.
        loss: a registered loss or a function that takes ``(student, teacher, dim=…, reduction="none")`` and returns a value
            per position; ``dict(type="hint", norm="l1")`` sets its arguments.
    """

    def __init__(self, tap: Taps | None = None, *, loss: Any = "hint", **settings: Any) -> None:
        super().__init__(tap, **settings)
        self.loss = _loss_function(loss)

    def _check_adapted(self, student: Tensor, teacher: Tensor) -> None:
        dim = class_dim(teacher)
        places, found = teacher.select(dim, 0).shape, self.loss(student, teacher, dim=dim, reduction="none").shape
        if found != places:
            raise WiringError(
                f"{self.name}: a loss on features gives one value a position, {tuple(places)} here, and this one gives "
                f"{tuple(found)}; take another, or a term of its own (PearsonImitation, ChannelWise)"
            )

    def forward(self, student: Recording, teacher: Recording, batch: Batch) -> Ratio:
        return mean_of([self._compare(*level) for level in self.aligned(student, teacher, batch)])

    def _compare(self, student: Tensor, teacher: Tensor, weight: Tensor | None) -> Ratio:
        items = self.loss(student, teacher, dim=class_dim(teacher), reduction="none")
        return weighted_ratio(items, weight)


@TERMS.register
class Hint(FeatureImitation):
    """FitNets' hint (arXiv 1412.6550): feature imitation of one layer, every position, squared error."""


@TERMS.register
class PearsonImitation(AdaptedTerm):
    """Features that correlate with the teacher's, channel by channel, whatever their scale (PKD; Cao et al. 2022, arXiv 2207.02039).

    The correlation is over all positions of the batch, on several processes over those of all of them. The losses of several
    tensors add up, as the authors' do: their weights, 6 for Faster R-CNN and 10 for RetinaNet, stand before each level.

    Args:
        tap: maps ``(B, C, H, W)`` or vectors ``(…, C)``.
        adapter: for channels that differ; ``"auto"`` is none where they agree and a 1×1 convolution where they do not.
        region: ``"all"`` (padding excluded) or another; positions at weight 0 take no part.
    """

    def adapter_for(self, student: Tensor, teacher: Tensor) -> AdapterKind:
        return adapter_where_channels_differ(self.adapter_kind, student, teacher)

    def forward(self, student: Recording, teacher: Recording, batch: Batch) -> Ratio:
        return sum_of([self._compare(*level) for level in self.aligned(student, teacher, batch)])

    def _compare(self, student: Tensor, teacher: Tensor, weight: Tensor | None) -> Ratio:
        dim = class_dim(teacher)
        share = 1 / world_size()  # every process computes the same
        value = pearson(student, teacher, dim=dim, weight=weight, total=total_over_ranks)
        return Ratio(value * share, value.new_full((), share))


@TERMS.register
class ChannelWise(TapTerm):
    """Channel-wise distillation (CWD): each channel's softmax over positions (Shu et al. 2021, arXiv 2011.13256).

    Several taps weigh alike: the mean of their losses. For logits the authors take weight 3 and temperature 4.

    Args:
        tap: maps ``(B, C, H, W)``: features, or class logits.
        temperature: T > 0.
        adapter: for channels that differ; ``"auto"`` is none where they agree and a 1×1 convolution where they do not.
        region: ``"all"`` (padding excluded) or another; positions at weight 0 take no part.
    """

    def __init__(
        self,
        tap: Taps | None = None,
        *,
        temperature: float = 4.0,
        adapter: AdapterKind = "auto",
        region: Any = "all",
        **settings: Any,
    ) -> None:
        super().__init__(tap, **settings)
        check_temperature(temperature)
        self.temperature = temperature
        self.adapter_kind: AdapterKind = adapter
        self.region, self.region_name = build_region(region, self)
        self.adapters = nn.ModuleList()
        self.placed: list[bool] = []
        self.align_corners = False

    def wire(self, wiring: Wiring) -> None:
        check_region(self, self.region, self.region_name, wiring)
        for s, t, s_tap, t_tap in self.pairs(wiring.student_recording, wiring.teacher_recording):
            check_maps(self, s, t, s_tap, t_tap)
            self.placed.append(placed(self, self.region, self.region_name, t, t_tap, wiring))
            kind = adapter_where_channels_differ(self.adapter_kind, s, t)
            adapter = build_adapter(kind, s, t, f"{self.name} ({s_tap} → {t_tap})", align_corners=self.align_corners)
            self.adapters.append(adapter)
            self.rows.append(
                self.row(s, t, taps=(s_tap, t_tap), adapter=adapter_label(adapter, s, t), region=self.region_name)
            )

    def forward(self, student: Recording, teacher: Recording, batch: Batch) -> Ratio:
        ratios = []
        pairs = self.pairs(student, teacher)
        for adapter, (s, t, _, _), in_image in zip(self.adapters, pairs, self.placed, strict=True):
            if self.compares_classes:
                t = in_order(t, teacher.class_order)
            valid = self.region(batch, t, teacher.scale) if in_image else None
            items = channel_wise(adapter(s, t), t, self.temperature, valid=valid, reduction="none")
            present = None if valid is None else (valid.flatten(1) > 0).any(1, keepdim=True)
            ratios.append(weighted_ratio(items, present))
        return mean_of(ratios)


@TERMS.register
class SoftTargets(TapTerm):
    """Softened class probabilities (Hinton et al. 2015, arXiv 1503.02531), mean over items; optionally mixed with the labels.

    Several taps weigh alike: the mean of their losses.

    Args:
        tap: class logits ``(N, C)``, ``(…, C)`` or ``(B, C, H, W)``; the model's output by default.
        temperature: T > 0.
        hard_weight: λ in λ·CE(labels) + (1−λ)·soft; 0 leaves the hard loss to the host. Above 0 the batch needs labels, and the
            host's own loss does not count: the term has it.
    """

    hears_ensembles = True

    def __init__(
        self,
        temperature: float = 4.0,
        *,
        hard_weight: float = 0.0,
        tap: Taps = "",
        **settings: Any,
    ) -> None:
        super().__init__(tap, **settings)
        check_temperature(temperature)
        check_share("SoftTargets", "hard_weight", hard_weight)
        self.temperature, self.hard_weight = temperature, hard_weight
        if hard_weight:
            self.host_share = 0.0

    def wire(self, wiring: Wiring) -> None:
        if self.hard_weight and "labels" not in wiring.fields:
            raise WiringError(f"{self.name}: hard_weight={self.hard_weight} needs labels, not given here")
        _wire_logits(self, wiring)

    def forward(self, student: Recording, teacher: Recording, batch: Batch) -> Ratio:
        return mean_of([self._compare(s, t, batch) for s, t in self.scores(student, teacher)])

    def _compare(self, student: Tensor, teacher: Tensor, batch: Batch) -> Ratio:
        dim = class_dim(student)
        if not self.hard_weight:
            return weighted_ratio(soft_targets(student, teacher, self.temperature, dim=dim, reduction="none"))
        if batch.labels is None:
            raise DistillError(
                f"{self.name}: hard_weight={self.hard_weight} needs targets; pass targets=… to the distiller"
            )
        mixed = mixed_targets(
            student,
            teacher,
            batch.labels,
            temperature=self.temperature,
            hard_weight=self.hard_weight,
            dim=dim,
            reduction="none",
        )
        return weighted_ratio(mixed, batch.labels != -100)


@TERMS.register
class LogitMatching(TapTerm):
    """Squared error on the logits, the high-temperature limit of soft targets (Ba & Caruana 2014, arXiv 1312.6184).

    Args:
        tap: logits ``(N, C)``, ``(…, C)`` or ``(B, C, H, W)``; the model's output by default.
        center: ignore a difference of the mean logit, as softmax does.
    """

    hears_ensembles = True

    def __init__(
        self,
        *,
        center: bool = False,
        tap: Taps = "",
        **settings: Any,
    ) -> None:
        super().__init__(tap, **settings)
        check_flag("LogitMatching", "center", center)
        self.center = center

    def wire(self, wiring: Wiring) -> None:
        _wire_logits(self, wiring)

    def forward(self, student: Recording, teacher: Recording, batch: Batch) -> Ratio:
        return mean_of(
            [
                weighted_ratio(logit_matching(s, t, center=self.center, dim=class_dim(s), reduction="none"))
                for s, t in self.scores(student, teacher)
            ]
        )


def build_terms(specs: Sequence[Any], registry: Registry = TERMS) -> list[Term]:
    """Terms from a list of names, dicts and instances; a second term of one name becomes ``name_2``."""
    if isinstance(specs, (str, dict)) or not isinstance(specs, Sequence):
        raise DistillError(f"terms must be a list, got {specs!r}")
    terms: dict[str, Term] = {}
    for spec in specs:
        term = registry.build(spec)
        if not isinstance(term, Term):
            raise DistillError(f"a term is a name, a dict with a type, or a Term; got {spec!r}")
        if any(term is other for other in terms.values()):
            raise DistillError(f"terms lists one {type(term).__name__} twice; build a second one")
        stem, number = term.name, 1
        while term.name in terms:
            number += 1
            term.name = f"{stem}_{number}"
        terms[term.name] = term
    return list(terms.values())


def _loss_function(spec: Any) -> Callable[..., Tensor]:
    settings: dict[str, Any] = {}
    if isinstance(spec, dict):
        settings = {key: value for key, value in spec.items() if key != "type"}
        spec = spec.get("type")
    function = hint if spec == "hint" else LOSSES.get(spec) if isinstance(spec, str) else spec
    if not callable(function):
        raise DistillError(f"loss must be a name, a dict with a type, or a function; got {spec!r}")
    takes = inspect.signature(function).parameters
    unknown = [key for key in settings if key not in takes or key in ("dim", "weight", "reduction")]
    if unknown or not {"dim", "reduction"} <= set(takes):
        name = getattr(function, "__name__", repr(function))
        problem = f"takes no {unknown[0]!r}" if unknown else "must take dim and reduction to be used on features"
        raise DistillError(f"loss {name} {problem}")
    return lambda student, teacher, **place: function(student, teacher, **settings, **place)


def _wire_logits(term: TapTerm, wiring: Wiring) -> None:
    for s, t, s_tap, t_tap in term.pairs(wiring.student_recording, wiring.teacher_recording):
        if s.shape != t.shape:
            raise WiringError(
                f"{term.name}: student {s_tap} {tuple(s.shape)} and teacher {t_tap} {tuple(t.shape)} must agree; "
                "class logits are compared class by class"
            )
        term.rows.append(term.row(s, t, taps=(s_tap, t_tap)))


def class_dim(tensor: Tensor) -> int:
    """Where classes or channels are: of maps ``(B, C, H, W)`` second, else last."""
    return 1 if tensor.ndim == 4 else -1


def mean_of(ratios: Sequence[Ratio]) -> Ratio:
    """The mean of several losses, each with its own denominator."""
    numerators, denominators = sum_of(ratios)
    return Ratio(numerators / len(ratios), denominators)


def sum_of(ratios: Sequence[Ratio]) -> Ratio:
    """The sum of several losses, each with its own denominator."""
    numerators, denominators = zip(*ratios, strict=True)
    return Ratio(torch.stack(numerators), torch.stack(denominators))


def in_order(scores: Tensor, order: Tensor | None, dim: int = 1) -> Tensor:
    """The teacher's class scores, classes along ``dim``, in the student's order of classes.

    One channel scores the second of two classes; in the other order that is its negative.
    """
    if order is None:
        return scores
    return -scores if scores.shape[dim] == 1 else scores.index_select(dim, order)


def check_choice(term: Term, name: str, value: Any, choices: Sequence[str]) -> None:
    """Raises a :class:`DistillError` unless a setting of a term is one of these."""
    if value not in choices:
        raise DistillError(f"{type(term).__name__}: {name} must be one of {', '.join(choices)}, got {value!r}")


def build_region(spec: Any, term: Term) -> tuple[Region, str]:
    """A region from its name, a dict or an instance, and what to call it."""
    region = REGIONS.build(spec)
    if not isinstance(region, Region):
        raise DistillError(
            f"{type(term).__name__}: a region is a name or a Region, one of {', '.join(REGIONS)}; got {spec!r}"
        )
    return region, spec if isinstance(spec, str) else type(region).__name__


def check_region(term: Term, region: Region, name: str, wiring: Wiring) -> None:
    """Raises a :class:`WiringError` where the host does not give what the region needs."""
    missing = region.needs - wiring.fields
    if missing:
        raise WiringError(f"{term.name}: region {name!r} needs {', '.join(sorted(missing))}, not given here")


def placed(term: Term, region: Region, name: str, teacher: Tensor, tap: Tap, wiring: Wiring) -> bool:
    """Whether a region has to place what is tapped in the image; maps of proposals count alike in region ``"all"``.

    Raises:
        WiringError: the region has to, and cannot.
    """
    if isinstance(region, All) and not wiring.in_image(tap):
        return False
    if "tokens" in wiring.fields and teacher.ndim > 3:
        raise WiringError(
            f"{term.name}: region {name!r} cannot leave the padding out of {tap} {tuple(teacher.shape)}; tap states (B, L, C) of "
            "tokens"
        )
    needed = not isinstance(region, All) or "image_sizes" in wiring.fields
    if needed and (teacher.ndim != 4 or not wiring.in_image(tap)):
        raise WiringError(
            f"{term.name}: region {name!r} cannot place the positions of {tap} {tuple(teacher.shape)} in the image; "
            + ("tap a map (B, C, H, W), such as the output of a stage" if wiring.in_image(tap) else "use region='all'")
        )
    return True


def check_maps(term: Term, student: Tensor, teacher: Tensor, student_tap: Tap, teacher_tap: Tap) -> None:
    """Raises a :class:`WiringError` unless both tensors are maps."""
    if student.ndim != 4 or teacher.ndim != 4:
        raise WiringError(
            f"{term.name}: {student_tap} {tuple(student.shape)} and {teacher_tap} {tuple(teacher.shape)} must be maps "
            "(B, C, H, W)"
        )


def adapter_where_channels_differ(kind: AdapterKind, student: Tensor, teacher: Tensor) -> AdapterKind:
    """What ``"auto"`` is for terms that leave channels alone where they agree."""
    dim = class_dim(teacher)
    return "none" if kind == "auto" and student.shape[dim] == teacher.shape[dim] else kind


def adapter_label(adapter: nn.Module, student: Tensor, teacher: Tensor) -> str:
    """What ``kdgraft check`` says of an adapter."""
    resized = student.ndim == 4 and student.shape[-2:] != teacher.shape[-2:]
    return f"{type(adapter).__name__} {adapter.extra_repr()}".strip() + (", resize" if resized else "")


def _parse(taps: Any) -> list[Tap]:
    if isinstance(taps, (list, tuple)) and not taps:
        raise DistillError("a term needs at least one tap, got an empty list")
    return [Tap.parse(tap) for tap in (taps if isinstance(taps, (list, tuple)) else [taps])]


def _names(taps: Sequence[Tap]) -> str:
    return ", ".join(f"'{tap}'" for tap in taps)


def _shape(value: Any) -> str:
    return "×".join(map(str, value.shape)) if isinstance(value, Tensor) else str(value)
