"""Localization distillation on heads that predict box edges as distributions."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor, nn

from kdgraft.balance import Weight
from kdgraft.batch import Batch
from kdgraft.errors import DistillError, WiringError
from kdgraft.losses import Ratio, localization, weighted_ratio
from kdgraft.losses.soft_targets import check_temperature
from kdgraft.sources import combined
from kdgraft.taps import Recording
from kdgraft.terms import Term
from kdgraft.wiring import Wiring

from .dense import DenseHeads, distribution_bins
from .heads import same_box_coder
from .picking import pick, pick_weights
from .predictions import find_heads
from .registry import TERMS


@TERMS.register
class LocalizationDistillation(Term):
    r"""Soft targets on the distributions of box edges (LD; Zheng et al., CVPR 2022, arXiv 2102.12252).

    .. math:: \sum_i w_i \tfrac14 \sum_e \mathrm{LD}_{ie} \Big/ \sum_i w_i

    over the anchors i of a region and their four edges e. On the main region (the positives), :math:`w` is the student's
    best class score; on the valuable localization region it is the IoU. The sum of weights is taken over the whole batch and all
    processes, so that the loss grows with neither. The authors' code (and mmdet's ``LDHead``) does not divide: there the
    published weight 0.25 multiplies a sum over all positives of a mean over bins. On COCO, with three images of 800 pixels
    a GPU, a weight of 1.2 has about the same effect here on the main region, and 2.6 on the other.

    Args:
        temperature: T > 0, 10 in the paper.
        anchors: ``"main"`` or ``"vlr"``; the paper's full method has a term for each.
        variant: ``"paper"`` sums over bins, ``"code"`` averages them; see :func:`kdgraft.losses.localization`.
        vlr_variant: see :func:`kdgraft_det.regions.valuable_region`.
    """

    hears_ensembles = True
    heads: DenseHeads

    def __init__(
        self,
        temperature: float = 10.0,
        *,
        anchors: Literal["main", "vlr"] = "main",
        variant: Literal["code", "paper"] = "paper",
        vlr_variant: Literal["paper", "code"] = "paper",
        weight: Weight = 1.2,
        **settings: Any,
    ) -> None:
        super().__init__(weight=weight, **settings)
        check_temperature(temperature)
        if anchors not in ("main", "vlr"):
            raise DistillError(f"LocalizationDistillation: anchors must be 'main' or 'vlr', got {anchors!r}")
        for given in (variant, vlr_variant):
            if given not in ("code", "paper"):
                raise DistillError(f"LocalizationDistillation: variant must be 'code' or 'paper', got {given!r}")
        if anchors == "main" and vlr_variant != "paper":
            raise DistillError("LocalizationDistillation: vlr_variant says which anchors 'vlr' has; leave it out")
        self.temperature, self.anchors, self.variant, self.vlr_variant = temperature, anchors, variant, vlr_variant

    def prepare(self, student: nn.Module, teacher: nn.Module) -> None:
        """Find the two dense heads, and refuse those without distributions of the same bins."""
        heads = find_heads(student, teacher, "auto", self.name)
        if not isinstance(heads, DenseHeads):
            raise WiringError(
                f"{self.name}: a {type(student).__name__} predicts box edges as numbers, not as distributions (reg_max); use a "
                "GFLHead, or BoundedRegression"
            )
        bins = [distribution_bins(head, self.name) for head in (heads.student, heads.teacher)]
        if bins[0] != bins[1]:
            raise WiringError(
                f"{self.name}: the student's edges have {bins[0]} bins, the teacher's {bins[1]}; give both the same reg_max"
            )
        same_box_coder(heads.student, heads.teacher, self.name)
        self.heads = heads
        self.student_taps, self.teacher_taps = heads.box_taps

    def wire(self, wiring: Wiring) -> None:
        """List the compared box outputs for ``kdgraft check``."""
        for s, t, s_tap, t_tap in self.heads.shapes(wiring, "boxes", self.name):
            self.rows.append(self.row(s, t, taps=(s_tap, t_tap), region=self.anchors))

    def forward(self, student: Recording, teacher: Recording, batch: Batch) -> Ratio:
        """Return the weighted mean of the divergence over the anchors of the region."""
        ours, theirs = self.heads.student, self.heads.teacher
        assignment = ours.assignment(student, batch)
        weights = assignment.weights(self.anchors, batch, self.vlr_variant)
        chosen = weights > 0
        edges = self._edges(pick(student.tensors(ours.boxes), chosen, 1))
        targets = combined(
            teacher, lambda member: self._edges(pick(member.tensors(theirs.boxes), chosen, 1)), "softmax"
        )
        items = localization(edges, targets, self.temperature, variant=self.variant, reduction="none").mean(-1)
        if self.anchors == "main":
            scores = ours.logits(student, chosen).detach().float().sigmoid()
            return weighted_ratio(items, scores.amax(1))
        return weighted_ratio(items, pick_weights(weights, chosen, assignment.num_per_level))

    def _edges(self, picked: Tensor) -> Tensor:
        return picked.unflatten(1, (4, self.heads.student.bins))
