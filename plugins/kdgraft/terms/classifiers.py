"""Base of terms on classifiers of whole samples, in which the student teaches itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..batch import Batch
from ..distributed import sum_over_ranks
from ..errors import WiringError
from ..losses.reduction import Ratio, divide, weighted_ratio
from ..losses.soft_targets import check_temperature
from ..pairs import Pairs
from ..regions import All
from ..sources import Itself
from ..taps import Recording, Tap
from .base import Wiring
from .features import placed
from .pairs import ScoreTerm
from .samples import vectors_of


class ClassifierTerm(ScoreTerm):
    """Base of terms in which a classifier of whole samples teaches itself; only samples with a label count.

    Class scores and labels come from the host's reader, as in every term on class scores. A subclass taps further features of the
    student, and computes the loss per sample in :meth:`items`.

    Args:
        temperature: T > 0, with the factor T².
        where: see :class:`ScoreTerm`.

    Example:
        >>> class Confident(ClassifierTerm):
        ...     def items(self, pairs, student, teacher, batch):
        ...         return pairs.student.softmax(1).amax(1)
        >>> list(Distiller(student, Itself(), [Confident()], example=images)(images, targets=labels).losses)
        ['distill.confident.loss']
    """

    needs: ClassVar[tuple[str, ...]] = ("classes", "labels", "single-label")
    in_chunks = False
    takes_average = False
    """True if the source may also be the student's moving average."""

    def __init__(self, temperature: float = 3.0, **settings: Any) -> None:
        super().__init__(**settings)
        check_temperature(temperature)
        self.temperature = float(temperature)
        self.region = All()

    def wire(self, wiring: Wiring) -> None:
        average = isinstance(wiring.holder, Itself) and self.takes_average
        if wiring.holder is not None and not average:
            raise WiringError(
                f"{self.name}: the student teaches itself here; give it the source Itself(), beside other sources as "
                "teachers=dict(itself=Itself(), …) with source='itself' in this term"
            )
        super().wire(wiring)
        self.hears_ensembles = False
        shape = tuple(self.scores_in(wiring.student_recording).shape)
        if len(shape) != 2 or not self.scores.width:
            raise WiringError(
                f"{self.name}: the class scores {shape} must be (B, classes), one class for each sample; this term is for classifiers "
                "of images or texts"
            )

    def scores_in(self, recording: Recording) -> Tensor:
        """Return the student's class scores in a recording.

        Raises:
            WiringError: the taps give several tensors.
        """
        found = [tensor for tap in self.scores.taps[0] for tensor in self.reader.tensors(recording, tap)]
        if len(found) != 1:
            raise WiringError(
                f"{self.name}: takes the class scores of one classifier, got {len(found)} tensors; tap one"
            )
        return found[0]

    def check_samples(self, tensor: Tensor, tap: Tap, wiring: Wiring) -> None:
        """Raise a :class:`WiringError` unless a tapped tensor has one entry for each sample, whose padding is known."""
        shape, samples = tuple(tensor.shape), len(self.scores_in(wiring.student_recording))
        if tensor.ndim not in (2, 3, 4) or len(tensor) != samples:
            raise WiringError(
                f"{self.name}: {tap} {shape} gives no vector for each of {samples} samples; tap vectors (B, C), states (B, L, C) or maps "
                "(B, C, H, W)"
            )
        if tensor.ndim == 4 or "tokens" in wiring.fields:
            placed(self, self.region, "all", tensor, tap, wiring)

    def vectors(self, tensor: Tensor, tap: Tap, recording: Recording, batch: Batch) -> Tensor:
        """Return one vector ``(N, C)`` per sample: the mean over its positions."""
        return vectors_of(self.name, self.region, "mean", tensor, tap, recording, batch)[0]

    def forward(self, student: Recording, teacher: Recording, batch: Batch) -> Ratio:
        (pairs,) = self.pairs(student, teacher, batch)
        return weighted_ratio(self.items(pairs, student, teacher, batch), pairs.weight)

    def items(self, pairs: Pairs, student: Recording, teacher: Recording, batch: Batch) -> Tensor:
        """Return the loss of each sample, ``(N,)``.

        Args:
            pairs: the class scores, and the label of each sample.
            student: the recording of the student.
            teacher: the recording of the source, without gradient.
            batch: the facts about the batch.
        """
        raise NotImplementedError

    @torch.no_grad()
    def log_accuracies(self, scores: Mapping[str, Tensor], pairs: Pairs) -> None:
        """Log for several class scores by name the share of right ones among the labelled samples of all processes."""
        assert pairs.labels is not None and pairs.weight is not None
        right = [((one.argmax(1) == pairs.labels) * pairs.weight).sum() for one in scores.values()]
        *sums, count = sum_over_ranks(torch.stack([*right, pairs.weight.sum()]).float())
        self.monitor = {f"accuracy_{name}": divide(own, count) for name, own in zip(scores, sums, strict=True)}
