"""Pairs of detection heads, as terms on predictions read them: aligned class scores and boxes of student and teacher.

A :class:`Heads` is built from two heads of one kind (dense heads, RoI heads, or heads on queries) before the dry run. It names the
taps that it needs, and pairs class logits, and boxes with their targets.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from mmdet.models.dense_heads import AnchorFreeHead, DETRHead, RPNHead, SABLRetinaHead, YOLOXHead
from mmdet.models.dense_heads.anchor_head import AnchorHead
from mmdet.models.roi_heads.bbox_heads.bbox_head import BBoxHead
from torch import Tensor, nn

from kdgraft.batch import Batch
from kdgraft.errors import WiringError
from kdgraft.pairs import Pairs
from kdgraft.taps import Recording, Tap
from kdgraft.wiring import Wiring
from kdgraft_mm.class_outputs import scores_classes

Anchors = Literal["all", "main", "vlr"]


class Heads(ABC):
    """Two heads of one kind.

    Attributes:
        classes: the student's number of classes without the background.
        class_taps, box_taps: the taps of (student, teacher) that pairs of classes and of boxes need.
        host_losses: the host's own class losses, by name.
    """

    softmax: ClassVar[bool] = False
    """True for a softmax over classes and background (the last one), false for a sigmoid for each class."""
    anchors: tuple[Anchors, ...] = ("all", "main")
    """The sets of anchors (or proposals, or queries) that this kind of head supports, the default first."""
    averages: bool = True
    """True where several teachers predict at the same places, so that their predictions can be averaged."""
    proposes: bool = False
    """True for a region proposal network, whose only class is "object"."""
    boxes_by_class: bool = False
    """True where the choice among the teacher's boxes depends on its classes, so that both heads need the same classes."""
    class_reading: Any = None
    box_reading: Any = None
    """The reading of the teacher's classes and boxes, beside the taps: the members of an Ensemble need the same one."""

    classes: int
    class_taps: tuple[Sequence[Tap], Sequence[Tap]]
    box_taps: tuple[Sequence[Tap], Sequence[Tap]]
    host_losses: Sequence[str]

    @abstractmethod
    def class_pairs(self, student: Recording, teacher: Recording, batch: Batch, anchors: Anchors) -> list[Pairs]:
        """Return class logits ``(K, C)`` at a set of anchors: one entry a stage, with equal weights."""

    @abstractmethod
    def box_pairs(self, student: Recording, teacher: Recording, batch: Batch) -> list[Pairs]:
        """Return boxes ``(K, 4)`` and their targets at the positives of the student's assigner: one entry a stage."""

    @abstractmethod
    def check_classes(self, term: str) -> None:
        """Raise a :class:`WiringError` unless the class scores of both heads can be compared."""

    @abstractmethod
    def check_boxes(self, term: str) -> None:
        """Raise a :class:`WiringError` unless the boxes of both heads can be compared."""

    @abstractmethod
    def shapes(self, wiring: Wiring, kind: Literal["classes", "boxes"], term: str) -> list[tuple[Any, Any, Tap, Tap]]:
        """Return the compared outputs of the dry run with their taps, for ``kdgraft check``.

        Raises:
            WiringError: the teacher has its own resolution, so that the two predict at different places.
        """


def same_number_of_classes(student: int, teacher: int, term: str) -> None:
    """Raise a :class:`WiringError` unless both predict equally many classes."""
    if student != teacher:
        raise WiringError(
            f"{term}: the student predicts {student} classes, the teacher {teacher}; train both on the same classes, or compare features"
        )


def same_box_coder(student: Any, teacher: Any, term: str) -> None:
    """Raise a :class:`WiringError` unless two heads have the same box coder."""
    left, right = student.bbox_coder, teacher.bbox_coder
    if type(left) is not type(right) or vars(left) != vars(right):
        raise WiringError(
            f"{term}: student and teacher code boxes differently, {type(left).__name__} {vars(left)} and "
            f"{type(right).__name__} {vars(right)}; give both the same bbox_coder"
        )


def check_upright(head: Any, owner: str, term: str) -> None:
    """Raise a :class:`WiringError` for a head whose boxes, and therefore anchors, are not upright."""
    size = getattr(getattr(head, "bbox_coder", None), "encode_size", 4)
    if size != 4:
        raise WiringError(
            f"{term}: the {owner}'s {type(head).__name__} predicts boxes of {size} numbers (rotated ones), and terms on "
            "predictions compare upright ones; use FeatureImitation or FocalGlobal, which take the upright boxes around objects"
        )


def known_head(
    head: Any, kinds: Sequence[type], owner: str, *, trained: Sequence[str], predicted: Sequence[str]
) -> type | None:
    """Return the first of ``kinds`` whose methods a head has unchanged, as an overridden method may change its outputs' meaning.

    Args:
        head: the head.
        kinds: classes of heads.
        owner: ``"student"`` or ``"teacher"``.
        trained: methods that the training of a head uses.
        predicted: methods that the prediction uses. They define a teacher's outputs, however it was trained.
    """
    for methods in [trained] if owner == "student" else [trained, predicted]:
        own = [method for method in methods if hasattr(head, method)]
        for kind in kinds:
            if isinstance(head, kind) and all(getattr(type(head), m, 0) is getattr(kind, m, 1) for m in own):
                return kind
    return None


_SCORES_FIRST = (AnchorHead, AnchorFreeHead, DETRHead, SABLRetinaHead, YOLOXHead, BBoxHead)
"""Heads whose first output is class scores; the second is boxes, and the others do not depend on classes."""


def reads_classes(model: Any, tap: Tap, tensor: Tensor) -> bool:
    """Return true where the channels of a tapped tensor stand for classes: a head's class outputs, and its last layer for them.

    A region proposal network has no classes, and neither has a mask head with one mask for all classes.
    """
    if tap.below("rpn_head"):
        return False
    head: Any = model.get_submodule(tap.path)
    index = tap.index
    if isinstance(head, nn.ModuleList):
        head, index = head[0], index[1:]
    if isinstance(head, RPNHead):
        return False
    if isinstance(head, _SCORES_FIRST) and tap.side == "output" and tap.method == "forward":
        boxes_by_class = not getattr(head, "reg_class_agnostic", True)
        return index[:1] in ((), ("*",), (0,)) or (boxes_by_class and index[:1] == (1,))
    return scores_classes(model, tap, tensor)


def reordered(logits: Tensor, order: Tensor | None) -> Tensor:
    """Return the teacher's class logits ``(K, C)`` or ``(K, C + 1)`` in the student's order; a background stays last."""
    if order is None:
        return logits
    background = torch.arange(len(order), logits.shape[1], device=order.device)
    return logits[:, torch.cat([order, background])]
