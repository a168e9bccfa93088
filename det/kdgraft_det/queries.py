"""Heads on object queries (DETR and its variants): the ground truth matches the two models' queries for the same object."""

from __future__ import annotations

from typing import Any, Literal

import torch
from mmdet.models.dense_heads import DeformableDETRHead, DETRHead, DINOHead
from mmdet.structures.bbox import bbox_cxcywh_to_xyxy, bbox_xyxy_to_cxcywh
from mmengine.structures import InstanceData
from torch import Tensor, nn

from kdgraft.batch import Batch
from kdgraft.errors import WiringError
from kdgraft.pairs import Pairs
from kdgraft.taps import Recording, Tap
from kdgraft.wiring import Wiring

from .heads import Anchors, Heads, known_head, reordered, same_number_of_classes

_CLASSES = Tap.parse("bbox_head[0]")
_BOXES = Tap.parse("bbox_head[1]")
_KINDS = (DeformableDETRHead, DETRHead, DINOHead)
_READ = dict(
    trained=("forward", "loss_by_feat_single"), predicted=("forward", "predict_by_feat", "_predict_by_feat_single")
)


def has_queries(head: nn.Module) -> bool:
    """Return true for a head that predicts from object queries."""
    return isinstance(head, DETRHead)


class QueryHeads(Heads):
    """The last decoder layers of two DETR-type models.

    The two models' queries share neither order nor place. The student's own Hungarian matching assigns one of the student's
    queries to each object and, in a second run, one of the teacher's; these two are compared.
    """

    anchors = ("main",)
    boxes_by_class = True
    host_losses = ("loss_cls",)

    def __init__(self, student: Any, teacher: Any, term: str) -> None:
        for owner, model in (("student", student), ("teacher", teacher)):
            head = model.bbox_head
            if known_head(head, _KINDS, owner, **_READ) is None or not head.loss_cls.use_sigmoid:
                raise WiringError(
                    f"{term}: the {owner}'s {type(head).__name__} is not one that this term can read (the sigmoid heads of "
                    "Deformable DETR and DINO, both models alike); FeatureImitation works with any detector"
                )
        self.assigner = student.bbox_head.assigner
        self.averages = False  # each teacher may match an object of its own
        self.classes, self.teacher_classes = student.bbox_head.num_classes, teacher.bbox_head.num_classes
        self.queries = student.num_queries, teacher.num_queries
        self.class_taps = self.box_taps = (_CLASSES, _BOXES), (_CLASSES, _BOXES)

    def class_pairs(self, student: Recording, teacher: Recording, batch: Batch, anchors: Anchors) -> list[Pairs]:
        """Return the class logits ``(K, C)`` of both queries of each of the K objects."""
        ours, theirs, _, labels = self._matched(student, teacher, batch)
        return [Pairs(ours[0], theirs[0], labels=labels)]

    def box_pairs(self, student: Recording, teacher: Recording, batch: Batch) -> list[Pairs]:
        """Return the boxes ``(K, 4)`` of both queries of each object and the true one, as fractions of the image."""
        ours, theirs, truth, _ = self._matched(student, teacher, batch)
        return [Pairs(ours[1], theirs[1], target=truth)]

    def check_classes(self, term: str) -> None:
        same_number_of_classes(self.classes, self.teacher_classes, term)

    def check_boxes(self, term: str) -> None:
        """Raise a :class:`WiringError` unless both heads have equally many classes, which the matching of boxes uses too."""
        self.check_classes(term)

    def shapes(self, wiring: Wiring, kind: Literal["classes", "boxes"], term: str) -> list[tuple[Any, Any, Tap, Tap]]:
        tap = _CLASSES if kind == "classes" else _BOXES
        return [(wiring.student_recording[tap][-1], wiring.teacher_recording[tap][-1], tap, tap)]

    def _matched(
        self, student: Recording, teacher: Recording, batch: Batch
    ) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], Tensor, Tensor]:
        """Return (class logits, boxes) of student and teacher at each object's queries, the true boxes, and the true classes."""

        def match() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], Tensor, Tensor]:
            assert batch.boxes is not None and batch.image_sizes is not None
            outputs = [  # without DINO's denoising queries, which come first
                (recording[_CLASSES][-1][:, -count:], recording[_BOXES][-1][:, -count:])
                for recording, count in zip((student, teacher), self.queries, strict=True)
            ]
            theirs = outputs[1][0].flatten(0, 1)
            outputs[1] = reordered(theirs, teacher.class_order).view_as(outputs[1][0]), outputs[1][1]
            sides: list[list[tuple[Tensor, Tensor]]] = [[], []]
            truths, true_classes = [], []
            images = zip(batch.boxes, batch.labels, batch.image_sizes, strict=True)
            for image, (boxes, labels, size) in enumerate(images):
                pixels = boxes.new_tensor([size[1], size[0]]).repeat(2)
                found = [self._queries(scores[image], places[image], boxes, labels, size) for scores, places in outputs]
                both = (found[0] >= 0) & (found[1] >= 0)  # with more objects than queries, some objects have none
                for side, (classes, places), queries in zip(sides, outputs, found, strict=True):
                    side.append((classes[image][queries[both]], places[image][queries[both]]))
                truths.append(bbox_xyxy_to_cxcywh(boxes[both] / pixels))
                true_classes.append(labels[both])
            joined = []
            for side in sides:
                classes, places = zip(*side, strict=True)
                joined.append((torch.cat(classes), torch.cat(places)))
            return joined[0], joined[1], torch.cat(truths), torch.cat(true_classes)

        return batch.once(("queries", student.model, teacher.model), match)

    @torch.no_grad()
    def _queries(self, classes: Tensor, boxes: Tensor, truth: Tensor, labels: Tensor, size: tuple[int, int]) -> Tensor:
        """Return the query of each object, ``(objects,)``, and -1 for an object without one."""
        pixels = boxes.new_tensor([size[1], size[0]]).repeat(2)
        # Non-finite values would make scipy end the run here. They cause the engine to drop the term later.
        scores, places = (torch.nan_to_num(part.float()) for part in (classes, boxes))
        predicted = InstanceData(scores=scores, bboxes=bbox_cxcywh_to_xyxy(places) * pixels)
        assigned = self.assigner.assign(
            pred_instances=predicted,
            gt_instances=InstanceData(bboxes=truth, labels=labels),
            img_meta=dict(img_shape=size),
        ).gt_inds
        queries = (assigned > 0).nonzero()[:, 0]
        found = torch.full_like(labels, -1)
        found[assigned[queries] - 1] = queries
        return found
