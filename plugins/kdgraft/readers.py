"""Readers, which interpret the tensors of a host's models.

A term of the core asks its reader where to tap a tensor, what a tapped value contains, and for aligned pairs of predictions, so
that one class of terms serves every host.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

from torch import Tensor, nn

from .batch import Batch
from .classes import class_axis
from .errors import DistillError, WiringError, check_flag
from .listing import NEEDS as NEEDS
from .pairs import Compared, Numbers, Pairs, Scores, Sides
from .sources import EnsembleRecording, combined
from .taps import Recording, Tap
from .wiring import Wiring

Taps = str | Sequence[str]


class Reader:
    """Interprets the tensors of both models for one term; this base serves plain PyTorch and assumes nothing about the models.

    A new reader is built for each term and pair of models before the dry run. It must not keep a module, which would be copied
    with the term.

    Args:
        student, teacher: the model that learns and the model that it imitates.
        term: the term's name, for messages.

    Attributes:
        reading: settings, beside the taps, with which the teacher is read; equal for all members of an Ensemble.

    Example:
        >>> class ImageReader(Reader):
        ...     default_taps = {"scores": "head", "features": "conv"}
        >>> ImageReader(student, teacher, "soft_targets").scores(student, teacher).taps[0][0].path
        'head'
    """

    chunked: ClassVar[bool] = False
    """True where class scores are computed in chunks: their taps are states, and the host compares the output layers."""

    default_taps: ClassVar[Mapping[str, str]] = {"scores": "", "output": ""}
    """The host's default taps for ``"features"``, class ``"scores"``, ``"embeddings"``, the input of the classifier, the model's
    ``"output"``, and ``"samples"``, a feature that is pooled to one vector per sample."""
    names_losses: ClassVar[bool] = False
    """True in a host whose models return several losses of their own by name."""
    lacks: ClassVar[Mapping[str, str]] = {}
    """The kinds of :data:`NEEDS` that models of this host never have, each with the reason."""
    no_specialists: str = ""
    """The reason why a :class:`~kdgraft.Specialists` has no meaning for the predictions of these models; empty where it has one."""

    def __init__(self, student: nn.Module, teacher: nn.Module, term: str) -> None:
        self.term = term
        self.reading: Any = None

    def settle(self, tap: Tap, model: nn.Module) -> Tap:
        """Translate a tap as the user wrote it into the tap of this model."""
        return tap

    def tensors(self, recording: Recording, tap: Tap) -> list[Tensor]:
        """Return the tensors of a tap that a term compares."""
        return recording.tensors(tap)

    def samples(self, batch: Batch, tap: Tap | None = None) -> Tensor | None:
        """Return the number of the student's rows of output, or of the samples with a vector of pooled states at a tap.

        ``None`` is returned if the batch alone does not tell.
        """
        return None

    def reads_scores(self, tap: Tap) -> bool:
        """Return true if a tap reads class scores whose order of classes is known."""
        return False

    def check_classes(self, student: Tensor, teacher: Tensor, student_tap: Tap, teacher_tap: Tap) -> None:
        """Raise a :class:`WiringError` unless both tensors score the same number of classes."""

    def images(self, model: nn.Module) -> Tap:
        """Return the tap of the images that a model sees, by which a term differentiates it."""
        return Tap.parse(self.default_taps.get("images", ":input"))

    def run(self, model: nn.Module, images: Tensor) -> Any:
        """Run a model on other images than those of the step, without labels, for terms that ask for further passes."""
        return model(images)

    def align_corners(self, tap: Tap) -> bool:
        """Return true if the host resizes the maps of this tap of the student with aligned corners."""
        return False

    def scores(
        self,
        student: nn.Module,
        teacher: nn.Module,
        *,
        tap: Taps | None = None,
        student_tap: Taps | None = None,
        teacher_tap: Taps | None = None,
        independent: bool = False,
    ) -> Scores:
        """Return the reader of class scores; its keywords are the arguments of terms on class scores in this host.

        Args:
            student, teacher: the models.
            tap, student_tap, teacher_tap: logits ``(N, C)``, ``(…, C)`` or ``(B, C, H, W)``; the model's output by default.
            independent: each class has a sigmoid of its own (multi-label), rather than one softmax over all. Losses are averaged
                over the classes, as in torch's binary cross-entropy. A single class is always independent.
        """
        check_flag(self.term, "independent", independent)
        return TapScores(self, self._sides(tap, student_tap, teacher_tap), independent)

    def numbers(
        self,
        student: nn.Module,
        teacher: nn.Module,
        *,
        tap: Taps | None = None,
        student_tap: Taps | None = None,
        teacher_tap: Taps | None = None,
    ) -> Numbers:
        """Return the reader of regressed numbers; its keywords are the arguments of terms on numbers in this host.

        Args:
            student, teacher: the models.
            tap, student_tap, teacher_tap: numbers ``(N,)`` or ``(…, D)``; the model's output by default. Their true values are the
                targets of the batch, of the same shape or, for one number an item, without the last axis.
        """
        return TapNumbers(self, self._sides(tap, student_tap, teacher_tap))

    def _sides(self, tap: Taps | None, student_tap: Taps | None, teacher_tap: Taps | None) -> Sides:
        default = self.default_taps["scores"]
        left, right = (
            own if own is not None else default if tap is None else tap for own in (student_tap, teacher_tap)
        )
        return parse_taps(left), parse_taps(right)


class TapScores(Scores):
    """Class scores ``(N, C)``, ``(…, C)`` or ``(B, C, H, W)`` as tapped."""

    def __init__(self, reader: Reader, taps: Sides, independent: bool = False) -> None:
        self.reader, self.taps, self.independent = reader, taps, independent
        self._apart = independent

    def wire(self, wiring: Wiring) -> list[Compared]:
        found = paired(self.reader, self.taps, wiring.student_recording, wiring.teacher_recording)
        self.independent = any(self._each_alone(s) for s, _, _, _ in found)
        self.width = common_width([s for s, _, _, _ in found])
        for s, t, s_tap, t_tap in found:
            if s.shape != t.shape:
                raise WiringError(
                    f"{self.reader.term}: student {s_tap} {tuple(s.shape)} and teacher {t_tap} {tuple(t.shape)} must agree, "
                    "as class logits are compared class by class; tap scores of the same classes"
                )
        return [Compared(s, t, (s_tap, t_tap)) for s, t, s_tap, t_tap in found]

    def _each_alone(self, scores: Tensor) -> bool:
        return self._apart or scores.shape[class_dim(scores)] == 1

    def pairs(self, student: Recording, teacher: Recording, batch: Batch) -> list[Pairs]:
        found = []
        for s, t in in_students_order(self.reader, self.taps, student, teacher, independent=self._apart):
            alone, dim = self._each_alone(s), class_dim(s)
            labels = integers_of(batch.labels, s.select(dim, 0).shape)
            labels = None if labels is None else labels.to(s.device)
            weight = labels != -100 if self.labelled and labels is not None else None
            pairs = Pairs(s, t, weight, dim=dim, independent=alone, mean=self._apart)
            found.append(pairs if alone else replace(pairs, labels=labels))
        return found


class TapNumbers(Numbers):
    """Regressed numbers ``(N,)`` or ``(…, D)`` as tapped, with the batch's targets as true values."""

    def __init__(self, reader: Reader, taps: Sides) -> None:
        self.reader, self.taps = reader, taps

    def wire(self, wiring: Wiring) -> list[Compared]:
        found = paired(self.reader, self.taps, wiring.student_recording, wiring.teacher_recording)
        for s, t, s_tap, t_tap in found:
            if s.shape != t.shape:
                raise WiringError(
                    f"{self.reader.term}: student {s_tap} {tuple(s.shape)} and teacher {t_tap} {tuple(t.shape)} must agree, "
                    "as numbers are compared one by one; tap outputs of the same targets"
                )
        return [Compared(s, t, (s_tap, t_tap)) for s, t, s_tap, t_tap in found]

    def pairs(self, student: Recording, teacher: Recording, batch: Batch) -> list[Pairs]:
        found = []
        for place, (s, _, _, _) in enumerate(paired(self.reader, self.taps, student, _members(teacher)[0])):

            def read(member: Recording, place: int = place) -> Tensor:
                return paired(self.reader, self.taps, student, member)[place][1]

            target = targets_of(self.reader.term, s, batch.labels) if self.needs_targets else None
            s, t = (x[..., None] if x.ndim == 1 else x for x in (s, combined(teacher, read, "value")))
            found.append(Pairs(s, t, target=None if target is None else target.view_as(s)))
        return found


def targets_of(term: str, numbers: Tensor, targets: Any) -> Tensor | None:
    """Return the true values of regressed numbers from the batch's targets; ``None`` if the batch has none.

    Raises:
        DistillError: their shapes differ by more than a last axis of size 1.
    """
    if not isinstance(targets, Tensor):
        return None
    shape = tuple(numbers.shape)
    if tuple(targets.shape) not in {shape, shape[:-1] if shape[-1:] == (1,) else shape}:
        raise DistillError(
            f"{term}: targets {tuple(targets.shape)} do not give a number for each of the outputs {shape}; give both one shape"
        )
    return targets.to(numbers.device)


def integers_of(labels: Any, items: Sequence[int]) -> Tensor | None:
    """Return a batch's labels if they are one integer for each item, else ``None``."""
    if not isinstance(labels, Tensor) or labels.shape != tuple(items) or labels.is_floating_point():
        return None
    return labels


def paired(
    reader: Reader, taps: Sides, student: Recording, teacher: Recording
) -> list[tuple[Tensor, Tensor, Tap, Tap]]:
    """Return the tensors of both models in pairs, each with its tap.

    Raises:
        WiringError: the taps of the two models yield different numbers of tensors.
    """
    left, right = (
        [(tensor, tap) for tap in own for tensor in reader.tensors(recording, tap)]
        for own, recording in zip(taps, (student, teacher), strict=True)
    )
    if teacher.repeats and len(right) == 1:
        right *= len(left)
    if len(left) != len(right):
        ours, theirs = (", ".join(f"'{tap}'" for tap in own) for own in taps)
        raise WiringError(
            f"{reader.term}: the student's {ours} yields {len(left)} tensors {[tuple(t.shape) for t, _ in left]}, the teacher's "
            f"{theirs} {len(right)} {[tuple(t.shape) for t, _ in right]}; pick as many of each with [0], [1] …"
        )
    return [(s, t, s_tap, t_tap) for (s, s_tap), (t, t_tap) in zip(left, right, strict=True)]


def in_students_order(
    reader: Reader, taps: Sides, student: Recording, teacher: Recording, *, independent: bool = False
) -> list[tuple[Tensor, Tensor]]:
    """Return pairs of class scores, the teacher's in the student's order of classes; for an Ensemble the mean of its members."""
    members = _members(teacher)
    pairs = {member.model: paired(reader, taps, student, member) for member in members}
    found = []
    for place, (s, t, _, _) in enumerate(pairs[members[0].model]):
        dim = class_dim(t)

        def read(member: Recording, place: int = place, dim: int = dim) -> Tensor:
            return in_order(pairs[member.model][place][1], member.class_order, dim)

        found.append((s, combined(teacher, read, "sigmoid" if independent or t.shape[dim] == 1 else "softmax", dim)))
    return found


def _members(source: Recording) -> list[Recording]:
    """Return the recordings of an Ensemble's members, or the one of a model."""
    return source.members if isinstance(source, EnsembleRecording) else [source]


def parse_taps(taps: Any) -> list[Tap]:
    """Parse one tap or a list of taps."""
    if isinstance(taps, (list, tuple)) and not taps:
        raise DistillError("a term needs at least one tap, got an empty list")
    return [Tap.parse(tap) for tap in (taps if isinstance(taps, (list, tuple)) else [taps])]


def common_width(scores: Sequence[Tensor]) -> int:
    """Return the number of classes of several tensors of scores, 0 if they differ."""
    widths = {tensor.shape[class_dim(tensor)] for tensor in scores}
    return widths.pop() if len(widths) == 1 else 0


def class_dim(tensor: Tensor) -> int:
    """Return the axis of classes or channels: 1 for maps ``(B, C, H, W)``, −1 otherwise."""
    return class_axis(tensor.ndim)


def in_order(scores: Tensor, order: Tensor | None, dim: int = 1) -> Tensor:
    """Reorder the teacher's class scores, with classes along ``dim``, into the student's order of classes.

    A single channel scores the second of two classes, so that the reverse order negates it.
    """
    if order is None:
        return scores
    return -scores if scores.shape[dim] == 1 else scores.index_select(dim, order.to(scores.device))
