"""Two dense heads: checks that their predictions can be compared, and the aligned predictions."""

from __future__ import annotations

from typing import Any

import torch
from mmdet.models.task_modules.prior_generators import AnchorGenerator, MlvlPointGenerator
from torch import Tensor

from kdgraft.batch import Batch
from kdgraft.classes import reordered
from kdgraft.errors import WiringError
from kdgraft.pairs import Pairs
from kdgraft.sources import combined
from kdgraft.taps import Recording, Tap
from kdgraft.wiring import Wiring

from .dense_heads import DenseHead, RTMDetInsHead, reads_proposals
from .heads import Anchors, Heads, Kind, no_masks, same_box_coder, same_number_of_classes
from .picking import in_order_of_pick, pick_weights
from .regions import pixels_inside
from .resolution import same_resolution


class DenseHeads(Heads):
    """Two dense heads that predict on the same grid."""

    def __init__(self, student: DenseHead, teacher: DenseHead, term: str) -> None:
        self.student, self.teacher, path = student, teacher, student.path
        same_grid(student, teacher, term)
        self.classes, self.host_losses = self.student.num_classes, self.student.losses
        self.proposes = path == "rpn_head" or reads_proposals(self.student)  # any dense head can be an RPN
        if path == "rpn_head":
            self.host_losses = [name if "rpn" in name else f"rpn_{name}" for name in self.student.losses]
        ours = *self.student.class_taps, *self.student.assignment_taps
        self.class_taps = ours, self.teacher.class_taps
        self.box_taps = (*ours, self.student.boxes), (self.teacher.boxes,)
        self.class_reading = type(self.teacher).logits
        self.anchors = ("all", "main") if self.student.flags is None else ("all", "main", "vlr")

    def class_pairs(self, student: Recording, teacher: Recording, batch: Batch, anchors: Anchors) -> list[Pairs]:
        """Return the class logits ``(K, C)`` of both heads at the K chosen anchors of the batch."""
        assignment = self.student.assignment(student, batch)
        weights = assignment.weights(anchors, batch)
        chosen = weights > 0
        logits = self.student.logits(student, chosen)

        def read(member: Recording) -> Tensor:
            scores = self.teacher.logits(member, chosen)
            return scores if self.proposes else reordered(scores, member.class_order)

        targets = combined(teacher, read, "sigmoid")
        labels = pick_weights(assignment.labels, chosen, assignment.num_per_level)
        if anchors == "all":
            objects = None if self.student.samples else targets.float().sigmoid().amax(1).sum()
            return [Pairs(logits, targets, count=objects, labels=labels)]
        weight = pick_weights(weights, chosen, assignment.num_per_level)
        return [Pairs(logits, targets, weight=weight, labels=labels)]

    def box_pairs(self, student: Recording, teacher: Recording, batch: Batch) -> list[Pairs]:
        """Return the boxes ``(K, 4)`` of both heads and the true ones at the K positives of the batch."""
        assignment = self.student.assignment(student, batch)
        chosen = assignment.positive
        boxes = self.student.regression(student, chosen)
        theirs = combined(teacher, lambda member: self.teacher.regression(member, chosen), "value")
        places = in_order_of_pick(chosen, assignment.num_per_level)
        image = in_order_of_pick(chosen, assignment.num_per_level, images=True)
        target = self.student.true_edges(
            assignment.targets[image, places].float(), assignment.anchors[places], assignment.strides[places]
        )
        return [Pairs(boxes, theirs, target=target)]

    def check_classes(self, term: str) -> None:
        """Raise a :class:`WiringError` unless both heads have equally many sigmoid classes."""
        for head in (self.student, self.teacher):
            check_sigmoid(head, term)
        same_number_of_classes(self.student.channels, self.teacher.channels, term)

    @property
    def box_reading(self) -> Any:  # type: ignore[override]
        return self.teacher.reading

    def check_boxes(self, term: str) -> None:
        """Raise a :class:`WiringError` unless both heads predict boxes in one unit and with one coder."""
        if self.student.unit != self.teacher.unit:
            raise WiringError(
                f"{term}: the student's {self.student.kind} predicts boxes in {self.student.unit}, the teacher's "
                f"{self.teacher.kind} in {self.teacher.unit}; give both a head of one kind"
            )
        if self.student.unit == "deltas":
            same_box_coder(self.student, self.teacher, term)

    def find_masks(self, student: Any, teacher: Any, term: str) -> None:
        """Find the taps of the masks that both heads draw at positions."""
        for reader in (self.student, self.teacher):
            if not isinstance(reader, RTMDetInsHead):
                raise no_masks(reader, term)
        ours, theirs = self.student, self.teacher
        assert isinstance(ours, RTMDetInsHead) and isinstance(theirs, RTMDetInsHead)
        self.mask_taps = (ours.kernels, ours.prototypes, ours.sampled), (theirs.kernels, theirs.prototypes)
        self.mask_reading = theirs.mask_reading

    def mask_pairs(self, student: Recording, teacher: Recording, batch: Batch) -> list[Pairs]:
        """Return the masks ``(K, P)`` of both heads at the K positives of the student's assigner, on the whole padded image."""
        ours, theirs = self.student, self.teacher
        assert isinstance(ours, RTMDetInsHead) and isinstance(theirs, RTMDetInsHead)
        positives = ours.positives(student)
        masks = ours.masks(student, positives)
        targets = combined(teacher, lambda member: theirs.masks(member, positives), "sigmoid")
        counts = [len(places) for places, _ in positives]
        present = pixels_inside(batch, student[ours.prototypes], counts)
        return [Pairs(masks.flatten(1), targets.flatten(1), present=present)]

    def shapes(self, wiring: Wiring, kind: Kind, term: str) -> list[tuple[Any, Any, Tap, Tap]]:
        same_resolution(wiring, term)
        name = "prototypes" if kind == "masks" else kind
        ours, theirs = (getattr(head, name) for head in (self.student, self.teacher))
        recorded = zip(wiring.student_recording.tensors(ours), wiring.teacher_recording.tensors(theirs), strict=True)
        return [(s, t, ours, theirs) for s, t in recorded]


DenseHead.pair = DenseHeads


def same_grid(student: DenseHead, teacher: DenseHead, term: str) -> None:
    """Raise a :class:`WiringError` unless two heads have the same strides and, if both have anchors, the same anchors."""
    if student.strides != teacher.strides:
        raise WiringError(
            f"{term}: student and teacher predict on different strides, {student.strides} and {teacher.strides}; "
            "give both the same anchor_generator.strides"
        )
    if student.num_priors != teacher.num_priors:
        raise WiringError(
            f"{term}: the student has {student.num_priors} anchors a position, the teacher {teacher.num_priors}; "
            "give both the same anchor_generator, or compare features"
        )
    pairs = [getattr(head.generator, "base_anchors", None) for head in (student, teacher)]
    if None in pairs:
        return
    for level, (a, b) in enumerate(zip(*pairs, strict=True)):
        if a.shape != b.shape or not torch.allclose(a, b):
            raise WiringError(
                f"{term}: student and teacher have different anchors on level {level}, {a.tolist()} and {b.tolist()}; "
                "give both the same anchor_generator"
            )


def anchor_levels(model: Any) -> list[tuple[tuple[float, float], Tensor | None]]:
    """Return the stride (x, y) and the base anchors ``(A, 4)`` around position (0, 0) of each level of a model's first stage.

    Heads on points have ``None`` in place of the anchors. The list is empty if no generator is mmdet's own (DETR has none).
    """
    for name in ("rpn_head", "bbox_head"):
        generator = getattr(getattr(model, name, None), "prior_generator", None)
        if isinstance(generator, (AnchorGenerator, MlvlPointGenerator)):
            anchors = getattr(generator, "base_anchors", [None] * len(generator.strides))
            return [((float(x), float(y)), level) for (x, y), level in zip(generator.strides, anchors, strict=True)]
    return []


def check_sigmoid(head: DenseHead, term: str) -> None:
    """Raise a :class:`WiringError` unless a head has a sigmoid for each class."""
    if not head.sigmoid:
        raise WiringError(f"{term}: the {head.owner}'s {head.kind} has softmax classes; this term needs sigmoid ones")


def distribution_bins(head: DenseHead, term: str) -> int:
    """Return the number of bins of a head that predicts box edges as distributions.

    Raises:
        WiringError: the head predicts plain numbers.
    """
    if not head.distributions:
        raise WiringError(
            f"{term}: the {head.owner}'s {head.kind} predicts box edges as numbers, not as distributions "
            "(reg_max), so there is no localization to distil; use a GFLHead, or FeatureImitation and SoftTargets"
        )
    return head.bins
