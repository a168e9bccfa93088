"""Teacher-bounded box regression on any head: dense heads, RoI heads, and heads on queries."""

from __future__ import annotations

from typing import Any

from torch import nn

from kdgraft.batch import Batch
from kdgraft.errors import check_number
from kdgraft.losses import Ratio, bounded_regression, weighted_ratio
from kdgraft.taps import Recording
from kdgraft.terms import Term, check_choice, mean_of
from kdgraft.wiring import Wiring

from .heads import Heads
from .predictions import HEAD_NAMES, HeadName, find_heads
from .registry import TERMS


@TERMS.register
class BoundedRegression(Term):
    r"""Squared box error to the ground truth where the student is not better than its teacher (Chen et al., NeurIPS 2017, eq. 4).

    The loss is the mean over the positives of the student's own assigner, over all processes. (The paper and mmdet divide the
    box losses of RPN and RoI heads by *all* sampled boxes, which reduces the effect of ν there by the share of positives.) The
    teacher predicts at the same anchors, at the same proposals (its RoI head runs on those that the student sampled), or at the
    query of the same object. Boxes are compared in the unit that the head regresses: a box coder's deltas (RetinaNet, ATSS, RPN,
    RoI heads), edges in strides (GFL, FCOS, TOOD, RTMDet, YOLOX), or centre and size as fractions of the image (DETR).

    Args:
        margin: m >= 0, by which the student has to be better than the teacher to have no loss; unpublished, 0 by default.
        head: see :meth:`kdgraft_det.reader.DetReader.scores`.
        weight: ν, 0.5 in the paper.
    """

    heads: Heads

    def __init__(
        self,
        margin: float = 0.0,
        *,
        head: HeadName = "auto",
        weight: float = 0.5,
        **settings: Any,
    ) -> None:
        super().__init__(weight=weight, **settings)
        check_number("BoundedRegression", "margin", margin)
        check_choice(self, "head", head, HEAD_NAMES)
        self.margin, self.head = margin, head

    def prepare(self, student: nn.Module, teacher: nn.Module) -> None:
        """Find the two heads, and refuse those whose boxes cannot be compared."""
        self.heads = find_heads(student, teacher, self.head, self.name)
        self.heads.check_boxes(self.name)
        self.hears_ensembles = self.heads.averages
        self.compares_classes = self.heads.boxes_by_class
        self.reading = self.heads.box_reading
        self.student_taps, self.teacher_taps = self.heads.box_taps

    def wire(self, wiring: Wiring) -> None:
        """List the compared box outputs for ``kdgraft check``."""
        for s, t, s_tap, t_tap in self.heads.shapes(wiring, "boxes", self.name):
            self.rows.append(self.row(s, t, taps=(s_tap, t_tap), region="main"))

    def forward(self, student: Recording, teacher: Recording, batch: Batch) -> Ratio:
        """Return the mean over stages of the bounded squared error, each over its positives."""
        ratios = []
        for pairs in self.heads.box_pairs(student, teacher, batch):
            assert pairs.target is not None
            items = bounded_regression(pairs.student, pairs.teacher, pairs.target, margin=self.margin, reduction="none")
            ratios.append(weighted_ratio(items))
        return mean_of(ratios)
