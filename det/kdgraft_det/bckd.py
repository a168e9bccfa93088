"""Bridging cross-task protocol inconsistency: dense heads' classes as independent ones, and boxes by their overlap.

Yang et al., "Bridging Cross-task Protocol Inconsistency for Distillation in Dense Object Detection", ICCV 2023, arXiv 2308.14286.
"""

from __future__ import annotations

from typing import Any

import torch
from mmdet.models.losses.iou_loss import giou_loss
from torch import Tensor, nn

from kdgraft.balance import Weight
from kdgraft.batch import Batch
from kdgraft.classes import reordered
from kdgraft.errors import WiringError, check_number
from kdgraft.losses import Ratio, focused_entropy, upcast
from kdgraft.sources import combined
from kdgraft.taps import Recording
from kdgraft.terms import Term
from kdgraft.wiring import Wiring

from .dense import DenseHeads
from .dense_heads import DenseHead
from .picking import pick_weights
from .predictions import find_heads
from .registry import RECIPES, TERMS


@RECIPES.register("bckd")
@TERMS.register
class BCKD(Term):
    r"""Classes as independent binary ones, and boxes by their overlap with the teacher's (BCKD; Yang et al. 2023, 2308.14286).

    .. math:: \frac1P \sum_i \Big( \sum_c |p^t_{ic} - p^s_{ic}|\,\mathrm{BCE}(p^s_{ic}, p^t_{ic})
              + 4 \max_c |p^t_{ic} - p^s_{ic}|\,(1 - \mathrm{GIoU}(b^s_i, b^t_i)) \Big)

    over all anchors i that the student's assigner does not ignore and whose position lies in the image. P is the number of the
    student's positives, at least 1 an image, as mmdet counts them, over all processes: the loss grows with neither the batch nor
    the size of the maps. Both models may have heads of different kinds on the same grid, as decoded boxes are compared. The
    weights were published on COCO, GFL teaching GFL; more classes that the two models see differently make the first part larger.
    The authors' code leaves out the levels of the pyramid without positives, and counts the padding in.

    Args:
        classes, boxes: weights of the two parts, 1 and 4 in the paper.
    """

    needs = ("classes", "numbers")
    compares_classes = hears_ensembles = True
    heads: DenseHeads

    def __init__(self, *, classes: float = 1.0, boxes: float = 4.0, weight: Weight = 1.0, **settings: Any) -> None:
        super().__init__(weight=weight, **settings)
        check_number("BCKD", "classes", classes)
        check_number("BCKD", "boxes", boxes)
        self.classes, self.boxes = classes, boxes

    def prepare(self, student: nn.Module, teacher: nn.Module) -> None:
        """Find the two dense heads, and refuse others, and softmax classes."""
        heads = find_heads(student, teacher, "auto", self.name)
        if not isinstance(heads, DenseHeads):
            raise WiringError(
                f"{self.name}: a {type(student).__name__} does not predict at the places of a grid, where this loss compares two "
                "models; use SoftTargets and BoundedRegression"
            )
        heads.check_classes(self.name)
        self.heads = heads
        self.student_taps = heads.box_taps[0]
        self.teacher_taps = (*heads.class_taps[1], *heads.box_taps[1])
        self.compares_classes = not heads.proposes
        self.reading = heads.class_reading, heads.box_reading

    def wire(self, wiring: Wiring) -> None:
        """List the compared outputs for ``kdgraft check``."""
        for kind in ("classes", "boxes"):
            for s, t, s_tap, t_tap in self.heads.shapes(wiring, kind, self.name):  # type: ignore[arg-type]
                self.rows.append(self.row(s, t, taps=(s_tap, t_tap), region="all"))

    def forward(self, student: Recording, teacher: Recording, batch: Batch) -> Ratio:
        """Return the loss on classes and the loss on boxes, each divided by the positives."""
        ours, theirs = self.heads.student, self.heads.teacher
        assignment = ours.assignment(student, batch)
        chosen = assignment.valid

        def scores(member: Recording) -> Tensor:
            found = theirs.logits(member, chosen)
            return found if self.heads.proposes else reordered(found, member.class_order)

        logits, targets = ours.logits(student, chosen), combined(teacher, scores, "sigmoid")

        def places(reader: DenseHead, member: Recording) -> Tensor:
            found = reader.decoded(member.tensors(reader.boxes))
            return pick_weights(found, chosen, assignment.num_per_level)

        boxes, wanted = places(ours, student), combined(teacher, lambda member: places(theirs, member), "value")
        classes = focused_entropy(logits, targets, reduction="sum")
        overlaps = overlap(logits, targets, boxes, wanted)
        positives = assignment.counted.to(classes)
        return Ratio(torch.stack([self.classes * classes, self.boxes * overlaps]), torch.stack([positives] * 2))


def overlap(student_logits: Tensor, teacher_logits: Tensor, student_boxes: Tensor, teacher_boxes: Tensor) -> Tensor:
    """Return the sum of 1 - GIoU of N boxes, each weighted by the largest difference of the class probabilities.

    Args:
        student_logits, teacher_logits: ``(N, C)``; the weight has no gradient.
        student_boxes, teacher_boxes: ``(N, 4)``, x1, y1, x2, y2 in any unit.
    """
    difference = upcast(student_logits).sigmoid() - upcast(teacher_logits).sigmoid()
    weight = difference.detach().abs().amax(-1)
    items = giou_loss(upcast(student_boxes), upcast(teacher_boxes), eps=1e-6, reduction="none")
    # Of no boxes mmdet's function gives no graph.
    return (items.masked_fill(weight == 0, 0) * weight).sum() + student_boxes[:0].sum()
