"""Reader of detectors: features of the pyramid, and class outputs of dense heads, RoI heads and heads on queries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

from torch import nn

from kdgraft.batch import Batch
from kdgraft.errors import DistillError, WiringError
from kdgraft.pairs import Compared, Numbers, Pairs, Scores
from kdgraft.readers import Reader
from kdgraft.taps import Recording
from kdgraft.wiring import Wiring
from kdgraft_hosts import DET

from .heads import Anchors, Heads
from .predictions import HEAD_NAMES, HeadName, find_heads

Activation = Literal["auto", "sigmoid", "softmax"]


class DetReader(Reader):
    """Reads the pyramid and the heads of two detectors."""

    default_taps: ClassVar = {"features": "neck[*]", "samples": "backbone[-1]"}
    lacks: ClassVar = DET.lacks
    no_specialists = "they know classes of whole samples, and a detector scores places of an image"
    names_losses = True

    def scores(  # type: ignore[override]  # each host has settings of its own
        self,
        student: nn.Module,
        teacher: nn.Module,
        *,
        head: HeadName = "auto",
        activation: Activation = "auto",
        anchors: Anchors | None = None,
    ) -> Scores:
        """Return the reader of a head's class outputs.

        Args:
            student: the student.
            teacher: the teacher.
            head: ``"bbox_head"``, ``"rpn_head"`` (of a two-stage detector), ``"roi_head"`` or ``"panoptic_head"`` (of MaskFormer and
                Mask2Former). ``"auto"`` is the head that predicts the final detections.
            activation: ``"sigmoid"`` for independent classes, as dense heads and DETR are trained, or ``"softmax"`` over the
                classes, as in LD's class distillation (Zheng et al. 2022: T = 2, mean over classes, weight 10, main region). RoI
                heads are trained and compared with a softmax over classes and background.
            anchors: the anchors, proposals or queries that count; by default ``"all"``, and ``"main"`` for queries.

                * ``"all"``: for a dense head all valid anchors, divided by the sum of the teacher's best class scores. This sum is
                  the teacher's estimate of the number of objects and, unlike the number of positives, never 0. For a head that
                  samples its anchors (RPN) the mean over the sampled ones. For an RoI head the mean over the student's sampled
                  proposals, on which the teacher's head runs too.
                * ``"main"`` (the positives) and ``"vlr"`` (dense heads with anchors, weighted by IoU, including anchors that the
                  assigner ignores or does not sample): divided by the sum of weights. For a DETR-type model, whose queries have no
                  fixed place, the two queries that are matched to the same object.
        """
        for name, value, choices in (
            ("head", head, HEAD_NAMES),
            ("activation", activation, ("auto", "sigmoid", "softmax")),
            ("anchors", anchors, ("all", "main", "vlr", None)),
        ):
            self._check(name, value, choices)
        return HeadScores(find_heads(student, teacher, head, self.term), self.term, activation, anchors)

    def numbers(  # type: ignore[override]  # each host has settings of its own
        self, student: nn.Module, teacher: nn.Module, *, head: HeadName = "auto"
    ) -> Numbers:
        """Return the reader of a head's boxes at the positives of the student's assigner.

        Args:
            student: the student.
            teacher: the teacher.
            head: see :meth:`scores`.
        """
        self._check("head", head, HEAD_NAMES)
        return HeadBoxes(find_heads(student, teacher, head, self.term), self.term)

    def masks(self, student: nn.Module, teacher: nn.Module) -> Numbers:
        """Return the reader of the masks of objects that two detectors' heads predict.

        Args:
            student, teacher: the models.
        """
        heads = find_heads(student, teacher, "auto", self.term)
        heads.find_masks(student, teacher, self.term)
        return HeadMasks(heads, self.term)

    def _check(self, name: str, value: Any, choices: Sequence[str | None]) -> None:
        """Raise a :class:`DistillError` unless a setting is one of ``choices``."""
        if value not in choices:
            allowed = ", ".join(choice for choice in choices if choice is not None)
            raise DistillError(f"{self.term}: {name} must be one of {allowed}, got {value!r}")


class HeadScores(Scores):
    """The class logits of two heads of one kind. The stages of a cascade have equal weights."""

    def __init__(self, heads: Heads, term: str, activation: Activation, anchors: Anchors | None) -> None:
        self.term, self.heads = term, heads
        self.heads.check_classes(term)
        self.averages, self.compares_classes = self.heads.averages, not self.heads.proposes
        self.taps, self.reading = self.heads.class_taps, self.heads.class_reading
        self.host_losses = self.heads.host_losses
        self.anchors = self.heads.anchors[0] if anchors is None else anchors
        if self.anchors not in self.heads.anchors:
            raise WiringError(f"{term}: this head has no anchors={anchors!r}; use {' or '.join(self.heads.anchors)}")
        if self.heads.softmax and activation == "sigmoid":
            raise WiringError(f"{term}: this head's classes share one softmax; leave activation out")
        self.independent = not self.heads.softmax and activation != "softmax"
        self.background = self.heads.softmax or self.independent
        self.width = self.heads.classes + self.heads.softmax

    def wire(self, wiring: Wiring) -> list[Compared]:
        """Return the compared class outputs of each level or stage."""
        shapes = self.heads.shapes(wiring, "classes", self.term)
        return [Compared(s, t, (s_tap, t_tap), self.anchors) for s, t, s_tap, t_tap in shapes]

    def pairs(self, student: Recording, teacher: Recording, batch: Batch) -> list[Pairs]:
        """Return the aligned class logits of a step, one entry a stage."""
        found = self.heads.class_pairs(student, teacher, batch, self.anchors)
        return [replace(pairs, independent=bool(self.independent)) for pairs in found]


class HeadBoxes(Numbers):
    """The boxes ``(K, 4)`` of two heads of one kind, and the true ones, in the unit that the heads regress."""

    def __init__(self, heads: Heads, term: str) -> None:
        self.term, self.heads = term, heads
        heads.check_boxes(term)
        self.averages, self.compares_classes = heads.averages, heads.boxes_by_class
        self.taps, self.reading = heads.box_taps, heads.box_reading

    def wire(self, wiring: Wiring) -> list[Compared]:
        """Return the compared box outputs of each level or stage."""
        shapes = self.heads.shapes(wiring, "boxes", self.term)
        return [Compared(s, t, (s_tap, t_tap), "main") for s, t, s_tap, t_tap in shapes]

    def pairs(self, student: Recording, teacher: Recording, batch: Batch) -> list[Pairs]:
        """Return the aligned boxes of a step, one entry a stage."""
        return self.heads.box_pairs(student, teacher, batch)


class HeadMasks(Numbers):
    """The masks ``(K, P)``, logits of P pixels, that two heads of one kind predict for the same K objects."""

    needs_targets = False

    def __init__(self, heads: Heads, term: str) -> None:
        self.term, self.heads = term, heads
        self.averages, self.compares_classes = heads.averages, heads.masks_by_class
        self.taps, self.reading = heads.mask_taps, heads.mask_reading

    def wire(self, wiring: Wiring) -> list[Compared]:
        """Return the compared mask outputs of each stage."""
        shapes = self.heads.shapes(wiring, "masks", self.term)
        return [Compared(s, t, (s_tap, t_tap), "main") for s, t, s_tap, t_tap in shapes]

    def pairs(self, student: Recording, teacher: Recording, batch: Batch) -> list[Pairs]:
        """Return the aligned masks of a step, one entry a stage."""
        return self.heads.mask_pairs(student, teacher, batch)
