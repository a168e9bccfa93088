"""Bases of terms on predictions: the host's reader pairs the predictions of both models, and a term compares them item by item."""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any, ClassVar, Literal, cast

from torch import Tensor, nn

from ..balance import Weight
from ..batch import Batch
from ..errors import DistillError, WiringError, nearest
from ..listing import arguments_of
from ..losses import Ratio, standardized, weighted_ratio
from ..losses.soft_targets import check_temperature
from ..losses.standardization import Standardize, check_standardize
from ..pairs import Pairs, Predictions, Scores
from ..readers import Reader
from ..taps import Recording
from .base import Term, Wiring, mean_of

_TAPS = ("student_tap", "teacher_tap")


class PairTerm(Term):
    """Base of terms that compare predictions item by item; a subclass computes the loss per item in :meth:`compare`.

    Args:
        where: arguments of the host that select the predictions; see the reader's method of the name :attr:`pairs_from`.

    Example:
        >>> class Distance(PairTerm):
        ...     pairs_from = "numbers"
        ...     def compare(self, pairs):
        ...         return (pairs.student - pairs.teacher).abs().sum(-1)
        >>> Distance().compare(Pairs(torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 0.0]])))
        tensor([3.])
    """

    pairs_from: ClassVar[Literal["scores", "numbers", "masks"]]
    """The method of the host's reader that pairs the predictions."""
    hears_ensembles = True
    predictions: Predictions

    def __init__(
        self,
        *,
        weight: Weight = 1.0,
        schedule: Any = None,
        name: str | None = None,
        source: str = "teacher",
        **where: Any,
    ) -> None:
        super().__init__(weight=weight, schedule=schedule, name=name, source=source)
        self.where = where

    def between(self, listener: str, source: str) -> Term:
        twin = super().between(listener, source)
        assert isinstance(twin, PairTerm)
        taps = twin.of_sides(*(self.where.get(key) for key in _TAPS))
        twin.where = {key: value for key, value in self.where.items() if key not in _TAPS}
        twin.where |= {key: tap for key, tap in zip(_TAPS, taps, strict=True) if tap is not None}
        return twin

    @property
    def told_apart(self) -> bool:
        ours, theirs = (self.where.get(key) for key in _TAPS)
        return bool(ours != theirs)

    def check_settings(self, reader: type[Reader]) -> None:
        super().check_settings(reader)
        method = getattr(reader, self.pairs_from)
        takes = [key for key in inspect.signature(method).parameters if key not in ("self", "student", "teacher")]
        for key in self.where:
            if key not in takes:
                known = [*arguments_of(type(self)), *takes]
                raise DistillError(f"term {type(self).__name__} takes no argument {key!r}{nearest(key, known)}")

    def prepare(self, student: nn.Module, teacher: nn.Module) -> None:
        self.predictions = found = self.read(student, teacher)
        self.student_taps, self.teacher_taps = found.taps
        self.compares_classes = found.compares_classes
        self.hears_ensembles = self.hears_ensembles and found.averages
        self.reading, self.host_losses = found.reading, found.host_losses

    def read(self, student: nn.Module, teacher: nn.Module) -> Predictions:
        """Return the predictions that the term compares; the host's own by default."""
        self.check_settings(type(self.reader))
        found: Predictions = getattr(self.reader, self.pairs_from)(student, teacher, **self.where)
        return found

    def wire(self, wiring: Wiring) -> None:
        self.rows += [self.row(**compared._asdict()) for compared in self.predictions.wire(wiring)]

    def count(self, batch: Batch) -> Tensor | None:
        return self.predictions.count(batch)

    def pairs(self, student: Recording, teacher: Recording, batch: Batch) -> list[Pairs]:
        """Return the pairs of a step as :meth:`compare` takes them."""
        return [self.ready(pairs) for pairs in self.predictions.pairs(student, teacher, batch)]

    def ready(self, pairs: Pairs) -> Pairs:
        """Check pairs, and process them before :meth:`compare`."""
        return pairs

    def forward(self, student: Recording, teacher: Recording, batch: Batch) -> Ratio:
        return mean_of([self.ratio(pairs) for pairs in self.pairs(student, teacher, batch)])

    def ratio(self, pairs: Pairs) -> Ratio:
        """Return the sum of the loss over items, and its divisor."""
        items = self.compare(pairs)
        return weighted_ratio(items, pairs.weight) if pairs.count is None else Ratio(items.sum(), pairs.count)

    def compare(self, pairs: Pairs) -> Tensor:
        """Return the loss per item, of the shape of the predictions without ``dim``; weights are applied afterwards."""
        raise NotImplementedError


class ScoreTerm(PairTerm):
    """Base of terms that compare class scores item by item; a subclass computes the loss per item in :meth:`compare`.

    With ``"labels"`` among :attr:`needs` only items with a label count, and ``pairs.labels`` has the label of each.

    Args:
        where: arguments of the host that select the scores: ``tap`` and ``independent`` in plain PyTorch, ``tap`` and ``grid`` in
            segmentation, ``head``, ``anchors`` and ``activation`` in detection, ``tokens`` and ``queries`` in Hugging Face models.

    Example:
        >>> class TotalVariation(ScoreTerm):
        ...     def compare(self, pairs):
        ...         s, t = (scores.softmax(pairs.dim) for scores in (pairs.student, pairs.teacher))
        ...         return (s - t).abs().sum(pairs.dim) / 2
        >>> TotalVariation().compare(Pairs(torch.tensor([[9e9, 0.0]]), torch.tensor([[0.0, 9e9]])))
        tensor([1.])
    """

    needs: ClassVar[tuple[str, ...]] = ("classes",)
    pairs_from = "scores"
    compares_classes = True
    in_chunks = True
    """True if the loss is a sum over items, which a host may compute in chunks with :meth:`ready` and :meth:`compare`."""
    takes_independent = False
    """True if the loss is also defined for independent classes."""

    @property
    def joins(self) -> bool:
        """True if the loss is a divergence of probabilities, which is defined as well where several classes are joined into one."""
        return False

    @property
    def scores(self) -> Scores:
        """The class scores of both models."""
        return cast(Scores, self.predictions)

    def no_independent(self) -> str:
        """Return the message for independent classes in a term that needs exclusive ones."""
        return (
            f"{self.name} compares one distribution over all classes, but these models score each class on its own"
            f"{self.scores.no_single_class}"
        )

    def prepare(self, student: nn.Module, teacher: nn.Module) -> None:
        super().prepare(student, teacher)
        self.scores.needs_labels = "labels" in self.needs

    def wire(self, wiring: Wiring) -> None:
        super().wire(wiring)
        if self.scores.independent and not self.takes_independent:
            raise WiringError(self.no_independent())
        if "labels" in self.needs and self.scores.unlabelled:
            raise WiringError(f"{self.name} needs the class of each item: {self.scores.unlabelled}")

    def ready(self, pairs: Pairs) -> Pairs:
        if pairs.independent and not self.takes_independent:
            raise DistillError(self.no_independent())
        return self._labelled(pairs) if "labels" in self.needs else pairs

    def _labelled(self, pairs: Pairs) -> Pairs:
        """Return the pairs with weight 0 for items without a label."""
        if pairs.labels is None:
            raise DistillError(
                f"{self.name} needs the class of each item, and the batch has none; {self.scores.no_labels}"
            )
        counted = (pairs.labels >= 0) & (pairs.labels < pairs.student.shape[pairs.dim])
        return replace(pairs, weight=counted if pairs.weight is None else pairs.weight * counted, count=None)


class TemperedTerm(ScoreTerm):
    """Base of score terms with a temperature.

    Args:
        temperature: T > 0.
        standardize: subtract the mean of each item's logits and divide them by their standard deviation, before the temperature
            (Sun et al. 2024, arXiv 2403.01427). The student then need not reach the range of the teacher's logits. ``"paper"``
            or true divides by the square root of the mean square, ``"code"`` by that of the unbiased variance.

    Example:
        >>> class Entropy(TemperedTerm):
        ...     def compare(self, pairs):
        ...         p = (pairs.student / self.temperature).softmax(pairs.dim)
        ...         return -(p * p.log()).sum(pairs.dim)
        >>> Entropy(temperature=1.0).compare(Pairs(torch.zeros(1, 2), torch.zeros(1, 2)))
        tensor([0.6931])
    """

    def __init__(self, temperature: float = 1.0, *, standardize: Standardize = False, **settings: Any) -> None:
        super().__init__(**settings)
        check_temperature(temperature)
        check_standardize(type(self).__name__, standardize)
        self.temperature, self.standardize = float(temperature), standardize

    def prepare(self, student: nn.Module, teacher: nn.Module) -> None:
        super().prepare(student, teacher)
        self.scores.temperature = self.temperature

    def _no_mean(self) -> str:
        return f"{self.name}: standardize is not defined for independent classes; leave standardize out"

    def wire(self, wiring: Wiring) -> None:
        super().wire(wiring)
        if self.standardize and self.scores.independent:
            raise WiringError(self._no_mean())

    def ready(self, pairs: Pairs) -> Pairs:
        pairs = super().ready(pairs)
        if not self.standardize:
            return pairs
        if pairs.independent:
            raise DistillError(self._no_mean())
        variant: Literal["paper", "code"] = "code" if self.standardize == "code" else "paper"
        s, t = (
            standardized(scores, dim=pairs.dim, present=pairs.present, variant=variant)
            for scores in (pairs.student, pairs.teacher)
        )
        return replace(pairs, student=s, teacher=t)
