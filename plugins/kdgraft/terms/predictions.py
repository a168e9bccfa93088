"""Terms on class scores: soft targets, logit matching and DIST."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..balance import Weight
from ..batch import Batch
from ..distributed import total_over_ranks, world_size
from ..errors import DistillError, WiringError, check_flag, check_number, check_share
from ..losses import (
    Ratio,
    binary_soft_targets,
    dist_between_classes,
    dist_within_classes,
    logit_matching,
    soft_targets,
    weighted_binary_soft_targets,
    weighted_soft_targets,
)
from ..pairs import Pairs
from ..registry import RECIPES, TERMS
from ..taps import Recording
from .base import Wiring, check_choice
from .pairs import ScoreTerm, TemperedTerm


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

    @property
    def joins(self) -> bool:
        return not (self.standardize or self.focus or self.classes == "mean" or self.background_weight is not None)

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


@RECIPES.register("ls")
def logit_standardization(
    temperature: float = 2.0, hard_weight: float = 0.1, weight: Weight = 10.0, **settings: Any
) -> list[dict[str, Any]]:
    """Logit standardization (CVPR 2024, arXiv 2403.01427): soft targets of standardised logits, beside a tenth of the hard loss.

    The defaults are those of the authors' code on CIFAR-100 and ImageNet: 0.1 times the hard loss plus 9 times the soft one.

    Args:
        temperature: T > 0.
        hard_weight: μ in μ·hard + weight·(1 − μ)·soft.
        weight: the weight of the term.
        settings: see :class:`kdgraft.SoftTargets`.
    """
    soft = dict(type="SoftTargets", temperature=temperature, hard_weight=hard_weight, weight=weight)
    return [{**soft, "standardize": True, **settings}]


@RECIPES.register("dml")
def mutual_learning(weight: Weight = 1.0, source: str = "teacher", **settings: Any) -> list[dict[str, Any]]:
    """Deep mutual learning (CVPR 2018, arXiv 1706.00384): students imitate each other's probabilities; the source is peers.

    The source is a :class:`kdgraft.Peer` or :class:`kdgraft.Peers`. The divergence is at temperature 1, and as large as the host's
    own loss, as in the paper.

    Args:
        weight: the weight of the term; with several peers it is divided by their number.
        source: the name of the peers.
        settings: see :class:`kdgraft.SoftTargets`.
    """
    return [{"type": "SoftTargets", "temperature": 1.0, "weight": weight, "source": source, **settings}]


@RECIPES.register("funmatch")
def function_matching(temperature: float = 1.0, **settings: Any) -> list[dict[str, Any]]:
    """Function matching (CVPR 2022, arXiv 2106.05237): the KL to the teacher's predictions alone, without labels.

    It is meant for consistent teaching, ``kdgraft.consistent.Teaching`` in plain PyTorch: the same aggressive crop and mixup for
    both models, AdamW with a cosine schedule, gradients clipped to a norm of 1, and very long schedules.

    Args:
        temperature: T > 0; 1 in the authors' code on ImageNet.
        settings: see :class:`kdgraft.SoftTargets`.
    """
    return [{"type": "SoftTargets", "temperature": temperature, "hard_weight": 0.0, **settings}]


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
        found = [self.ratio(pairs) for pairs in self.pairs(student, teacher, batch)]
        numerators, denominators = zip(*found, strict=True)
        return Ratio(torch.cat(numerators) / len(found), torch.cat(denominators))

    def count(self, batch: Batch) -> Tensor | None:
        return None  # the two parts have their own denominators

    def compare(self, pairs: Pairs) -> Tensor:
        return dist_between_classes(pairs.student, pairs.teacher, self.temperature, dim=pairs.dim, reduction="none")
