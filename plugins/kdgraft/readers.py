"""Readers: a host's knowledge of the tensors of its models.

A term of the core asks its reader where a tensor is tapped, what a tapped value holds, and for aligned pairs of predictions, so
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
from .sources import EnsembleRecording, combined
from .taps import Recording, Tap
from .wiring import Wiring

Taps = str | Sequence[str]


@dataclass
class Pairs:
    """Aligned predictions of two models: class scores or numbers, such as boxes, at the same items.

    Attributes:
        student, teacher: logits ``(…, C, …)`` with the classes at ``dim``, in the student's order of classes; or boxes ``(K, 4)``.
        weight: the items' weights, of the shape without ``dim``; ``None`` where all count alike.
        target: the truth, of the shape of the predictions, where the host has it beside them.
        count: what the sum over items is divided by, where that is not the sum of weights.
        dim: the axis of the classes.
        independent: each class is right or wrong on its own (a sigmoid each), rather than one of them right (softmax).
        mean: whether the host's own loss takes the mean over independent classes, rather than their sum.
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
    """A line for ``kdgraft check``: the dry run's tensors, or texts about them, and their taps."""

    student: Any
    teacher: Any
    taps: tuple[Tap, Tap]
    region: str = "–"
    adapter: str = "–"


class Scores(ABC):
    """How the class scores of two models are read as aligned pairs.

    Attributes:
        taps: what it reads of (student, teacher).
        compares_classes: whether both models must have the same class names.
        averages: whether several teachers predict at the same items, so that their mean means something.
        reading: how the teacher is read, beside the taps.
        host_losses: the host's own losses of these scores, by name; empty: all its losses.
        background: whether no object is a class: the last one of a softmax, the complement of each independent class.
    """

    taps: tuple[Sequence[Tap], Sequence[Tap]]
    compares_classes: bool = True
    averages: bool = True
    reading: Any = None
    host_losses: Sequence[str] = ()
    background: bool = False
    labelled: bool = False
    """Whether only items with a label count, where the reader knows of integer labels (−100: none)."""
    no_single_class: str = "; use SoftTargets"
    """What a message adds where a term needs one distribution over all classes, and these are independent."""
    independent: bool | None = False
    """Whether classes are independent; ``None`` where only the batch can tell."""

    @abstractmethod
    def wire(self, wiring: Wiring) -> list[Compared]:
        """Check what the dry run recorded, and say what is compared.

        Raises:
            WiringError: the two models' scores cannot be compared.
        """

    @abstractmethod
    def pairs(self, student: Recording, teacher: Recording, batch: Batch) -> list[Pairs]:
        """The aligned scores of a step, an entry for each tap or stage; entries weigh alike."""

    def count(self, batch: Batch) -> Tensor | None:
        """The denominator of a step, from the batch alone; ``None`` where only the pass can tell."""
        return None


class Reader:
    """Reads the models of one term. The base is that of plain PyTorch, which knows nothing of its models.

    It is made anew for each term and pair of models before the dry run, and keeps no module, so that none is copied with the term.

    Args:
        student, teacher: the model that learns and the one that is listened to.
        term: the term's name, for messages.

    Attributes:
        reading: how the teacher is read, beside the taps; the members of an Ensemble must be read alike.
    """

    default_taps: ClassVar[Mapping[str, str]] = {"scores": ""}
    """The host's taps for ``"features"``, class ``"scores"`` and ``"embeddings"``, the features that a classifier is given."""

    def __init__(self, student: nn.Module, teacher: nn.Module, term: str) -> None:
        self.term = term
        self.reading: Any = None

    def settle(self, tap: Tap, model: nn.Module) -> Tap:
        """The tap that a model of this kind has for what the user means."""
        return tap

    def tensors(self, recording: Recording, tap: Tap) -> list[Tensor]:
        """The tensors that a term compares of a tap."""
        return recording.tensors(tap)

    def reads_scores(self, tap: Tap) -> bool:
        """Whether a tap reads class scores whose order of classes is known."""
        return False

    def check_classes(self, student: Tensor, teacher: Tensor, student_tap: Tap, teacher_tap: Tap) -> None:
        """Raise a :class:`WiringError` unless both tensors score the same number of classes."""

    def align_corners(self, tap: Tap) -> bool:
        """Whether the host resizes what a student's tap reads with aligned corners."""
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
        """The reader of class scores. Its keywords are those that terms on predictions take in this host.

        Args:
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
                    f"{self.reader.term}: student {s_tap} {tuple(s.shape)} and teacher {t_tap} {tuple(t.shape)} must agree; "
                    "class logits are compared class by class"
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
    """The tensors of both models side by side, each with its tap.

    Raises:
        WiringError: the taps yield different numbers of tensors.
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
    """Class scores side by side, the teacher's in the student's order of classes; of an Ensemble their mean."""
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
    """Taps from one text, or a list of them."""
    if isinstance(taps, (list, tuple)) and not taps:
        raise DistillError("a term needs at least one tap, got an empty list")
    return [Tap.parse(tap) for tap in (taps if isinstance(taps, (list, tuple)) else [taps])]


def class_dim(tensor: Tensor) -> int:
    """The axis of classes or channels: of maps ``(B, C, H, W)`` the second, else the last."""
    return 1 if tensor.ndim == 4 else -1


def in_order(scores: Tensor, order: Tensor | None, dim: int = 1) -> Tensor:
    """The teacher's class scores, classes along ``dim``, in the student's order of classes.

    One channel scores the second of two classes; in the other order that is its negative.
    """
    if order is None:
        return scores
    return -scores if scores.shape[dim] == 1 else scores.index_select(dim, order)
