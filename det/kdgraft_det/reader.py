"""Reads detectors: the pyramid by default, and the class outputs of any head: dense, on regions of interest, on queries."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Literal

from torch import nn

from kdgraft.batch import Batch
from kdgraft.errors import DistillError, WiringError
from kdgraft.readers import Compared, Pairs, Reader, Scores
from kdgraft.taps import Recording
from kdgraft.wiring import Wiring

from .heads import Anchors, Heads
from .predictions import HEAD_NAMES, HeadName, find_heads

Activation = Literal["auto", "sigmoid", "softmax"]


class DetReader(Reader):
    """Knows the pyramid and the heads of both detectors."""

    default_taps: ClassVar = {"features": "neck[*]"}

    def scores(  # type: ignore[override]  # each host has settings of its own
        self,
        student: nn.Module,
        teacher: nn.Module,
        *,
        head: HeadName = "auto",
        activation: Activation = "auto",
        anchors: Anchors | None = None,
    ) -> Scores:
        """Class outputs of a head.

        Args:
            head: ``"bbox_head"``, ``"rpn_head"`` (of a two-stage detector) or ``"roi_head"``; ``"auto"`` is that which gives the
                detections.
            activation: ``"sigmoid"`` (independent classes, as dense heads and DETR are trained), or ``"softmax"`` across the
                classes as LD's class distillation takes it (Zheng et al. 2022: T = 2, mean over classes, weight 10, main
                region). RoI heads are trained with a softmax over classes and background, and are compared so.
            anchors: the anchors, proposals or queries that count.

                * ``"all"``: of a dense head all valid anchors, divided by the sum of the teacher's best class scores, which is the
                  number of objects as the teacher sees them; unlike the number of positives it is never 0. Of a head that
                  samples its anchors (RPN) the mean over those that it sampled. Of an RoI head that over the student's sampled
                  proposals, on which the teacher's head is run too.
                * ``"main"`` (the positives) and ``"vlr"`` (weighted by IoU, dense heads with anchors; also those that the
                  assigner ignores or that are not sampled): divided by the sum of weights. Of a DETR-type model, whose queries
                  stand for no place, the two queries that are matched to the same object.

                ``"all"`` by default, ``"main"`` for queries.
        """
        for name, value, choices in (
            ("head", head, HEAD_NAMES),
            ("activation", activation, ("auto", "sigmoid", "softmax")),
            ("anchors", anchors, ("all", "main", "vlr", None)),
        ):
            if value not in choices:
                allowed = ", ".join(choice for choice in choices if choice is not None)
                raise DistillError(f"{self.term}: {name} must be one of {allowed}, got {value!r}")
        return HeadScores(find_heads(student, teacher, head, self.term), self.term, activation, anchors)


class HeadScores(Scores):
    """The class logits of two heads of one kind. A cascade's stages weigh alike."""

    def __init__(self, heads: Heads, term: str, activation: Activation, anchors: Anchors | None) -> None:
        self.term, self.heads = term, heads
        self.heads.check_classes(term)
        self.averages, self.compares_classes = self.heads.averages, not self.heads.proposes
        self.taps, self.reading = self.heads.class_taps, self.heads.class_reading
        self.host_losses = self.heads.host_losses
        self.anchors = self.heads.anchors[0] if anchors is None else anchors
        if self.anchors not in self.heads.anchors:
            raise WiringError(
                f"{term}: anchors={anchors!r} means nothing on this head; take one of {', '.join(self.heads.anchors)}"
            )
        if self.heads.softmax and activation == "sigmoid":
            raise WiringError(f"{term}: an RoI head's classes share one softmax; leave activation out")
        self.independent = not self.heads.softmax and activation != "softmax"
        self.background = self.heads.softmax or self.independent

    def wire(self, wiring: Wiring) -> list[Compared]:
        shapes = self.heads.shapes(wiring, "classes", self.term)
        return [Compared(s, t, (s_tap, t_tap), self.anchors) for s, t, s_tap, t_tap in shapes]

    def pairs(self, student: Recording, teacher: Recording, batch: Batch) -> list[Pairs]:
        found = self.heads.class_pairs(student, teacher, batch, self.anchors)
        return [replace(pairs, independent=bool(self.independent)) for pairs in found]
