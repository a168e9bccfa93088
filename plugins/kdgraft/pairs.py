"""Aligned predictions of two models, and the bases of classes that read them: class scores, and regressed numbers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from .batch import Batch
from .taps import Recording, Tap
from .wiring import Wiring

Sides = tuple[Sequence[Tap], Sequence[Tap]]
"""The taps of (student, teacher)."""


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
        labels: the class of each exclusive item, integers of the shape without ``dim``; those outside 0 … C − 1, such as −100, mark
            items without a class. ``None`` if the host knows no classes.
        present: ``(…, C, …)``, true for the classes that an item has, for hosts that mask the others with a large negative score.

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
    labels: Tensor | None = None
    present: Tensor | None = None


class Compared(NamedTuple):
    """One compared pair for ``kdgraft check``: the tensors of the dry run, or texts about them, and their taps."""

    student: Any
    teacher: Any
    taps: tuple[Tap, Tap]
    region: str = "–"
    adapter: str = "–"


class Predictions(ABC):
    """Base of classes that read the predictions of two models as aligned pairs.

    Attributes:
        taps: the taps of (student, teacher) that are read.
        compares_classes: true if both models must have the same class names.
        averages: true if several teachers predict for the same items, so that their predictions can be averaged.
        reading: settings, beside the taps, with which the teacher is read.
        host_losses: names of the host's own losses of these predictions; empty for all its losses.

    Example:
        >>> numbers = Reader(student, teacher, "bounded_regression").numbers(student, teacher, tap="head")
        >>> isinstance(numbers, Predictions), numbers.compares_classes
        (True, False)
    """

    taps: Sides
    compares_classes: bool = False
    averages: bool = True
    reading: Any = None
    host_losses: Sequence[str] = ()

    @abstractmethod
    def wire(self, wiring: Wiring) -> list[Compared]:
        """Check the recordings of the dry run, and list the compared pairs.

        Raises:
            WiringError: the predictions of the two models cannot be compared.
        """

    @abstractmethod
    def pairs(self, student: Recording, teacher: Recording, batch: Batch) -> list[Pairs]:
        """Return the aligned predictions of a step, one entry per tap or stage; all entries have equal weight."""

    def count(self, batch: Batch) -> Tensor | None:
        """Return the denominator of a step, computed from the batch alone; ``None`` if it depends on the predictions."""
        return None


class Scores(Predictions):
    """Base of classes that read the class scores of two models as aligned pairs.

    Attributes:
        background: true if "no object" is a class: the last one of a softmax, or the complement of each independent class.

    Example:
        >>> scores = Reader(student, teacher, "soft_targets").scores(student, teacher, tap="head")
        >>> isinstance(scores, Scores), scores.compares_classes
        (True, True)
    """

    compares_classes: bool = True
    background: bool = False
    labelled: bool = False
    """True if only items with a label count, for readers that know integer labels (−100 marks items without one)."""
    needs_labels: bool = False
    """True if the term compares items by their labels, so that :attr:`Pairs.labels` is needed and only items with one count."""
    unlabelled: str = ""
    """The reason why no item of these scores ever has a label; empty where items may have one."""
    no_labels: str = "pass targets=… (one integer class for each item) to the distiller"
    """Advice for a batch without labels, for a term that needs them."""
    no_single_class: str = "; use SoftTargets"
    """Advice that completes the message of a term that needs exclusive classes when these are independent."""
    temperature: float = 1.0
    """The temperature of the term, for readers of distributions of which only the largest probabilities are known."""
    width: int = 0
    """The number of scores of an item, set by :meth:`wire`; 0 if it differs between taps or batches."""
    independent: bool | None = False
    """True for independent classes; ``None`` if that is only known for each batch."""


class Numbers(Predictions):
    """Base of classes that read regressed numbers of two models, ``(…, D)``, as aligned pairs with their true values.

    Example:
        >>> isinstance(Reader(student, teacher, "boxes").numbers(student, teacher, tap="head"), Numbers)
        True
    """

    needs_targets: bool = True
    """False if the term does not use :attr:`Pairs.target`, so that a batch may have targets of another kind."""
