"""Soft targets on the class outputs of any head: dense, on regions of interest, on queries."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from kdgraft.errors import DistillError, WiringError, check_number, check_share
from kdgraft.losses import (
    Ratio,
    binary_soft_targets,
    soft_targets,
    weighted_binary_soft_targets,
    weighted_ratio,
    weighted_soft_targets,
)
from kdgraft.losses.soft_targets import check_temperature
from kdgraft.regions import Batch
from kdgraft.taps import Recording
from kdgraft.terms import Term, Wiring, check_choice, mean_of

from .heads import HeadRegion, Heads, Rows
from .predictions import HeadName, check_head_name, find_heads
from .registry import TERMS


@TERMS.register
class SoftTargets(Term):
    r"""Soft targets on a head's class outputs: each class a sigmoid of its own, or softmax across them.

    Per row (an anchor, a proposal, a query) the KL is summed over classes (or their mean), then weighted over the region:

    * ``"all"``: of a dense head all valid anchors, divided by the sum of the teacher's best class scores, which is the number
      of objects as the teacher sees them; unlike the number of positives it is never 0. Of a head that samples its anchors
      (RPN) the mean over those that it sampled. Of an RoI head that over the student's sampled proposals, on which the
      teacher's head is run too.
    * ``"main"`` (the positives) and ``"vlr"`` (weighted by IoU, dense heads with anchors; also those that the assigner
      ignores or that are not sampled): divided by the sum of weights. Of a DETR-type model, whose queries stand for no
      place, the two queries that are matched to the same object.

    Both sums are taken over all processes. A cascade's stages weigh alike.

    Args:
        temperature: T > 0, with the factor T² (Hinton et al. 2015).
        head: ``"bbox_head"``, ``"rpn_head"`` (of a two-stage detector) or ``"roi_head"``; ``"auto"`` is that which gives the
            detections.
        activation: ``"sigmoid"`` (independent classes, what dense heads and DETR are trained as), or ``"softmax"`` across
            the classes as LD's class distillation takes it (Zheng et al. 2022: T = 2, mean over classes, weight 10, main
            region). RoI heads are trained with a softmax over classes and background, and are compared so.
        region: see above; ``"all"`` by default, ``"main"`` for queries.
        focus: γ of the factor :math:`|p_t - p_s|^\gamma`, sigmoid only; 1 in CrossKD.
        classes: ``"sum"`` over classes, or ``"mean"``.
        background_weight: weigh the background's part of the *cross-entropy*: 1.5 in Chen et al. (NeurIPS 2017, eq. 3),
            other classes 1; of a sigmoid class the background is its complement. ``None`` compares by KL.
        hard_weight: μ in μ·hard + (1 − μ)·soft (the same paper, eq. 2): the host's own loss of these classes counts μ, this
            term 1 − μ (of DETR's losses the last layer's; with a schedule as far as it lets the term count). ``None`` leaves the
            host's loss alone and adds this term.
    """

    compares_classes = True
    heads: Heads

    def __init__(
        self,
        temperature: float = 1.0,
        *,
        head: HeadName = "auto",
        activation: Literal["auto", "sigmoid", "softmax"] = "auto",
        region: HeadRegion | None = None,
        focus: float = 0.0,
        classes: Literal["sum", "mean"] = "sum",
        background_weight: float | None = None,
        hard_weight: float | None = None,
        weight: float = 1.0,
        **settings: Any,
    ) -> None:
        super().__init__(weight=weight, **settings)
        check_temperature(temperature)
        check_head_name(self, head)
        check_choice(self, "activation", activation, ("auto", "sigmoid", "softmax"))
        if region is not None:
            check_choice(self, "region", region, ("all", "main", "vlr"))
        check_choice(self, "classes", classes, ("sum", "mean"))
        check_number("SoftTargets", "focus", focus)
        if focus and (activation == "softmax" or background_weight is not None):
            raise DistillError(f"SoftTargets: focus must be 0 with softmax or a background_weight, got {focus}")
        if background_weight is not None:
            check_number("SoftTargets", "background_weight", background_weight, above=True)
        if hard_weight is not None:
            check_share("SoftTargets", "hard_weight", hard_weight)
            self.host_share = hard_weight
        self.own_share = 1.0 if hard_weight is None else 1 - hard_weight
        self.temperature, self.focus, self.classes = temperature, focus, classes
        self.head, self.region, self.activation = head, region, activation
        self.background_weight = background_weight

    def prepare(self, student: nn.Module, teacher: nn.Module) -> None:
        self.heads = find_heads(student, teacher, self.head, self)
        self.heads.check_classes(self)
        self.hears_ensembles = self.heads.averages
        self.compares_classes = not self.heads.proposes
        self.student_taps, self.teacher_taps = self.heads.class_taps
        self.reading = self.heads.class_reading
        self.host_losses = self.heads.host_losses
        settle_region(self, self.heads)
        kinds = ("softmax",) if self.heads.softmax else ("sigmoid", "softmax")
        if self.activation == "auto":
            self.activation = kinds[0]  # type: ignore[assignment]
        if self.activation not in kinds:
            raise WiringError(f"{self.name}: an RoI head's classes share one softmax; leave activation out")
        if self.activation == "softmax" and self.focus:
            raise WiringError(f"{self.name}: focus needs sigmoid classes, and an RoI head's share one softmax")
        if self.background_weight is not None and self.activation == "softmax" and not self.heads.softmax:
            raise WiringError(f"{self.name}: a softmax over sigmoid classes has no background to weigh")

    def wire(self, wiring: Wiring) -> None:
        for s, t, s_tap, t_tap in self.heads.shapes(wiring, "classes", self):
            self.rows.append(self.row(s, t, taps=(s_tap, t_tap), region=str(self.region)))

    def forward(self, student: Recording, teacher: Recording, batch: Batch) -> Ratio:
        assert self.region is not None
        found = mean_of([self._ratio(r) for r in self.heads.class_rows(student, teacher, batch, self.region)])
        return Ratio(found.numerator * self.own_share, found.denominator)

    def _ratio(self, rows: Rows) -> Ratio:
        items = self._items(rows.student, rows.teacher)
        return weighted_ratio(items, rows.weight) if rows.count is None else Ratio(items.sum(), rows.count)

    def _items(self, logits: Tensor, targets: Tensor) -> Tensor:
        temperature, background = self.temperature, self.background_weight
        if background is None and self.activation == "softmax":
            items = soft_targets(logits, targets, temperature, reduction="none")
        elif background is None:
            items = binary_soft_targets(logits, targets, temperature, focus=self.focus, reduction="none").sum(1)
        elif self.activation == "softmax":
            weights = torch.ones(logits.shape[1], device=logits.device)
            weights[-1] = background
            items = weighted_soft_targets(logits, targets, temperature, class_weight=weights, reduction="none")
        else:
            by_class = weighted_binary_soft_targets(
                logits, targets, temperature, background_weight=background, reduction="none"
            )
            items = by_class.sum(1)
        return items / logits.shape[1] if self.classes == "mean" else items


def settle_region(term: SoftTargets, heads: Heads) -> None:
    """Fills in a head's own region, and refuses one that it does not have."""
    if term.region is None:
        term.region = heads.regions[0]  # type: ignore[assignment]
    if term.region not in heads.regions:
        raise WiringError(
            f"{term.name}: region {term.region!r} means nothing on this head; take one of {', '.join(heads.regions)}"
        )
