"""Readers, which interpret the tensors of a host's models.

A term of the core asks its reader where to tap a tensor, what a tapped value contains, and for aligned pairs of predictions, so
that one class of terms serves every host.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn

from .batch import Batch
from .errors import DistillError, WiringError
from .listing import NEEDS as NEEDS
from .sources import EnsembleRecording, combined
from .taps import Recording, Tap
from .wiring import Wiring

Taps = str | Sequence[str]


@dataclass
class Pairs:
    """Aligned predictions of two models for the same items: class scores, or numbers such as boxes.

    Attributes:
        student, teacher: logits ``(…, C, …)`` with the classes at ``dim``, in the student's order of classes; or boxes ``(K, 4)``.
        weight: weights of the items, of the shape without ``dim``; ``None`` for equal weights.
        target: the ground truth, of the shape of the predictions, if the host provides it.
        count: the divisor of the sum over items, if it is not the sum of the weights.
        dim: the axis of the classes.
        independent: true for independent classes (a sigmoid each), false for exclusive ones (a softmax).
        mean: true if the host's own loss averages over independent classes, rather than adding them up.

    Example:
        >>> pairs = Pairs(student=torch.rand(6, 5), teacher=torch.rand(6, 5), weight=torch.ones(6))
        >>> SoftTargets().compare(pairs).shape
        torch.Size([6])
    """

    student: Tensor
    teacher: Tensor
    weight: Tensor | None = None
    target: Tensor | None = None
    count: Tensor | None = None
    dim: int = -1
    independent: bool = False
    mean: bool = False


class Compared(NamedTuple):
    """One compared pair for ``kdgraft check``: the tensors of the dry run, or texts about them, and their taps."""

    student: Any
    teacher: Any
    taps: tuple[Tap, Tap]
    region: str = "–"
    adapter: str = "–"


class Scores(ABC):
    """Base of classes that read the class scores of two models as aligned pairs.

    Attributes:
        taps: the taps of (student, teacher) that are read.
        compares_classes: true if both models must have the same class names.
        averages: true if several teachers predict for the same items, so that their predictions can be averaged.
        reading: settings, beside the taps, with which the teacher is read.
        host_losses: names of the host's own losses of these scores; empty for all its losses.
        background: true if "no object" is a class: the last one of a softmax, or the complement of each independent class.

    Example:
        >>> scores = Reader(student, teacher, "soft_targets").scores(student, teacher, tap="head")
        >>> isinstance(scores, Scores), scores.compares_classes
        (True, True)
    """

    taps: tuple[Sequence[Tap], Sequence[Tap]]
    compares_classes: bool = True
    averages: bool = True
    reading: Any = None
    host_losses: Sequence[str] = ()
    background: bool = False
    labelled: bool = False
    """True if only items with a label count, for readers that know integer labels (−100 marks items without one)."""
    no_single_class: str = "; use SoftTargets"
    """Advice that completes the message of a term that needs exclusive classes when these are independent."""
    independent: bool | None = False
    """True for independent classes; ``None`` if that is only known for each batch."""

    @abstractmethod
    def wire(self, wiring: Wiring) -> list[Compared]:
        """Check the recordings of the dry run, and list the compared pairs.

        Raises:
            WiringError: the scores of the two models cannot be compared.
        """

    @abstractmethod
    def pairs(self, student: Recording, teacher: Recording, batch: Batch) -> list[Pairs]:
        """Return the aligned scores of a step, one entry per tap or stage; all entries have equal weight."""

    def count(self, batch: Batch) -> Tensor | None:
        """Return the denominator of a step, computed from the batch alone; ``None`` if it depends on the predictions."""
        return None


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

    default_taps: ClassVar[Mapping[str, str]] = {"scores": ""}
    """The host's default taps for ``"features"``, class ``"scores"`` and ``"embeddings"``, the input of the classifier."""
    lacks: ClassVar[Mapping[str, str]] = {}
    """The kinds of :data:`NEEDS` that models of this host never have, each with the reason."""

    def __init__(self, student: nn.Module, teacher: nn.Module, term: str) -> None:
        self.term = term
        self.reading: Any = None

    def settle(self, tap: Tap, model: nn.Module) -> Tap:
        """Translate a tap as the user wrote it into the tap of this model."""
        return tap

    def tensors(self, recording: Recording, tap: Tap) -> list[Tensor]:
        """Return the tensors of a tap that a term compares."""
        return recording.tensors(tap)

    def reads_scores(self, tap: Tap) -> bool:
        """Return true if a tap reads class scores whose order of classes is known."""
        return False

    def check_classes(self, student: Tensor, teacher: Tensor, student_tap: Tap, teacher_tap: Tap) -> None:
        """Raise a :class:`WiringError` unless both tensors score the same number of classes."""

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
    ) -> Scores:
        """Return the reader of class scores; its keywords are the arguments of terms on predictions in this host.

        Args:
            student, teacher: the models.
            tap, student_tap, teacher_tap: logits ``(N, C)``, ``(…, C)`` or ``(B, C, H, W)``; the model's output by default.
        """
        default = self.default_taps["scores"]
        left, right = (
            own if own is not None else default if tap is None else tap for own in (student_tap, teacher_tap)
        )
        return TapScores(self, (parse_taps(left), parse_taps(right)))


class TapScores(Scores):
    """Class scores ``(N, C)``, ``(…, C)`` or ``(B, C, H, W)`` as tapped."""

    def __init__(self, reader: Reader, taps: tuple[Sequence[Tap], Sequence[Tap]]) -> None:
        self.reader, self.taps = reader, taps

    def wire(self, wiring: Wiring) -> list[Compared]:
        found = paired(self.reader, self.taps, wiring.student_recording, wiring.teacher_recording)
        self.independent = any(s.shape[class_dim(s)] == 1 for s, _, _, _ in found)
        for s, t, s_tap, t_tap in found:
            if s.shape != t.shape:
                raise WiringError(
                    f"{self.reader.term}: student {s_tap} {tuple(s.shape)} and teacher {t_tap} {tuple(t.shape)} must agree, "
                    "as class logits are compared class by class; tap scores of the same classes"
                )
        return [Compared(s, t, (s_tap, t_tap)) for s, t, s_tap, t_tap in found]

    def pairs(self, student: Recording, teacher: Recording, batch: Batch) -> list[Pairs]:
        found = []
        for s, t in in_students_order(self.reader, self.taps, student, teacher):
            labels, items = batch.labels, s.select(class_dim(s), 0).shape
            known = self.labelled and isinstance(labels, Tensor) and labels.shape == items
            one = s.shape[class_dim(s)] == 1
            found.append(Pairs(s, t, labels != -100 if known else None, dim=class_dim(s), independent=one))
        return found


def paired(
    reader: Reader, taps: tuple[Sequence[Tap], Sequence[Tap]], student: Recording, teacher: Recording
) -> list[tuple[Tensor, Tensor, Tap, Tap]]:
    """Return the tensors of both models in pairs, each with its tap.

    Raises:
        WiringError: the taps of the two models yield different numbers of tensors.
    """
    left, right = (
        [(tensor, tap) for tap in own for tensor in reader.tensors(recording, tap)]
        for own, recording in zip(taps, (student, teacher), strict=True)
    )
    if len(left) != len(right):
        ours, theirs = (", ".join(f"'{tap}'" for tap in own) for own in taps)
        raise WiringError(
            f"{reader.term}: the student's {ours} yields {len(left)} tensors {[tuple(t.shape) for t, _ in left]}, the teacher's "
            f"{theirs} {len(right)} {[tuple(t.shape) for t, _ in right]}; pick as many of each with [0], [1] …"
        )
    return [(s, t, s_tap, t_tap) for (s, s_tap), (t, t_tap) in zip(left, right, strict=True)]


def in_students_order(
    reader: Reader, taps: tuple[Sequence[Tap], Sequence[Tap]], student: Recording, teacher: Recording
) -> list[tuple[Tensor, Tensor]]:
    """Return pairs of class scores, the teacher's in the student's order of classes; for an Ensemble the mean of its members."""
    members = teacher.members if isinstance(teacher, EnsembleRecording) else [teacher]
    pairs = {member.model: paired(reader, taps, student, member) for member in members}
    found = []
    for place, (s, t, _, _) in enumerate(pairs[members[0].model]):
        dim = class_dim(t)

        def read(member: Recording, place: int = place, dim: int = dim) -> Tensor:
            return in_order(pairs[member.model][place][1], member.class_order, dim)

        found.append((s, combined(teacher, read, "sigmoid" if t.shape[dim] == 1 else "softmax", dim)))
    return found


def parse_taps(taps: Any) -> list[Tap]:
    """Parse one tap or a list of taps."""
    if isinstance(taps, (list, tuple)) and not taps:
        raise DistillError("a term needs at least one tap, got an empty list")
    return [Tap.parse(tap) for tap in (taps if isinstance(taps, (list, tuple)) else [taps])]


def class_dim(tensor: Tensor) -> int:
    """Return the axis of classes or channels: 1 for maps ``(B, C, H, W)``, −1 otherwise."""
    return 1 if tensor.ndim == 4 else -1


def in_order(scores: Tensor, order: Tensor | None, dim: int = 1) -> Tensor:
    """Reorder the teacher's class scores, with classes along ``dim``, into the student's order of classes.

    A single channel scores the second of two classes, so that the reverse order negates it.
    """
    if order is None:
        return scores
    return -scores if scores.shape[dim] == 1 else scores.index_select(dim, order)
