"""Dense heads: what they predict, whether two of them predict the same thing, and where the ground truth puts positives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from mmdet.models.dense_heads import ATSSHead, GFLHead
from mmdet.models.task_modules.prior_generators import AnchorGenerator, MlvlPointGenerator
from torch import Tensor, nn

from taskdistill.errors import WiringError
from taskdistill.regions import Batch
from taskdistill.taps import Recording, Tap
from taskdistill.terms import Term, Wiring

from .regions import valuable_region

CLASSES = Tap.parse("bbox_head[0][*]")
BOXES = Tap.parse("bbox_head[1][*]")
TARGETS = Tap.parse("bbox_head.get_targets()")

AnchorRegion = Literal["all", "main", "vlr"]
_SUPPORTED = (GFLHead, ATSSHead)


def dense_head(model: nn.Module, owner: str, term: Term) -> Any:
    """The model's dense head, checked to predict what this suite's prediction-level terms read.

    Raises:
        WiringError: the model has no such head; says which heads there are, and what works without.
    """
    head = getattr(model, "bbox_head", None)
    known = any(
        type(head).forward is kind.forward and type(head).get_targets is kind.get_targets  # type: ignore[attr-defined]
        for kind in _SUPPORTED
        if isinstance(head, kind)
    )
    name = type(head).__name__ if head is not None else f"{type(model).__name__} without bbox_head"
    if not known:
        raise WiringError(
            f"{term.name}: the {owner}'s head {name} is not one that this term can read "
            f"({', '.join(kind.__name__ for kind in _SUPPORTED)}); FeatureImitation works with any detector"
        )
    assert head is not None
    if head.num_base_priors != 1:
        raise WiringError(
            f"{term.name}: the {owner}'s {name} has {head.num_base_priors} anchors a position; one is supported"
        )
    return head


def same_grid(student: Any, teacher: Any, term: Term) -> None:
    """Raises a :class:`WiringError` unless two heads predict on the same strides and anchors."""
    left, right = student.prior_generator, teacher.prior_generator
    if list(left.strides) != list(right.strides):
        raise WiringError(
            f"{term.name}: student and teacher predict on different strides, {_first(left.strides)} and "
            f"{_first(right.strides)}; give both the same anchor_generator.strides"
        )
    for level, (a, b) in enumerate(zip(left.base_anchors, right.base_anchors, strict=True)):
        if a.shape != b.shape or not torch.allclose(a, b):
            raise WiringError(
                f"{term.name}: student and teacher have different anchors on level {level}, {a.tolist()} and {b.tolist()}; "
                "give both the same anchor_generator"
            )


def same_box_coder(student: Any, teacher: Any, term: Term) -> None:
    """Raises a :class:`WiringError` unless two heads code boxes alike."""
    left, right = student.bbox_coder, teacher.bbox_coder
    if type(left) is not type(right) or vars(left) != vars(right):
        raise WiringError(
            f"{term.name}: student and teacher code boxes differently, {type(left).__name__} {vars(left)} and "
            f"{type(right).__name__} {vars(right)}; give both the same bbox_coder"
        )


def same_classes(student: Any, teacher: Any, term: Term) -> None:
    """Raises a :class:`WiringError` unless two heads have sigmoid outputs for equally many classes."""
    for owner, head in (("student", student), ("teacher", teacher)):
        if not getattr(head, "use_sigmoid_cls", False):
            raise WiringError(
                f"{term.name}: the {owner}'s {type(head).__name__} has softmax classes; this term needs sigmoid ones"
            )
    if student.cls_out_channels != teacher.cls_out_channels:
        raise WiringError(
            f"{term.name}: the student predicts {student.cls_out_channels} classes, the teacher {teacher.cls_out_channels}; "
            "train both on the same classes"
        )


def anchor_levels(model: Any) -> list[tuple[tuple[float, float], Tensor | None]]:
    """What anchors the model's first stage has: per level its stride (x, y) and base anchors ``(A, 4)`` around position (0, 0).

    ``None`` in place of the anchors for heads on points; no level at all where neither generator is mmdet's (DETR has none).
    """
    for name in ("rpn_head", "bbox_head"):
        generator = getattr(getattr(model, name, None), "prior_generator", None)
        if isinstance(generator, (AnchorGenerator, MlvlPointGenerator)):
            anchors = getattr(generator, "base_anchors", [None] * len(generator.strides))
            return [((float(x), float(y)), level) for (x, y), level in zip(generator.strides, anchors, strict=True)]
    return []


def distribution_bins(head: Any, owner: str, term: Term) -> int:
    """Number of bins of a head that predicts box edges as distributions.

    Raises:
        WiringError: the head predicts plain numbers.
    """
    if not (hasattr(head, "reg_max") and hasattr(head, "integral")):
        raise WiringError(
            f"{term.name}: the {owner}'s {type(head).__name__} predicts box edges as numbers, not as distributions "
            "(reg_max), so there is no localization to distil; use a GFLHead, or FeatureImitation and SoftTargets"
        )
    return int(head.reg_max) + 1


@dataclass
class Assignment:
    """Where the student's own assigner put the ground truth, read from its ``get_targets``; all levels in one row.

    Attributes:
        labels: ``(B, N)``, the background being ``num_classes``.
        assigned: ``(B, N)`` anchors that the assigner looked at. The host counts an image's padding up to the size divisor
            as image.
        valid: ``(B, N)`` those of them whose centre lies in the image itself.
        anchors: ``(B, N, 4)`` in pixels.
        num_per_level: how many of the N each level has.
        num_classes: number of foreground classes.
    """

    labels: Tensor
    assigned: Tensor
    valid: Tensor
    anchors: Tensor
    num_per_level: list[int]
    num_classes: int

    @classmethod
    def of(cls, student: Recording, batch: Batch, num_classes: int) -> Assignment:
        """The assignment of this step, made once for all terms."""
        found = batch.extra.get("assignment")
        if found is None:
            per_level, labels, label_weights = student[TARGETS][:3]
            anchors = torch.cat([level.reshape(len(level), -1, 4) for level in per_level], 1)
            assigned = torch.cat([level.reshape(len(level), -1) for level in label_weights], 1) > 0
            valid = assigned
            if batch.image_sizes is not None:
                sizes = anchors.new_tensor(batch.image_sizes).flip(1)[:, None]
                valid = assigned & ((anchors[..., :2] + anchors[..., 2:]) / 2 < sizes).all(-1)
            found = cls(
                labels=torch.cat([level.reshape(len(level), -1) for level in labels], 1),
                assigned=assigned,
                valid=valid,
                anchors=anchors,
                num_per_level=[level.shape[1] for level in labels],
                num_classes=num_classes,
            )
            batch.extra["assignment"] = found
        return found

    @property
    def positive(self) -> Tensor:
        """``(B, N)`` anchors that hold an object."""
        return (self.labels >= 0) & (self.labels < self.num_classes) & self.valid

    def weights(self, region: AnchorRegion, batch: Batch, variant: Literal["paper", "code"] = "paper") -> Tensor:
        """``(B, N)``: 1 on ``"all"`` valid anchors or on the positives (``"main"``), the IoU in the ``"vlr"``."""
        if region == "all":
            return self.valid.float()
        if region == "main":
            return self.positive.float()
        key = f"vlr {variant}"
        if key not in batch.extra:
            assert batch.boxes is not None
            images = zip(self.anchors, self.assigned, batch.boxes, strict=True)
            found = torch.stack([self._valuable(a, seen, b.to(a), variant) for a, seen, b in images])
            batch.extra[key] = found * self.valid
        return batch.extra[key]

    def _valuable(self, anchors: Tensor, seen: Tensor, boxes: Tensor, variant: Literal["paper", "code"]) -> Tensor:
        # The thresholds are the assigner's, so they are taken from the anchors that it saw, padding and all.
        weights = anchors.new_zeros(len(anchors))
        counts = torch.stack([level.sum() for level in seen.split(self.num_per_level)]).tolist()
        weights[seen] = valuable_region(anchors[seen], counts, boxes, variant=variant)
        return weights


def pick(levels: Sequence[Tensor], chosen: Tensor, num_per_level: Sequence[int]) -> Tensor:
    """Predictions at chosen anchors, without a copy of all the others.

    Args:
        levels: per level ``(B, C, H, W)``.
        chosen: ``(B, N)`` mask over the anchors of all levels.
        num_per_level: H·W of each level.

    Returns:
        ``(K, C)``, level by level, in each the order of ``chosen``.
    """
    rows = []
    for level, mask in zip(levels, chosen.split(list(num_per_level), 1), strict=True):
        image, position = mask.nonzero(as_tuple=True)
        width = level.shape[-1]
        rows.append(level[image, :, position // width, position % width])
    return torch.cat(rows)


def pick_weights(weights: Tensor, chosen: Tensor, num_per_level: Sequence[int]) -> Tensor:
    """The weights ``(B, N)`` at chosen anchors in the order of :func:`pick`: ``(K,)``."""
    counts = list(num_per_level)
    return torch.cat([w[m] for w, m in zip(weights.split(counts, 1), chosen.split(counts, 1), strict=True)])


def heads_of(wiring: Wiring, term: Term) -> tuple[Any, Any]:
    """Student's and teacher's dense heads, checked to predict on the same grid and anchors."""
    student, teacher = dense_head(wiring.student, "student", term), dense_head(wiring.teacher, "teacher", term)
    same_grid(student, teacher, term)
    return student, teacher


def _first(strides: Sequence[Any]) -> list[int]:
    return [stride[0] if isinstance(stride, (tuple, list)) else stride for stride in strides]
