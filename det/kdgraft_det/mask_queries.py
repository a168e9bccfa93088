"""Heads that predict a class and a mask by each object query (MaskFormer, Mask2Former), paired by the student's own matching."""

from __future__ import annotations

from typing import Any, ClassVar

import torch.nn.functional as F
from mmengine.structures import InstanceData
from torch import Tensor

from kdgraft.adapters import resize_to
from kdgraft.batch import Batch
from kdgraft.errors import WiringError
from kdgraft.pairs import Pairs
from kdgraft.taps import Recording, Tap
from kdgraft.wiring import Wiring

from .heads import HEADS, HeadReader, Kind
from .queries import QueryHeads
from .regions import pixels_inside
from .resolution import same_resolution


class MaskQueryHeads(QueryHeads):
    """The last decoder layers of two models that predict masks by queries.

    The objects are those of the student's own loss: instances, and for panoptic segmentation the regions of "stuff" too. The costs of
    the student's assigner are computed on whole masks, on the grid of the predictions, and not at random points, as Mask2Former's own
    loss does to save memory: student and teacher are matched alike, and no number is drawn.
    """

    softmax = True
    masks_by_class = True

    def __init__(self, student: MaskQueryHead, teacher: MaskQueryHead, term: str) -> None:
        super().__init__(student, teacher, term)  # type: ignore[arg-type]
        self.mask_taps = self.class_taps

    def find_masks(self, student: Any, teacher: Any, term: str) -> None:
        """Raise a :class:`WiringError` unless both heads have equally many classes, which the matching of masks uses too."""
        self.check_classes(term)

    def mask_pairs(self, student: Recording, teacher: Recording, batch: Batch) -> list[Pairs]:
        """Return the masks ``(K, P)`` of both queries of each object, on the teacher's grid of the padded image."""
        found = self._matched(student, teacher, batch)
        ours, theirs = found.places
        ours = resize_to(ours[:, None], theirs.shape[-2:])[:, 0]
        counts = [len(objects) for objects in found.objects]
        present = pixels_inside(batch, self.teacher.regression(teacher), counts)
        return [Pairs(ours.flatten(1), theirs.flatten(1), present=present)]

    def check_boxes(self, term: str) -> None:
        """Raise a :class:`WiringError`: queries of these heads have masks."""
        raise WiringError(
            f"{term} compares boxes, and the student's {self.student.kind} predicts masks by queries; use InstanceMasks, or SoftTargets"
        )

    def shapes(self, wiring: Wiring, kind: Kind, term: str) -> list[tuple[Any, Any, Tap, Tap]]:
        same_resolution(wiring, term)
        return super().shapes(wiring, kind, term)

    def objects(self, student: Recording, batch: Batch) -> list[InstanceData]:
        found: list[InstanceData] = student[self.student.truth]
        return found

    def compared(
        self, scores: Tensor, places: Tensor, objects: InstanceData, size: tuple[int, int]
    ) -> tuple[InstanceData, InstanceData]:
        masks = F.interpolate(objects.masks[:, None].float(), places.shape[-2:], mode="area")[:, 0]
        return InstanceData(scores=scores, masks=places), InstanceData(labels=objects.labels, masks=masks)


@HEADS.register("Mask2FormerHead")
@HEADS.register("MaskFormerHead")
class MaskQueryHead(HeadReader):
    """Reads the class logits and the masks of each decoder layer's queries, of which the last layer is compared."""

    pair = MaskQueryHeads
    paths = ("panoptic_head",)
    trained = ("forward", "loss", "loss_by_feat", "preprocess_gt")
    predicted = ("forward", "predict")
    losses: ClassVar[tuple[str, ...]] = ("loss_cls",)

    def __init__(self, head: Any, path: str, owner: str) -> None:
        super().__init__(head, path, owner)
        self.num_classes = head.num_classes
        self.assigner: Any = getattr(head, "assigner", None)  # a teacher needs none
        self.classes, self.drawn = Tap.parse(f"{path}[0]"), Tap.parse(f"{path}[1]")
        self.truth = Tap.parse(f"{path}.loss_by_feat():inputs[batch_gt_instances]")

    @property
    def taps(self) -> tuple[Tap, ...]:
        """The taps that :meth:`logits` and :meth:`regression` read, and for a student those of its objects."""
        outputs = self.classes, self.drawn
        return (*outputs, self.truth) if self.owner == "student" else outputs

    def logits(self, recording: Recording) -> Tensor:
        """Return the class logits ``(B, Q, C + 1)`` of the last layer; "no object" is the last class."""
        found: Tensor = recording[self.classes][-1]
        return found

    def regression(self, recording: Recording) -> Tensor:
        """Return the masks ``(B, Q, H, W)`` of the last layer: logits, on a grid over the padded image."""
        found: Tensor = recording[self.drawn][-1]
        return found
