"""Terms on class scores: the host's reader pairs the scores of both models, and the terms compare them item by item."""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ..batch import Batch
from ..distributed import total_over_ranks, world_size
from ..errors import DistillError, WiringError, check_flag, check_number, check_share, nearest
from ..listing import arguments_of
from ..losses import (
    Ratio,
    binary_soft_targets,
    dist_between_classes,
    dist_within_classes,
    logit_matching,
    soft_targets,
    weighted_binary_soft_targets,
    weighted_ratio,
    weighted_soft_targets,
)
from ..losses.soft_targets import check_temperature
from ..readers import Pairs, Reader, Scores
from ..registry import TERMS
from ..taps import Recording
from .base import Term, Wiring, check_choice, mean_of


class ScoreTerm(Term):
    """Base of terms that compare class scores item by item; a subclass computes the loss per item in :meth:`compare`.

    Args:
        where: arguments of the host that select the scores: ``tap`` in plain PyTorch, ``tap`` and ``grid`` in segmentation,
            ``head``, ``anchors`` and ``activation`` in detection, ``tokens`` in Hugging Face models.

    Example:
        >>> class TotalVariation(ScoreTerm):
        ...     def compare(self, pairs):
        ...         s, t = (scores.softmax(pairs.dim) for scores in (pairs.student, pairs.teacher))
        ...         return (s - t).abs().sum(pairs.dim) / 2
        >>> TotalVariation().compare(Pairs(torch.tensor([[9e9, 0.0]]), torch.tensor([[0.0, 9e9]])))
        tensor([1.])
    """

    needs: ClassVar[tuple[str, ...]] = ("classes",)
    compares_classes = True
    hears_ensembles = True
    in_chunks = True
    """True if the loss is a sum over items, which a host may compute in chunks with :meth:`compare`."""
    takes_independent = False
    """True if the loss is also defined for independent classes."""
    scores: Scores

    def __init__(
        self,
        *,
        weight: float = 1.0,
        schedule: Any = None,
        name: str | None = None,
        source: str = "teacher",
        **where: Any,
    ) -> None:
        super().__init__(weight=weight, schedule=schedule, name=name, source=source)
        self.where = where

    def mirrored(self) -> Term:
        twin = super().mirrored()
        assert isinstance(twin, ScoreTerm)
        sides = {"student_tap": "teacher_tap", "teacher_tap": "student_tap"}
        twin.where = {sides.get(key, key): value for key, value in self.where.items()}
        return twin

    def check_settings(self, reader: type[Reader]) -> None:
        super().check_settings(reader)
        takes = [
            key for key in inspect.signature(reader.scores).parameters if key not in ("self", "student", "teacher")
        ]
        for key in self.where:
            if key not in takes:
                known = [*arguments_of(type(self)), *takes]
                raise DistillError(f"term {type(self).__name__} takes no argument {key!r}{nearest(key, known)}")

    def prepare(self, student: nn.Module, teacher: nn.Module) -> None:
        self.scores = self.read(student, teacher)
        self.student_taps, self.teacher_taps = self.scores.taps
        self.compares_classes, self.hears_ensembles = self.scores.compares_classes, self.scores.averages
        self.reading, self.host_losses = self.scores.reading, self.scores.host_losses

    def read(self, student: nn.Module, teacher: nn.Module) -> Scores:
        """Return the scores that the term compares; the host's own by default."""
        self.check_settings(type(self.reader))
        return self.reader.scores(student, teacher, **self.where)

    def no_independent(self) -> str:
        """Return the message for independent classes in a term that needs exclusive ones."""
        return (
            f"{self.name} compares one distribution over all classes, but these models score each class on its own"
            f"{self.scores.no_single_class}"
        )

    def wire(self, wiring: Wiring) -> None:
        self.rows += [self.row(**compared._asdict()) for compared in self.scores.wire(wiring)]
        if self.scores.independent and not self.takes_independent:
            raise WiringError(self.no_independent())

    def count(self, batch: Batch) -> Tensor | None:
        return self.scores.count(batch)

    def forward(self, student: Recording, teacher: Recording, batch: Batch) -> Ratio:
        return mean_of([self.ratio(pairs) for pairs in self.scores.pairs(student, teacher, batch)])

    def ratio(self, pairs: Pairs) -> Ratio:
        """Return the sum of the loss over items, and its divisor."""
        if pairs.independent and not self.takes_independent:
            raise DistillError(self.no_independent())
        items = self.compare(pairs)
        return weighted_ratio(items, pairs.weight) if pairs.count is None else Ratio(items.sum(), pairs.count)

    def compare(self, pairs: Pairs) -> Tensor:
        """Return the loss per item, of the shape of the scores without the axis of classes; weights are applied afterwards."""
        raise NotImplementedError


class TemperedTerm(ScoreTerm):
    """Base of score terms with a temperature.

    Example:
        >>> class Entropy(TemperedTerm):
        ...     def compare(self, pairs):
        ...         p = (pairs.student / self.temperature).softmax(pairs.dim)
        ...         return -(p * p.log()).sum(pairs.dim)
        >>> Entropy(temperature=1.0).compare(Pairs(torch.zeros(1, 2), torch.zeros(1, 2)))
        tensor([0.6931])
    """

    def __init__(self, temperature: float = 1.0, **settings: Any) -> None:
        super().__init__(**settings)
        check_temperature(temperature)
        self.temperature = float(temperature)


@TERMS.register
class SoftTargets(TemperedTerm):
    """Soft targets: KL of the class probabilities at temperature T, times T² (Hinton et al. 2015, arXiv 1503.02531).

    For independent classes (the sigmoids of dense detection heads, multi-label models, one output for two classes) the KL is that
    of Bernoulli distributions. The host's reader defines the divisor: usually the number of items that count. The loss of several
    taps or stages is the mean of their losses.

    Args:
        temperature: T > 0, with the factor T². Usual values are 4 for image classifiers, 2 for text classifiers, and 1 for
            language models, detectors and segmentors.
        hard_weight: μ in μ·hard + (1 − μ)·soft: the host's own loss of these classes has weight μ and this term 1 − μ, as far as
            the schedule has activated the term. ``None`` adds this term to the unchanged loss of the host.
        focus: γ of the factor |p_t − p_s|^γ, for independent classes only; 1 in CrossKD.
        classes: ``"sum"`` or ``"mean"`` of the KL over classes; ``None`` takes the sum over exclusive classes, and the reduction of
            the host's own loss over independent ones.
        background_weight: weight of the background in a *cross-entropy*, other classes 1: 1.5 in Chen et al. (NeurIPS 2017,
            eq. 3). The background of an independent class is its complement. ``None`` compares by KL.
        where: see :class:`ScoreTerm`.

    Example:
        >>> distiller = Distiller(student, teacher, [SoftTargets(temperature=4.0, hard_weight=0.5)], example=images)
        >>> distiller(images, targets=labels).host_share
        0.5
    """

    takes_independent = True

    def __init__(
        self,
        temperature: float = 1.0,
        *,
        hard_weight: float | None = None,
        focus: float = 0.0,
        classes: Literal["sum", "mean"] | None = None,
        background_weight: float | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(temperature, **settings)
        check_number("SoftTargets", "focus", focus)
        if classes is not None:
            check_choice(self, "classes", classes, ("sum", "mean"))
        if background_weight is not None:
            check_number("SoftTargets", "background_weight", background_weight, above=True)
        if focus and background_weight is not None:
            raise DistillError(f"SoftTargets: focus must be 0 with a background_weight, got {focus}")
        if hard_weight is not None:
            check_share("SoftTargets", "hard_weight", hard_weight)
            self.host_share = hard_weight
        self.hard_weight, self.own_share = hard_weight, 1.0 if hard_weight is None else 1 - hard_weight
        self.focus, self.classes, self.background_weight = focus, classes, background_weight

    def prepare(self, student: nn.Module, teacher: nn.Module) -> None:
        super().prepare(student, teacher)
        self.scores.labelled = self.hard_weight is not None  # the hard and the soft loss count the same items
        if self.focus and self.scores.independent is False:
            raise WiringError(f"{self.name}: focus needs sigmoid classes, but these share one softmax; leave focus out")
        if self.background_weight is not None and not self.scores.background:
            raise WiringError(f"{self.name}: these scores have no background to weigh; leave background_weight out")

    def compare(self, pairs: Pairs) -> Tensor:
        items = self._independent(pairs) if pairs.independent else self._shared(pairs)
        items = items / pairs.student.shape[pairs.dim] if self.classes == "mean" else items
        return items if self.own_share == 1 else items * self.own_share

    def _independent(self, pairs: Pairs) -> Tensor:
        both, temperature = (pairs.student, pairs.teacher), self.temperature
        if self.background_weight is None:
            found = binary_soft_targets(*both, temperature, focus=self.focus, reduction="none")
        else:
            weight = self.background_weight
            found = weighted_binary_soft_targets(*both, temperature, background_weight=weight, reduction="none")
        return found.mean(pairs.dim) if pairs.mean and self.classes is None else found.sum(pairs.dim)

    def _shared(self, pairs: Pairs) -> Tensor:
        both, temperature, dim = (pairs.student, pairs.teacher), self.temperature, pairs.dim
        if self.background_weight is None:
            return soft_targets(*both, temperature, dim=dim, reduction="none")
        weights = torch.ones(pairs.student.shape[dim], device=pairs.student.device)
        weights[-1] = self.background_weight
        return weighted_soft_targets(*both, temperature, class_weight=weights, dim=dim, reduction="none")


@TERMS.register
class LogitMatching(ScoreTerm):
    """Squared error on the logits, the high-temperature limit of soft targets (Ba & Caruana 2014, arXiv 1312.6184).

    Args:
        center: ignore a difference of the mean logits, as softmax does.
        where: see :class:`ScoreTerm`.

    Example:
        >>> term = LogitMatching(center=True)
        >>> term.compare(Pairs(torch.tensor([[1.0, 3.0]]), torch.tensor([[0.0, 2.0]])))
        tensor([0.])
    """

    takes_independent = True

    def __init__(self, *, center: bool = False, **settings: Any) -> None:
        super().__init__(**settings)
        check_flag("LogitMatching", "center", center)
        self.center = center

    def wire(self, wiring: Wiring) -> None:
        super().wire(wiring)
        if self.scores.independent and self.center:
            raise WiringError(self._no_center())

    def _no_center(self) -> str:
        return f"{self.name}: center=True is not defined for independent classes; leave center out"

    def compare(self, pairs: Pairs) -> Tensor:
        if pairs.independent and self.center:
            raise DistillError(self._no_center())
        return logit_matching(pairs.student, pairs.teacher, center=self.center, dim=pairs.dim, reduction="none")


@TERMS.register
class DIST(TemperedTerm):
    """DIST: correlation of class probabilities between the classes of an item and within each class (Huang et al. 2022, 2205.10536).

    The second part relates all items that count in the batch to each other, including those of other processes.

    Args:
        beta, gamma: weights of the two parts, inter-class and intra-class.
        temperature: T > 0.
        where: see :class:`ScoreTerm`.

    Example:
        >>> distiller = Distiller(student, teacher, [DIST(beta=1.0, gamma=2.0)], example=images)
        >>> list(distiller(images).losses)
        ['distill.dist.loss']
    """

    in_chunks = False

    def __init__(self, beta: float = 1.0, gamma: float = 1.0, temperature: float = 1.0, **settings: Any) -> None:
        super().__init__(temperature, **settings)
        check_number("DIST", "beta", beta)
        check_number("DIST", "gamma", gamma)
        self.beta, self.gamma = beta, gamma

    def ratio(self, pairs: Pairs) -> Ratio:
        between = super().ratio(replace(pairs, count=None))
        share = 1 / world_size()  # every process computes the same value of the second part
        both, dim, weight = (pairs.student, pairs.teacher), pairs.dim, pairs.weight
        within = dist_within_classes(*both, self.temperature, dim=dim, weight=weight, total=total_over_ranks)
        return Ratio(
            torch.stack([self.beta * between.numerator, self.gamma * share * within]),
            torch.stack([between.denominator, torch.full_like(between.denominator, share)]),
        )

    def forward(self, student: Recording, teacher: Recording, batch: Batch) -> Ratio:
        found = [self.ratio(pairs) for pairs in self.scores.pairs(student, teacher, batch)]
        numerators, denominators = zip(*found, strict=True)
        return Ratio(torch.cat(numerators) / len(found), torch.cat(denominators))

    def count(self, batch: Batch) -> Tensor | None:
        return None  # the two parts have their own denominators

    def compare(self, pairs: Pairs) -> Tensor:
        return dist_between_classes(pairs.student, pairs.teacher, self.temperature, dim=pairs.dim, reduction="none")
