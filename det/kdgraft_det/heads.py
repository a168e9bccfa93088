"""Heads of detectors as terms on predictions read them: the same places in student's and teacher's heads, of whatever kind.

A :class:`Heads` is made of two heads of one kind (dense, on regions of interest, or on queries) before the dry run. It says which
taps it needs and pairs class logits, and boxes with their targets.
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
from kdgraft.readers import Pairs
from kdgraft.taps import Recording, Tap
from kdgraft.wiring import Wiring
from kdgraft_mm.class_outputs import scores_classes

Anchors = Literal["all", "main", "vlr"]


class Heads(ABC):
    """Two heads of one kind.

    Attributes:
        classes: of the student, background left out.
        class_taps, box_taps: what pairs of classes and of boxes need of (student, teacher).
        host_losses: the host's own class losses, by name.
    """

    softmax: ClassVar[bool] = False
    """Softmax over classes and background (the last), rather than a sigmoid each."""
    anchors: tuple[Anchors, ...] = ("all", "main")
    """The sets of anchors (or proposals, or queries) that mean something on this head, its default first."""
    averages: bool = True
    """Whether several teachers predict at the same places, so that their mean means something."""
    proposes: bool = False
    """A network of proposals, which knows objects alone."""
    boxes_by_class: bool = False
    """Whether which of the teacher's boxes is taken depends on its classes, so that both have to have the same."""
    class_reading: Any = None
    box_reading: Any = None
    """How the teacher's classes and boxes are read, beside the taps."""

    classes: int
    class_taps: tuple[Sequence[Tap], Sequence[Tap]]
    box_taps: tuple[Sequence[Tap], Sequence[Tap]]
    host_losses: Sequence[str]

    @abstractmethod
    def class_pairs(self, student: Recording, teacher: Recording, batch: Batch, anchors: Anchors) -> list[Pairs]:
        """Class logits ``(K, C)`` at a set of anchors; one entry a stage, which weigh alike."""

    @abstractmethod
    def box_pairs(self, student: Recording, teacher: Recording, batch: Batch) -> list[Pairs]:
        """Boxes ``(K, 4)`` where the student's assigner put an object, with their targets; one entry a stage."""

    @abstractmethod
    def check_classes(self, term: str) -> None:
        """Raises a :class:`WiringError` unless both heads predict classes alike."""

    @abstractmethod
    def check_boxes(self, term: str) -> None:
        """Raises a :class:`WiringError` unless both heads' boxes are in one unit."""

    @abstractmethod
    def shapes(self, wiring: Wiring, kind: Literal["classes", "boxes"], term: str) -> list[tuple[Any, Any, Tap, Tap]]:
        """What was compared in the dry run, for ``kdgraft check``.

        Raises:
            WiringError: with a teacher of its own resolution the two do not predict at the same places.
        """


def same_number_of_classes(student: int, teacher: int, term: str) -> None:
    """Raises a :class:`WiringError` unless both predict equally many classes."""
    if student != teacher:
        raise WiringError(
            f"{term}: the student predicts {student} classes, the teacher {teacher}; train both on the same classes"
        )


def same_box_coder(student: Any, teacher: Any, term: str) -> None:
    """Raises a :class:`WiringError` unless two heads code boxes alike."""
    left, right = student.bbox_coder, teacher.bbox_coder
    if type(left) is not type(right) or vars(left) != vars(right):
        raise WiringError(
            f"{term}: student and teacher code boxes differently, {type(left).__name__} {vars(left)} and "
            f"{type(right).__name__} {vars(right)}; give both the same bbox_coder"
        )


def check_upright(head: Any, owner: str, term: str) -> None:
    """Raises a :class:`WiringError` where a head predicts other boxes than upright ones: its anchors are others as well."""
    size = getattr(getattr(head, "bbox_coder", None), "encode_size", 4)
    if size != 4:
        raise WiringError(
            f"{term}: the {owner}'s {type(head).__name__} predicts boxes of {size} numbers (rotated ones), and terms on "
            "predictions compare upright ones; use FeatureImitation or FocalGlobal, which take the upright boxes around objects"
        )


def known_head(
    head: Any, kinds: Sequence[type], owner: str, *, trained: Sequence[str], predicted: Sequence[str]
) -> type | None:
    """The first of ``kinds`` whose methods a head has unchanged: one that is overridden may mean anything.

    Args:
        trained: methods that a head is trained by.
        predicted: methods that it predicts by. They tell what a teacher's outputs mean, however it was trained.
    """
    for methods in [trained] if owner == "student" else [trained, predicted]:
        own = [method for method in methods if hasattr(head, method)]
        for kind in kinds:
            if isinstance(head, kind) and all(getattr(type(head), m, 0) is getattr(kind, m, 1) for m in own):
                return kind
    return None


_SCORES_FIRST = (AnchorHead, AnchorFreeHead, DETRHead, SABLRetinaHead, YOLOXHead, BBoxHead)
"""Heads whose first output scores classes; the second predicts boxes, and what follows knows objects alone."""


def reads_classes(model: Any, tap: Tap, tensor: Tensor) -> bool:
    """Whether the channels of what a tap reads stand for classes: what a head says of them, and the layer that says it.

    A network of proposals knows objects alone, and so does a mask head with one mask for all classes.
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


def in_students_order(logits: Tensor, order: Tensor | None) -> Tensor:
    """Teacher's class logits ``(K, C)`` or ``(K, C + 1)`` in the student's order; a background stays last."""
    if order is None:
        return logits
    background = torch.arange(len(order), logits.shape[1], device=order.device)
    return logits[:, torch.cat([order, background])]
