"""Detection heads as terms on predictions read them: one reader for each head, and pairs of two of them.

A :class:`HeadReader` says what the outputs of one kind of head mean; :data:`HEADS` finds it by the class of the head. A
:class:`Heads` is built from the readers of two heads of one kind (dense heads, RoI heads, or heads on queries) before the dry run.
It names the taps that it needs, and pairs class logits, and boxes with their targets.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from mmdet.models.dense_heads import AnchorFreeHead, DETRHead, RPNHead, SABLRetinaHead, YOLOXHead
from mmdet.models.dense_heads.anchor_head import AnchorHead
from mmdet.models.roi_heads.bbox_heads.bbox_head import BBoxHead
from torch import Tensor, nn

from kdgraft.batch import Batch
from kdgraft.errors import WiringError
from kdgraft.pairs import Pairs
from kdgraft.registry import Registry
from kdgraft.taps import Recording, Tap
from kdgraft.wiring import Wiring
from kdgraft_mm.class_outputs import scores_classes

Anchors = Literal["all", "main", "vlr"]
Kind = Literal["classes", "boxes", "masks"]
HEADS = Registry("head", "kdgraft.det.heads")
"""Readers of heads by the name of the head's class. A subclass is read as its nearest ancestor whose methods it keeps."""


class HeadReader:
    """Reads one head of a detector; a subclass is registered in :data:`HEADS` under the name of the head's class.

    It keeps no module, so that none is registered or copied with a term. Take the base that reads the nearest kind of head:
    ``DenseHead``, ``RoIHead`` with ``BoxHead``, or ``QueryHead``; a reader of another kind brings a ``pair`` of its own.
    """

    pair: ClassVar[type[Heads]]
    """The class that compares two heads of this kind: ``pair(student_reader, teacher_reader, term)``."""
    paths: ClassVar[tuple[str, ...]] = ("bbox_head", "rpn_head")
    """The places of a detector where such heads are."""
    trained: ClassVar[tuple[str, ...]] = ("forward",)
    """The methods of the head on which its training depends: a student whose class overrides one of them is not read."""
    predicted: ClassVar[tuple[str, ...]] = ("forward",)
    """The same of its prediction, which says what the outputs of a teacher mean, however that was trained."""

    def __init__(self, head: Any, path: str, owner: str) -> None:
        self.kind, self.path, self.owner = type(head).__name__, path, owner

    def prepare(self, model: Any, term: str) -> None:
        """Read what only the whole model knows; raise a :class:`WiringError` for a head that cannot be compared at all."""


class Heads(ABC):
    """Two heads of one kind.

    Attributes:
        classes: the student's number of classes without the background.
        class_taps, box_taps: the taps of (student, teacher) that pairs of classes and of boxes need.
        mask_taps: those that pairs of masks need, set by :meth:`find_masks`.
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
    masks_by_class: bool = False
    """The same of the teacher's masks."""
    class_reading: Any = None
    box_reading: Any = None
    mask_reading: Any = None
    """The reading of the teacher's classes, boxes and masks, beside the taps: the members of an Ensemble need the same one."""

    student: Any
    teacher: Any
    classes: int
    class_taps: tuple[Sequence[Tap], Sequence[Tap]]
    box_taps: tuple[Sequence[Tap], Sequence[Tap]]
    mask_taps: tuple[Sequence[Tap], Sequence[Tap]]
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

    def find_masks(self, student: Any, teacher: Any, term: str) -> None:
        """Find what predicts the masks of two models, and the taps to read them, for :meth:`mask_pairs`.

        Raises:
            WiringError: a model predicts no masks, or masks that cannot be compared.
        """
        raise no_masks(self.student, term)

    def mask_pairs(self, student: Recording, teacher: Recording, batch: Batch) -> list[Pairs]:
        """Return the masks ``(K, P)``, logits of P pixels, of K objects: positive proposals, positions or queries; an entry a stage."""
        raise NotImplementedError

    @abstractmethod
    def shapes(self, wiring: Wiring, kind: Kind, term: str) -> list[tuple[Any, Any, Tap, Tap]]:
        """Return the compared outputs of the dry run with their taps, for ``kdgraft check``.

        Raises:
            WiringError: the teacher has its own resolution, so that the two predict at different places.
        """


def no_masks(reader: HeadReader, term: str) -> WiringError:
    """Return the error for a head that predicts no masks of objects."""
    return WiringError(
        f"{term} compares masks of objects, and the {reader.owner}'s {reader.kind} predicts none; use a detector with masks (Mask R-CNN, "
        "RTMDet-Ins, Mask2Former), or FeatureImitation, which works with any detector"
    )


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


def find_reader(head: Any, path: str, owner: str, term: str) -> Any:
    """Return the reader of a head, that of the nearest class whose methods it keeps: an overridden one may change its outputs.

    Raises:
        WiringError: there is no reader for this class of heads; the message names terms that need none.
    """
    check_upright(head, owner, term)
    known = [(kind, HEADS.get(kind.__name__)) for kind in type(head).__mro__ if kind.__name__ in HEADS]
    for by in ("trained",) if owner == "student" else ("trained", "predicted"):
        for kind, reader in known:
            if _keeps(head, kind, getattr(reader, by)):
                return reader(head, path, owner)
    readers: dict[str, Any] = {name: HEADS.get(name) for name in HEADS}
    names = ", ".join(name for name, reader in readers.items() if path in reader.paths and name != "AnchorHead")
    raise WiringError(
        f"{term}: the {owner}'s {type(head).__name__} is not one that this term can read ({names}); register a reader "
        "of your own in kdgraft_det.HEADS; FeatureImitation works with any detector"
    )


def _keeps(head: Any, kind: type, methods: Sequence[str]) -> bool:
    """Return true if a head has the methods of one of its ancestors unchanged."""
    own = [method for method in methods if hasattr(head, method)]
    return all(getattr(type(head), method, 0) is getattr(kind, method, 1) for method in own)


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
