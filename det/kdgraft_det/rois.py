"""RoI heads: the teacher's head runs on the student's proposals, after the student has sampled them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from mmdet.models.roi_heads import CascadeRoIHead, StandardRoIHead
from mmdet.models.roi_heads.bbox_heads.bbox_head import BBoxHead
from torch import Tensor, nn

from kdgraft.batch import Batch
from kdgraft.engine import Engine, Replay
from kdgraft.errors import WiringError
from kdgraft.pairs import Pairs
from kdgraft.sources import combined
from kdgraft.taps import Recording, Tap
from kdgraft.wiring import Wiring

from .heads import (
    Anchors,
    Heads,
    check_upright,
    known_head,
    reordered,
    same_box_coder,
    same_number_of_classes,
)

ROI_HEAD = "roi_head"
_FEATURES = Tap.parse("extract_feat()")
_BOXES_DRAWN = Tap.parse(f"{ROI_HEAD}._bbox_forward():inputs")
_MASKS_DRAWN = Tap.parse(f"{ROI_HEAD}._mask_forward():inputs")


def _replay(teacher: Any, student: Recording, recorded: Recording, batch: Batch) -> None:
    """Run the teacher's RoI head on its own pyramid and on the student's regions, stage by stage.

    Raises:
        WiringError: the two RoI heads take different arguments.
    """
    scale = recorded.scale
    head, pyramid = teacher.roi_head, recorded[_FEATURES]
    taps = [_BOXES_DRAWN]
    if head.with_mask and not getattr(head, "share_roi_extractor", False):  # a shared one takes features, not RoIs
        taps.append(_MASKS_DRAWN)
    for tap in taps:
        run = getattr(head, tap.method)
        # A student without masks, or in a step without objects, predicts no masks.
        drawn = student[tap] if student.calls(tap) else []
        for arguments in drawn if isinstance(drawn, list) else [drawn]:
            _same_call(run, head, arguments)
            regions = arguments["rois"]
            if scale != 1:
                regions = torch.cat([regions[:, :1], regions[:, 1:] * scale], 1)
            run(**{**arguments, "x": pyramid, "rois": regions})


def _same_call(run: Callable[..., Any], head: Any, arguments: Mapping[str, Any]) -> None:
    """Raise a :class:`WiringError` unless the teacher's head can repeat the student's call on its own features."""
    takes, known = list(inspect.signature(run).parameters), {"x", "rois", "stage"}
    more = [name for name, value in arguments.items() if name not in known and value is not None]
    if set(arguments) - set(takes) or ("stage" in takes) != ("stage" in arguments):
        raise WiringError(
            f"the teacher's {type(head).__name__} is called with ({', '.join(takes)}), the student's with "
            f"({', '.join(arguments)}); to run on the student's proposals both have to be of one kind"
        )
    if more or arguments.get("stage", 0) >= getattr(head, "num_stages", 1):
        raise WiringError(
            f"the teacher's {type(head).__name__} cannot follow the student's call with {', '.join(more) or 'that many stages'}; "
            "tap what comes before the RoI head (neck[*])"
        )


REPLAY = Replay(ROI_HEAD, (_BOXES_DRAWN, _MASKS_DRAWN), (_FEATURES,), _replay)
"""The part of a two-stage teacher that runs on the student's proposals: its whole RoI head, boxes and masks."""


def check_masks(roi_head: Any, distiller: Engine) -> None:
    """Raise a :class:`WiringError` if a term taps the teacher's mask head, and the student draws no regions for it."""
    taps = [tap for term in distiller.all_terms for tap in term.teacher_taps if tap.below(f"{ROI_HEAD}.mask_head")]
    if taps and getattr(roi_head, "share_roi_extractor", False):
        raise WiringError(
            f"the student's mask head has no RoI extractor of its own, so that the teacher's cannot run on its regions for "
            f"'{taps[0]}'; give the student a mask_roi_extractor, or tap the neck"
        )


def check_samplers(roi_head: Any) -> None:
    """Raise a :class:`WiringError` for a student whose sampler runs the RoI head itself, to find hard proposals."""
    samplers = getattr(roi_head, "bbox_sampler", None)
    for sampler in samplers if isinstance(samplers, (list, tuple)) else [samplers]:
        for part in (sampler, getattr(sampler, "pos_sampler", None), getattr(sampler, "neg_sampler", None)):
            if hasattr(part, "context"):
                raise WiringError(
                    f"the student's {type(part).__name__} runs the RoI head to choose proposals, which cannot be distinguished "
                    "from its training; use a RandomSampler, or terms on the backbone, the neck or the rpn_head"
                )


class RoIHeads(Heads):
    """Two RoI heads on the student's sampled proposals. The stages of a cascade have equal weights."""

    softmax = True

    def __init__(self, student: Any, teacher: Any, term: str) -> None:
        heads = [
            _box_heads(model.roi_head, owner, term)
            for model, owner in zip((student, teacher), ("student", "teacher"), strict=True)
        ]
        same_stages(student.roi_head, teacher.roi_head, term)
        self.heads = [[_Plain(head) for head in found] for found in heads]
        self.classes = self.heads[0][0].num_classes
        self.boxes_by_class = not all(head.agnostic for head in self.heads[1])
        self.box_reading = [head.agnostic for head in self.heads[1]]
        cascade = isinstance(student.roi_head, CascadeRoIHead)
        stages = [f"[{i}]" for i in range(len(heads[0]))] if cascade else [""]
        self.outputs = [Tap.parse(f"{ROI_HEAD}.bbox_head{stage}") for stage in stages]
        self.targets = [Tap.parse(f"{ROI_HEAD}.bbox_head.loss_and_target(){stage}[bbox_targets]") for stage in stages]
        self.class_taps = self.box_taps = (*self.outputs, *self.targets), tuple(self.outputs)
        self.host_losses = tuple(f"s{i}.loss_cls" for i in range(len(stages))) if cascade else ("loss_cls",)

    def class_pairs(self, student: Recording, teacher: Recording, batch: Batch, anchors: Anchors) -> list[Pairs]:
        """Return the class logits ``(K, C + 1)`` of both heads at the K sampled proposals of each stage."""
        found = []
        for stage in range(len(self.outputs)):
            logits = _seen(student, self.outputs, stage)[0]

            def read(member: Recording, stage: int = stage) -> Tensor:
                return reordered(_seen(member, self.outputs, stage)[0], member.class_order)

            labels = _seen(student, self.targets, stage)[0]
            chosen = None if anchors == "all" else (labels < self.classes).float()
            found.append(Pairs(logits, combined(teacher, read, "softmax"), weight=chosen, labels=labels))
        return found

    def box_pairs(self, student: Recording, teacher: Recording, batch: Batch) -> list[Pairs]:
        """Return the deltas ``(K, 4)`` of both heads and the true ones at the K positive proposals of each stage."""
        found = []
        for stage in range(len(self.outputs)):
            labels, _, targets, _ = _seen(student, self.targets, stage)
            rows = (labels < self.classes).nonzero()[:, 0]

            def read(
                recording: Recording, side: int = 1, stage: int = stage, rows: Tensor = rows, labels: Tensor = labels
            ) -> Tensor:
                predicted = _seen(recording, self.outputs, stage)[1]
                return self.heads[side][stage].boxes(predicted, rows, labels[rows], recording.class_order)

            found.append(Pairs(read(student, 0), combined(teacher, read, "value"), target=targets[rows]))
        return found

    def check_classes(self, term: str) -> None:
        same_number_of_classes(self.heads[0][0].num_classes, self.heads[1][0].num_classes, term)

    def check_boxes(self, term: str) -> None:
        """Raise a :class:`WiringError` unless both heads are trained on the deltas of the same box coder."""
        if self.boxes_by_class:
            self.check_classes(term)
        for ours, theirs in zip(*self.heads, strict=True):
            same_box_coder(ours, theirs, term)
            if ours.decoded_targets:
                raise WiringError(
                    f"{term}: the student's bbox_head is trained on decoded boxes (reg_decoded_bbox); this term "
                    "compares what box coders encode, set reg_decoded_bbox=False"
                )

    def shapes(self, wiring: Wiring, kind: Literal["classes", "boxes"], term: str) -> list[tuple[Any, Any, Tap, Tap]]:
        place = 0 if kind == "classes" else 1
        recordings = wiring.student_recording, wiring.teacher_recording
        return [(*(recording[tap][place] for recording in recordings), tap, tap) for tap in self.outputs]


def _seen(recording: Recording, taps: Sequence[Tap], stage: int) -> Sequence[Tensor]:
    """Return the outputs of a stage; for a stage that the host skipped (no proposals left) no rows of the first one's."""
    if recording.calls(taps[stage]):
        found: Sequence[Tensor] = recording[taps[stage]]
        return found
    return [part[:0] for part in recording[taps[0]]]


class _Plain:
    """The properties of a box head that pairs need, without its module."""

    def __init__(self, head: Any) -> None:
        self.num_classes, self.bbox_coder = head.num_classes, head.bbox_coder
        self.agnostic, self.decoded_targets = head.reg_class_agnostic, head.reg_decoded_bbox

    def boxes(self, predicted: Tensor, rows: Tensor, labels: Tensor, order: Tensor | None) -> Tensor:
        """Return the deltas ``(K, 4)`` of chosen rows, those of the true class if the head predicts a box for each class."""
        if self.agnostic:
            return predicted[rows]
        wanted = labels if order is None else order[labels]
        return predicted.unflatten(1, (self.num_classes, -1))[rows, wanted]


def same_stages(student: nn.Module, teacher: nn.Module, term: str) -> None:
    """Raise a :class:`WiringError` unless both RoI heads have equally many stages."""
    counts = [getattr(head, "num_stages", 1) for head in (student, teacher)]
    if counts[0] != counts[1]:
        raise WiringError(
            f"{term}: the student's RoI head has {counts[0]} stages, the teacher's {counts[1]}; the teacher's is run on "
            "the student's proposals stage by stage, so both need as many"
        )


def _box_heads(roi_head: Any, owner: str, term: str) -> Sequence[Any]:
    kinds = (StandardRoIHead, CascadeRoIHead)
    trained, predicted = ("loss", "bbox_loss", "_bbox_forward"), ("_bbox_forward", "predict_bbox")
    known = known_head(roi_head, kinds, owner, trained=trained, predicted=predicted)
    boxes: Any = getattr(roi_head, "bbox_head", None)
    heads: list[Any] = list(boxes) if isinstance(boxes, nn.ModuleList) else [boxes]
    for head in heads:
        check_upright(head, owner, term)
        reads = isinstance(head, BBoxHead) and type(head).get_targets is BBoxHead.get_targets
        if known is None or not reads or head.custom_cls_channels or head.loss_cls.use_sigmoid:
            raise WiringError(
                f"{term}: the {owner}'s {type(roi_head).__name__} with {type(head).__name__} is not one that this term can "
                "read (StandardRoIHead, CascadeRoIHead with softmax classes); FeatureImitation works with any detector"
            )
    return heads
