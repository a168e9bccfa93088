"""Heads on object queries (DETR and its variants): the ground truth matches the two models' queries for the same object."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import torch
from mmdet.structures.bbox import bbox_cxcywh_to_xyxy, bbox_xyxy_to_cxcywh
from mmengine.structures import InstanceData
from torch import Tensor

from kdgraft.batch import Batch
from kdgraft.classes import reordered
from kdgraft.errors import WiringError
from kdgraft.pairs import Pairs
from kdgraft.taps import Recording, Tap
from kdgraft.wiring import Wiring

from .heads import HEADS, Anchors, HeadReader, Heads, Kind, same_number_of_classes


class Matched(NamedTuple):
    """The queries of both models at K objects.

    Attributes:
        classes: class logits ``(K, C)`` of student and teacher.
        places: boxes ``(K, 4)`` or masks ``(K, H, W)`` of both.
        objects: those objects of each image that both models have a query for.
    """

    classes: tuple[Tensor, Tensor]
    places: tuple[Tensor, Tensor]
    objects: list[InstanceData]


class QueryHeads(Heads):
    """The last decoder layers of two DETR-type models.

    The two models' queries share neither order nor place. The student's own Hungarian matching assigns one of the student's
    queries to each object and, in a second run, one of the teacher's; these two are compared.
    """

    anchors = ("main",)
    boxes_by_class = True
    averages = False  # each teacher may match an object of its own

    def __init__(self, student: QueryHead, teacher: QueryHead, term: str) -> None:
        self.student, self.teacher = student, teacher
        self.classes, self.host_losses = student.num_classes, student.losses
        self.class_taps = self.box_taps = student.taps, teacher.taps

    def class_pairs(self, student: Recording, teacher: Recording, batch: Batch, anchors: Anchors) -> list[Pairs]:
        """Return the class logits ``(K, C)`` of both queries of each of the K objects."""
        found = self._matched(student, teacher, batch)
        return [Pairs(*found.classes, labels=torch.cat([objects.labels for objects in found.objects]))]

    def box_pairs(self, student: Recording, teacher: Recording, batch: Batch) -> list[Pairs]:
        """Return the boxes ``(K, 4)`` of both queries of each object and the true one, as fractions of the image."""
        found = self._matched(student, teacher, batch)
        assert batch.image_sizes is not None
        images = zip(found.objects, batch.image_sizes, strict=True)
        truth = torch.cat([bbox_xyxy_to_cxcywh(some.bboxes / _pixels(some.bboxes, size)) for some, size in images])
        return [Pairs(*found.places, target=truth)]

    def check_classes(self, term: str) -> None:
        same_number_of_classes(self.classes, self.teacher.num_classes, term)

    def check_boxes(self, term: str) -> None:
        """Raise a :class:`WiringError` unless both heads have equally many classes, which the matching of boxes uses too."""
        self.check_classes(term)

    def shapes(self, wiring: Wiring, kind: Kind, term: str) -> list[tuple[Any, Any, Tap, Tap]]:
        taps = [reader.taps[0 if kind == "classes" else 1] for reader in (self.student, self.teacher)]
        ours, theirs = (
            reader.logits(recording) if kind == "classes" else reader.regression(recording)
            for reader, recording in (
                (self.student, wiring.student_recording),
                (self.teacher, wiring.teacher_recording),
            )
        )
        return [(ours, theirs, taps[0], taps[1])]

    def objects(self, student: Recording, batch: Batch) -> list[InstanceData]:
        """Return the objects of each image, as the student's assigner takes them."""
        assert batch.boxes is not None
        images = zip(batch.boxes, batch.labels, strict=True)
        return [InstanceData(bboxes=boxes, labels=labels) for boxes, labels in images]

    def _matched(self, student: Recording, teacher: Recording, batch: Batch) -> Matched:
        """Return the predictions of both models at each object's queries."""

        def match() -> Matched:
            assert batch.image_sizes is not None
            outputs = [
                (reader.logits(recording), reader.regression(recording))
                for reader, recording in ((self.student, student), (self.teacher, teacher))
            ]
            theirs = outputs[1][0].flatten(0, 1)
            outputs[1] = reordered(theirs, teacher.class_order).view_as(outputs[1][0]), outputs[1][1]
            sides: list[list[tuple[Tensor, Tensor]]] = [[], []]
            kept = []
            images = zip(self.objects(student, batch), batch.image_sizes, strict=True)
            for image, (objects, size) in enumerate(images):
                found = [self._queries(scores[image], places[image], objects, size) for scores, places in outputs]
                both = (found[0] >= 0) & (found[1] >= 0)  # with more objects than queries, some objects have none
                for side, (classes, places), queries in zip(sides, outputs, found, strict=True):
                    side.append((classes[image][queries[both]], places[image][queries[both]]))
                kept.append(objects[both])
            (classes, places), (their_classes, their_places) = (
                tuple(torch.cat(parts) for parts in zip(*side, strict=True)) for side in sides
            )
            return Matched((classes, their_classes), (places, their_places), kept)

        return batch.once(("queries", student.model, teacher.model), match)

    @torch.no_grad()
    def _queries(self, classes: Tensor, places: Tensor, objects: InstanceData, size: tuple[int, int]) -> Tensor:
        """Return the query of each object, ``(objects,)``, and -1 for an object without one."""
        # Non-finite values would make scipy end the run here. They cause the engine to drop the term later.
        scores, places = (torch.nan_to_num(part.float()) for part in (classes, places))
        predicted, truth = self.compared(scores, places, objects, size)
        assigned = self.student.assigner.assign(
            pred_instances=predicted, gt_instances=truth, img_meta=dict(img_shape=size)
        ).gt_inds
        queries = (assigned > 0).nonzero()[:, 0]
        found = torch.full_like(objects.labels, -1)
        found[assigned[queries] - 1] = queries
        return found

    def compared(
        self, scores: Tensor, places: Tensor, objects: InstanceData, size: tuple[int, int]
    ) -> tuple[InstanceData, InstanceData]:
        """Return the predictions ``(Q, …)`` and the objects of an image as the assigner compares them."""
        boxes = bbox_cxcywh_to_xyxy(places) * _pixels(places, size)
        return InstanceData(scores=scores, bboxes=boxes), objects


def _pixels(like: Tensor, size: tuple[int, int]) -> Tensor:
    """Return (width, height, width, height) of an image, by which the fractions of a box are multiplied."""
    return like.new_tensor([size[1], size[0]]).repeat(2)


@HEADS.register("DINOHead")
@HEADS.register("DABDETRHead")
@HEADS.register("ConditionalDETRHead")
@HEADS.register("DETRHead")
@HEADS.register("DeformableDETRHead")
class QueryHead(HeadReader):
    """Reads one kind of head on object queries: class logits and boxes of each decoder layer, of which the last is compared."""

    pair = QueryHeads
    paths = ("bbox_head",)
    trained = ("forward", "loss_by_feat_single")
    predicted = ("forward", "predict_by_feat", "_predict_by_feat_single")
    losses: ClassVar[tuple[str, ...]] = ("loss_cls",)

    def __init__(self, head: Any, path: str, owner: str) -> None:
        super().__init__(head, path, owner)
        self.num_classes = head.num_classes
        self.assigner: Any = getattr(head, "assigner", None)  # a teacher needs none
        self.sigmoid = head.loss_cls.use_sigmoid
        self.classes, self.boxes = Tap.parse(f"{path}[0]"), Tap.parse(f"{path}[1]")

    def prepare(self, model: Any, term: str) -> None:
        """Read the number of queries, and refuse softmax classes."""
        self.queries = model.num_queries
        if not self.sigmoid:
            raise WiringError(
                f"{term}: the {self.owner}'s {self.kind} is not one that this term can read: its classes share a softmax, and "
                "queries are compared by a sigmoid for each class; FeatureImitation works with any detector"
            )

    @property
    def taps(self) -> tuple[Tap, ...]:
        """The taps that :meth:`logits` and :meth:`regression` read."""
        return self.classes, self.boxes

    def logits(self, recording: Recording) -> Tensor:
        """Return the class logits ``(B, Q, C)`` of the last layer, without DINO's denoising queries, which come first."""
        found: Tensor = recording[self.classes][-1]
        return found[:, -self.queries :]

    def regression(self, recording: Recording) -> Tensor:
        """Return the boxes ``(B, Q, 4)`` of the last layer: centre and size as fractions of the image."""
        found: Tensor = recording[self.boxes][-1]
        return found[:, -self.queries :]
