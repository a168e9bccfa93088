"""RoI heads: the teacher's head runs on the student's proposals, after the student has sampled them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kdgraft.adapters import resize_to
from kdgraft.batch import Batch
from kdgraft.classes import reordered
from kdgraft.engine import Engine, Replay
from kdgraft.errors import WiringError
from kdgraft.pairs import Pairs
from kdgraft.sources import combined
from kdgraft.taps import Recording, Tap
from kdgraft.wiring import Wiring

from .heads import (
    HEADS,
    Anchors,
    HeadReader,
    Heads,
    Kind,
    find_reader,
    no_masks,
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

    def __init__(self, student: RoIHead, teacher: RoIHead, term: str) -> None:
        self.student, self.teacher = student, teacher
        same_stages(student, teacher, term)
        self.classes, self.host_losses = student.num_classes, student.losses
        self.boxes_by_class = not all(stage.agnostic for stage in teacher.stages)
        self.class_reading = [type(stage).logits for stage in teacher.stages]
        self.box_reading = [(type(stage).boxes, stage.agnostic) for stage in teacher.stages]
        self.class_taps = self.box_taps = (*student.outputs, *student.targets), tuple(teacher.outputs)

    def class_pairs(self, student: Recording, teacher: Recording, batch: Batch, anchors: Anchors) -> list[Pairs]:
        """Return the class logits ``(K, C + 1)`` of both heads at the K sampled proposals of each stage."""
        found = []
        for stage in range(len(self.student.stages)):

            def read(member: Recording, stage: int = stage) -> Tensor:
                return reordered(self.teacher.logits(member, stage), member.class_order)

            labels, _ = self.student.assigned(student, stage)
            chosen = None if anchors == "all" else (labels < self.classes).float()
            logits = self.student.logits(student, stage)
            found.append(Pairs(logits, combined(teacher, read, "softmax"), weight=chosen, labels=labels))
        return found

    def box_pairs(self, student: Recording, teacher: Recording, batch: Batch) -> list[Pairs]:
        """Return the deltas ``(K, 4)`` of both heads and the true ones at the K positive proposals of each stage."""
        found = []
        for stage in range(len(self.student.stages)):
            labels, targets = self.student.assigned(student, stage)
            rows = (labels < self.classes).nonzero()[:, 0]
            labels = labels[rows]

            def read(member: Recording, stage: int = stage, rows: Tensor = rows, labels: Tensor = labels) -> Tensor:
                wanted = labels if member.class_order is None else member.class_order[labels]
                return self.teacher.regression(member, stage, rows, wanted)

            boxes = self.student.regression(student, stage, rows, labels)
            found.append(Pairs(boxes, combined(teacher, read, "value"), target=targets[rows]))
        return found

    def find_masks(self, student: Any, teacher: Any, term: str) -> None:
        """Find the mask heads of both models; a mask for each class needs the same classes."""
        self.mask_heads = [
            reader.find_masks(model, term) for reader, model in ((self.student, student), (self.teacher, teacher))
        ]
        self.masks_by_class = not all(head.agnostic for head in self.mask_heads[1])
        if self.masks_by_class:
            self.check_classes(term)
        for head in (head for heads in self.mask_heads for head in heads if not head.agnostic):
            same_number_of_classes(self.classes, head.num_classes, term)
        self.mask_reading = [(type(head).masks, head.agnostic) for head in self.mask_heads[1]]
        self.mask_taps = (
            (*self.student.mask_outputs, *self.student.outputs, *self.student.targets),
            tuple(self.teacher.mask_outputs),
        )

    def mask_pairs(self, student: Recording, teacher: Recording, batch: Batch) -> list[Pairs]:
        """Return the masks ``(K, P)`` of both heads at the K positive proposals of each stage, on the teacher's grid."""
        found = []
        for stage, (ours, theirs) in enumerate(zip(*self.mask_heads, strict=True)):
            labels, _ = self.student.assigned(student, stage)
            labels = labels[labels < self.classes]  # mask heads are given the positives alone, in this order

            def read(member: Recording, stage: int = stage, head: MaskHead = theirs, labels: Tensor = labels) -> Tensor:
                wanted = labels if member.class_order is None else member.class_order[labels]
                return head.masks(self.teacher.mask_logits(member, stage), wanted)

            targets = combined(teacher, read, "sigmoid")
            masks = ours.masks(self.student.mask_logits(student, stage), labels)
            masks = resize_to(masks[:, None], targets.shape[-2:])[:, 0]
            found.append(Pairs(masks.flatten(1), targets.flatten(1), labels=labels))
        return found

    def check_classes(self, term: str) -> None:
        same_number_of_classes(self.student.num_classes, self.teacher.num_classes, term)

    def check_boxes(self, term: str) -> None:
        """Raise a :class:`WiringError` unless both heads are trained on the deltas of the same box coder."""
        if self.boxes_by_class:
            self.check_classes(term)
        for ours, theirs in zip(self.student.stages, self.teacher.stages, strict=True):
            same_box_coder(ours, theirs, term)
            if ours.decoded_targets:
                raise WiringError(
                    f"{term}: the student's bbox_head is trained on decoded boxes (reg_decoded_bbox); this term "
                    "compares what box coders encode, set reg_decoded_bbox=False"
                )

    def shapes(self, wiring: Wiring, kind: Kind, term: str) -> list[tuple[Any, Any, Tap, Tap]]:
        recordings = wiring.student_recording, wiring.teacher_recording
        if kind == "masks":
            taps = zip(self.student.mask_outputs, self.teacher.mask_outputs, strict=True)
            return [(recordings[0][ours], recordings[1][theirs], ours, theirs) for ours, theirs in taps]
        place = 0 if kind == "classes" else 1
        taps = zip(self.student.outputs, self.teacher.outputs, strict=True)
        return [(recordings[0][ours][place], recordings[1][theirs][place], ours, theirs) for ours, theirs in taps]


@HEADS.register("CascadeRoIHead")
@HEADS.register("StandardRoIHead")
class RoIHead(HeadReader):
    """Reads one kind of RoI head, stage by stage; what a stage's own ``bbox_head`` returns is read by a :class:`BoxHead`."""

    pair = RoIHeads
    paths = (ROI_HEAD,)
    trained = ("loss", "bbox_loss", "_bbox_forward")
    predicted = ("_bbox_forward", "predict_bbox")
    stages: Sequence[BoxHead]
    """The reader of each stage's ``bbox_head``."""

    def __init__(self, head: Any, path: str, owner: str) -> None:
        super().__init__(head, path, owner)
        boxes = getattr(head, "bbox_head", None)
        cascade = isinstance(boxes, nn.ModuleList)
        places = [f"[{i}]" for i in range(len(boxes))] if isinstance(boxes, nn.ModuleList) else [""]
        self.outputs = [Tap.parse(f"{path}.bbox_head{place}") for place in places]
        self.mask_outputs = [Tap.parse(f"{path}.mask_head{place}") for place in places]
        self.targets = [Tap.parse(f"{path}.bbox_head.loss_and_target(){place}[bbox_targets]") for place in places]
        self.losses = tuple(f"s{i}.loss_cls" for i in range(len(places))) if cascade else ("loss_cls",)

    def prepare(self, model: Any, term: str) -> None:
        """Find the reader of each stage's ``bbox_head``."""
        boxes = getattr(model.get_submodule(self.path), "bbox_head", None)
        heads = list(boxes) if isinstance(boxes, nn.ModuleList) else [boxes]
        self.stages = [find_reader(head, f"{self.path}.bbox_head", self.owner, term) for head in heads]
        for stage in self.stages:
            stage.prepare(model, term)

    @property
    def num_classes(self) -> int:
        """The number of classes without the background."""
        return self.stages[0].num_classes

    def find_masks(self, model: Any, term: str) -> list[MaskHead]:
        """Return the reader of each stage's ``mask_head``."""
        masks = getattr(model.get_submodule(self.path), "mask_head", None)
        if masks is None:
            raise no_masks(self, term)
        heads = list(masks) if isinstance(masks, nn.ModuleList) else [masks]
        return [find_reader(head, f"{self.path}.mask_head", self.owner, term) for head in heads]

    def mask_logits(self, recording: Recording, stage: int) -> Tensor:
        """Return what a stage's ``mask_head`` returned at its positive proposals, ``(K, C, h, w)`` or ``(K, 1, h, w)``."""
        taps = self.mask_outputs
        reached = recording.calls(taps[stage])  # the host skips a stage that no proposals are left for
        found: Tensor = recording[taps[stage]] if reached else recording[taps[0]][:0]
        return found

    def logits(self, recording: Recording, stage: int) -> Tensor:
        """Return the class logits ``(K, C + 1)`` of a stage at its K sampled proposals; the background is the last class."""
        return self.stages[stage].logits(self.seen(recording, self.outputs, stage))

    def regression(self, recording: Recording, stage: int, rows: Tensor, labels: Tensor) -> Tensor:
        """Return the deltas ``(R, 4)`` of chosen rows; ``labels`` are their true classes, in this model's own order."""
        return self.stages[stage].boxes(self.seen(recording, self.outputs, stage), rows, labels)

    def assigned(self, recording: Recording, stage: int) -> tuple[Tensor, Tensor]:
        """Return the labels ``(K,)`` of the proposals, the number of classes for the background, and the true deltas ``(K, 4)``."""
        labels, _, targets, _ = self.seen(recording, self.targets, stage)
        return labels, targets

    @staticmethod
    def seen(recording: Recording, taps: Sequence[Tap], stage: int) -> Sequence[Tensor]:
        """Return the outputs of a stage; for a stage that the host skipped (no proposals left) no rows of the first one's."""
        if recording.calls(taps[stage]):
            found: Sequence[Tensor] = recording[taps[stage]]
            return found
        return [part[:0] for part in recording[taps[0]]]


@HEADS.register("BBoxHead")
class BoxHead(HeadReader):
    """Reads the ``bbox_head`` of one stage of an RoI head: class logits and boxes of proposals."""

    paths = (f"{ROI_HEAD}.bbox_head",)
    trained = predicted = ("get_targets",)

    def __init__(self, head: Any, path: str, owner: str) -> None:
        super().__init__(head, path, owner)
        self.num_classes, self.bbox_coder = head.num_classes, head.bbox_coder
        self.agnostic, self.decoded_targets = head.reg_class_agnostic, head.reg_decoded_bbox
        self.softmax = not (head.custom_cls_channels or head.loss_cls.use_sigmoid)

    def prepare(self, model: Any, term: str) -> None:
        """Refuse classes that are no softmax over classes and background."""
        if not self.softmax:
            raise WiringError(
                f"{term}: the {self.owner}'s {self.kind} is not one that this term can read: its classes are no softmax over classes "
                "and background; FeatureImitation works with any detector"
            )

    def logits(self, outputs: Sequence[Tensor]) -> Tensor:
        """Return the class logits ``(K, C + 1)``, the background last, from what the head returned."""
        return outputs[0]

    def boxes(self, outputs: Sequence[Tensor], rows: Tensor, labels: Tensor) -> Tensor:
        """Return the deltas ``(R, 4)`` of chosen rows, those of the true class if the head predicts a box for each class."""
        if self.agnostic:
            return outputs[1][rows]
        return outputs[1].unflatten(1, (self.num_classes, -1))[rows, labels]


@HEADS.register("FCNMaskHead")
class MaskHead(HeadReader):
    """Reads the ``mask_head`` of one stage of an RoI head: the mask of each positive proposal."""

    paths = (f"{ROI_HEAD}.mask_head",)
    trained = ("forward", "loss_and_target")
    predicted = ("forward", "predict_by_feat", "_predict_by_feat_single")

    def __init__(self, head: Any, path: str, owner: str) -> None:
        super().__init__(head, path, owner)
        self.agnostic, self.num_classes = head.class_agnostic, head.num_classes

    def masks(self, output: Tensor, labels: Tensor) -> Tensor:
        """Return the masks ``(K, h, w)`` of proposals, those of their true classes if the head predicts one for each class."""
        if self.agnostic:
            return output[:, 0]
        return output[torch.arange(len(labels), device=labels.device), labels]


def same_stages(student: RoIHead, teacher: RoIHead, term: str) -> None:
    """Raise a :class:`WiringError` unless both RoI heads have equally many stages."""
    counts = [len(head.stages) for head in (student, teacher)]
    if counts[0] != counts[1]:
        raise WiringError(
            f"{term}: the student's RoI head has {counts[0]} stages, the teacher's {counts[1]}; the teacher's is run on "
            "the student's proposals stage by stage, so both need as many"
        )
