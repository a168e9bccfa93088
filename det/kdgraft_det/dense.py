"""Dense heads: what they predict, and whether two of them predict the same thing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from mmdet.models.dense_heads import (
    ATSSHead,
    FCOSHead,
    GFLHead,
    RetinaHead,
    RPNHead,
    RTMDetHead,
    RTMDetSepBNHead,
    TOODHead,
    YOLOXHead,
)
from mmdet.models.dense_heads.anchor_head import AnchorHead
from mmdet.models.task_modules.prior_generators import AnchorGenerator, MlvlPointGenerator, anchor_inside_flags
from mmdet.models.task_modules.samplers import PseudoSampler
from torch import Tensor

from kdgraft.errors import WiringError
from kdgraft.regions import Batch
from kdgraft.sources import combined
from kdgraft.taps import Recording, Tap
from kdgraft.terms import Term, Wiring

from .assignment import Assignment
from .heads import (
    HeadRegion,
    Heads,
    Rows,
    check_upright,
    in_students_order,
    known_head,
    same_box_coder,
    same_number_of_classes,
)
from .resolution import same_resolution


class DenseHead:
    """How one kind of dense head is read. No module is kept, so that none is registered or copied.

    The base reads heads that give class logits and ``"deltas"`` of anchors, and whose ``get_targets`` gives lists per level of
    (anchors, labels, weights, targets, …), as ATSS does.
    """

    unit: ClassVar[str] = "deltas"
    """Boxes are compared in the box coder's ``"deltas"``, or as edges in ``"strides"``."""
    distributions: ClassVar[bool] = False
    """Whether edges are predicted as distributions over bins."""
    first: ClassVar[int] = 1
    """Where labels stand in what ``get_targets`` returns; weights and targets follow."""
    losses: ClassVar[tuple[str, ...]] = ("loss_cls",)

    def __init__(self, head: Any, path: str, owner: str) -> None:
        self.kind, self.owner, self.path = type(head).__name__, owner, path
        self.generator, self.bbox_coder = head.prior_generator, getattr(head, "bbox_coder", None)
        self.decoded_targets = getattr(head, "reg_decoded_bbox", False)
        self.samples = not isinstance(getattr(head, "sampler", None), (PseudoSampler, type(None)))
        self.sigmoid = getattr(head, "use_sigmoid_cls", True)
        self.num_classes, self.channels = head.num_classes, head.cls_out_channels
        self.bins = int(head.reg_max) + 1 if self.distributions else 0
        self.num_priors = self.generator.num_base_priors[0]
        self.strides = [_side(stride) for stride in self.generator.strides]
        self.classes = Tap.parse(f"{path}[0][*]")
        self.boxes = Tap.parse(f"{path}[1][*]")
        self.targets = Tap.parse(f"{path}.get_targets()")
        self.flags = Tap.parse(f"{path}.get_anchors()[1]") if hasattr(self.generator, "base_anchors") else None
        self.allowed_border = (getattr(head, "train_cfg", None) or {}).get("allowed_border", -1)

    @property
    def class_taps(self) -> tuple[Tap, ...]:
        """What :meth:`logits` reads."""
        return (self.classes,)

    @property
    def assignment_taps(self) -> tuple[Tap, ...]:
        """What :meth:`assignment` reads."""
        return (self.classes, self.targets) if self.flags is None else (self.classes, self.targets, self.flags)

    def logits(self, recording: Recording, chosen: Tensor) -> Tensor:
        """Class logits ``(K, C)`` at chosen priors."""
        return pick(recording.tensors(self.classes), chosen, self.num_priors)

    def edges(self, picked: Tensor, centres: Tensor, strides: Tensor, trains: bool = False) -> Tensor:
        """Boxes ``(K, 4)`` in this head's unit from what it predicts, ``trains`` or not, at K priors with these centres and strides."""
        return picked

    @property
    def reading(self) -> tuple[Any, ...]:
        """What :meth:`regression` depends on: how edges are predicted, and from which centres."""
        first = self.generator.grid_priors([(1, 1)] * len(self.strides), device="cpu")
        return type(self).edges, self.bins, [level.tolist() for level in first] if self.unit == "strides" else None

    def true_edges(self, targets: Tensor, anchors: Tensor, strides: Tensor) -> Tensor:
        """The host's targets ``(K, 4)`` in this head's unit."""
        if self.unit == "strides":
            return targets / strides[:, None]
        return self.bbox_coder.encode(anchors, targets) if self.decoded_targets else targets  # type: ignore[union-attr]

    def regression(self, recording: Recording, chosen: Tensor) -> Tensor:
        """Boxes ``(K, 4)`` in this head's unit at chosen priors; its points may lie elsewhere in a cell than another head's."""
        levels = recording.tensors(self.boxes)
        anchors, strides, counts = self.priors(levels)
        places = in_order_of_pick(chosen, counts)
        centres = (anchors[places, :2] + anchors[places, 2:]) / 2
        picked = pick(levels, chosen, self.num_priors).float()
        return self.edges(picked, centres, strides[places], recording.training)

    def decoded(self, levels: Sequence[Tensor]) -> Tensor:
        """All boxes ``(B, N, 4)``, x1, y1, x2, y2 in pixels of the padded input, from the second output; not clipped."""
        anchors, strides, counts = self.priors(levels)
        rows = torch.cat([in_rows(level, n) for level, n in zip(levels, counts, strict=True)], 1)
        places = torch.cat([anchors, strides[:, None]], 1).repeat(len(rows), 1)
        anchors, strides = places[:, :4], places[:, 4]
        found = self.edges(rows.flatten(0, 1), (anchors[:, :2] + anchors[:, 2:]) / 2, strides, self.owner == "student")
        pixels = self.bbox_coder.decode(anchors, found) if self.unit == "deltas" else found * strides[:, None]  # type: ignore[union-attr]
        return pixels.view(*rows.shape[:2], 4)

    def priors(self, levels: Sequence[Tensor]) -> tuple[Tensor, Tensor, list[int]]:
        """Anchors ``(N, 4)``, strides ``(N,)`` and the number of priors of each level, for the grids of these maps."""
        found = self.generator.grid_priors([level.shape[-2:] for level in levels], device=levels[0].device)
        counts = [len(level) for level in found]
        strides = torch.cat([level.new_full((n,), s) for level, n, s in zip(found, counts, self.strides, strict=True)])
        anchors = torch.cat([level if level.shape[1] == 4 else level.repeat(1, 2) for level in found])
        return anchors.float(), strides.float(), counts

    def assigned(self, recording: Recording, images: int) -> tuple[Tensor, Tensor, Tensor]:
        """Labels, whether they count, and targets: ``(B, N)``, ``(B, N)``, ``(B, N, 4)``."""
        labels, weights, targets = recording[self.targets][self.first : self.first + 3]
        return _row(labels, images), _row(weights, images) > 0, _row(targets, images, 4)

    def given(self, recording: Recording, anchors: Tensor, batch: Batch) -> Tensor:
        """Anchors that the host hands to its assigner, ``(B, N)``: on the image and its padding, within the border."""
        assert self.flags is not None and batch.image_sizes is not None
        flags = recording[self.flags]  # get_targets may have joined the levels in place
        rows = [torch.cat(levels) if isinstance(levels, list) else levels for levels in flags]
        pairs = zip(rows, batch.image_sizes, strict=True)
        return torch.stack([anchor_inside_flags(anchors, row, size, self.allowed_border) for row, size in pairs])

    def assignment(self, recording: Recording, batch: Batch) -> Assignment:
        """The assignment of this step, made once for all terms."""

        def make() -> Assignment:
            assert batch.image_sizes is not None
            outputs = recording.tensors(self.classes)
            anchors, strides, counts = self.priors(outputs)
            labels, assigned, targets = self.assigned(recording, len(outputs[0]))
            given = assigned if self.flags is None else self.given(recording, anchors, batch)
            sizes = anchors.new_tensor(batch.image_sizes).flip(1)[:, None]
            inside = ((anchors[:, :2] + anchors[:, 2:]) / 2 < sizes).all(-1)
            return Assignment(labels, given, assigned, inside, anchors, strides, counts, self.num_classes, targets)

        return batch.once(("assignment", recording.model, self.path), make)


class _Anchors(DenseHead):
    """RetinaNet and RPN: targets come without anchors."""

    first = 0


class _Proposals(_Anchors):
    """RPN: names its loss itself."""

    losses = ("loss_rpn_cls",)


class _Distributions(DenseHead):
    """GFL: edges as distributions of their distance in strides."""

    unit = "strides"
    distributions = True

    def edges(self, picked: Tensor, centres: Tensor, strides: Tensor, trains: bool = False) -> Tensor:
        bins = torch.arange(self.bins, device=picked.device, dtype=picked.dtype)
        # Not a matrix product, which autocast computes in bfloat16: off by up to 0.03 strides.
        distances = (F.softmax(picked.unflatten(1, (4, self.bins)), -1) * bins).sum(-1)
        return _edges(centres / strides[:, None], distances)


class _Distances(DenseHead):
    """RTMDet: distances to the four edges in pixels."""

    unit = "strides"

    def edges(self, picked: Tensor, centres: Tensor, strides: Tensor, trains: bool = False) -> Tensor:
        return _edges(centres / strides[:, None], picked / strides[:, None])


class _Points(_Distances):
    """FCOS: distances in pixels, or in strides while it trains; targets in the same, image after image."""

    def __init__(self, head: Any, path: str, owner: str) -> None:
        super().__init__(head, path, owner)
        self.by_stride = head.norm_on_bbox

    @property
    def reading(self) -> tuple[Any, ...]:
        return (*super().reading, self.by_stride)

    def edges(self, picked: Tensor, centres: Tensor, strides: Tensor, trains: bool = False) -> Tensor:
        distances = picked if self.by_stride and trains else picked / strides[:, None]
        return _edges(centres / strides[:, None], distances)

    def true_edges(self, targets: Tensor, anchors: Tensor, strides: Tensor) -> Tensor:
        distances = targets if self.by_stride else targets / strides[:, None]
        return _edges(anchors[:, :2] / strides[:, None], distances)

    def assigned(self, recording: Recording, images: int) -> tuple[Tensor, Tensor, Tensor]:
        labels, targets = (_row(part, images, n) for part, n in zip(recording[self.targets], (None, 4), strict=True))
        return labels, torch.ones_like(labels, dtype=torch.bool), targets


class _Aligned(DenseHead):
    """TOOD: scores and boxes as they are, boxes in strides."""

    unit = "strides"

    def logits(self, recording: Recording, chosen: Tensor) -> Tensor:
        return super().logits(recording, chosen).float().logit(eps=1e-6)

    def edges(self, picked: Tensor, centres: Tensor, strides: Tensor, trains: bool = False) -> Tensor:
        return picked


class _Objects(DenseHead):
    """YOLOX: a class counts together with the objectness; boxes are a centre's offset and the logarithm of a size."""

    unit = "strides"
    losses = ("loss_cls", "loss_obj")

    def __init__(self, head: Any, path: str, owner: str) -> None:
        super().__init__(head, path, owner)
        self.objectness = Tap.parse(f"{path}[2][*]")
        self.targets = Tap.parse(f"{path}._get_targets_single()")

    @property
    def class_taps(self) -> tuple[Tap, ...]:
        return (self.classes, self.objectness)

    def logits(self, recording: Recording, chosen: Tensor) -> Tensor:
        objectness = pick(recording.tensors(self.objectness), chosen, 1).float()
        return joint_logits(super().logits(recording, chosen).float(), objectness)

    def edges(self, picked: Tensor, centres: Tensor, strides: Tensor, trains: bool = False) -> Tensor:
        middle, half = picked[:, :2] + centres / strides[:, None], picked[:, 2:].exp() / 2
        return torch.cat([middle - half, middle + half], 1)

    def assigned(self, recording: Recording, images: int) -> tuple[Tensor, Tensor, Tensor]:
        found = recording[self.targets]
        labels, targets = [], []
        for mask, classes, _, boxes, *_ in found if images > 1 else [found]:
            labels.append(torch.full_like(mask, self.num_classes, dtype=torch.long))
            targets.append(boxes.new_zeros(len(mask), 4))
            if len(boxes):
                labels[-1][mask] = classes.argmax(1)
                targets[-1][mask] = boxes
        return torch.stack(labels), torch.ones_like(torch.stack(labels), dtype=torch.bool), torch.stack(targets)


KINDS: dict[type, type[DenseHead]] = {
    GFLHead: _Distributions,
    TOODHead: _Aligned,
    ATSSHead: DenseHead,
    RTMDetSepBNHead: _Distances,
    RTMDetHead: _Distances,
    FCOSHead: _Points,
    YOLOXHead: _Objects,
    RPNHead: _Proposals,
    RetinaHead: _Anchors,
    AnchorHead: _Anchors,
}
_FORWARD = ("forward", "forward_single")
_TRAINED = (*_FORWARD, "get_targets", "loss_by_feat", "_get_targets_single")
_PREDICTED = (*_FORWARD, "predict_by_feat", "_predict_by_feat_single")


def dense_head(head: Any, path: str, owner: str, term: Term) -> DenseHead:
    """A model's dense head as terms read it.

    Raises:
        WiringError: it is of no kind that this suite knows; says what works without.
    """
    check_upright(head, owner, term)
    kind = known_head(head, list(KINDS), owner, trained=_TRAINED, predicted=_PREDICTED)
    if kind is None:
        names = ", ".join(kind.__name__ for kind in KINDS if kind is not AnchorHead)
        raise WiringError(
            f"{term.name}: the {owner}'s head {type(head).__name__} is not one that this term can read ({names}); "
            "FeatureImitation works with any detector"
        )
    return KINDS[kind](head, path, owner)


class DenseHeads(Heads):
    """Two dense heads that predict on the same grid."""

    def __init__(self, student: Any, teacher: Any, path: str, term: Term) -> None:
        self.student = dense_head(student, path, "student", term)
        self.teacher = dense_head(teacher, path, "teacher", term)
        same_grid(self.student, self.teacher, term)
        self.classes, self.host_losses = self.student.num_classes, self.student.losses
        self.proposes = path == "rpn_head" or isinstance(self.student, _Proposals)  # any dense head can
        if path == "rpn_head":
            self.host_losses = [name if "rpn" in name else f"rpn_{name}" for name in self.student.losses]
        ours = *self.student.class_taps, *self.student.assignment_taps
        self.class_taps = ours, self.teacher.class_taps
        self.box_taps = (*ours, self.student.boxes), (self.teacher.boxes,)
        self.class_reading = type(self.teacher).logits
        self.regions = ("all", "main") if self.student.flags is None else ("all", "main", "vlr")

    def class_rows(self, student: Recording, teacher: Recording, batch: Batch, region: HeadRegion) -> list[Rows]:
        assignment = self.student.assignment(student, batch)
        weights = assignment.weights(region, batch)
        chosen = weights > 0
        logits = self.student.logits(student, chosen)

        def read(member: Recording) -> Tensor:
            scores = self.teacher.logits(member, chosen)
            return scores if self.proposes else in_students_order(scores, member.class_order)

        targets = combined(teacher, read, "sigmoid")
        if region == "all":
            objects = None if self.student.samples else targets.float().sigmoid().amax(1).sum()
            return [Rows(logits, targets, count=objects)]
        return [Rows(logits, targets, weight=pick_weights(weights, chosen, assignment.num_per_level))]

    def box_rows(self, student: Recording, teacher: Recording, batch: Batch) -> list[Rows]:
        assignment = self.student.assignment(student, batch)
        chosen = assignment.positive
        boxes = self.student.regression(student, chosen)
        theirs = combined(teacher, lambda member: self.teacher.regression(member, chosen), "value")
        places = in_order_of_pick(chosen, assignment.num_per_level)
        image = in_order_of_pick(chosen, assignment.num_per_level, images=True)
        target = self.student.true_edges(
            assignment.targets[image, places].float(), assignment.anchors[places], assignment.strides[places]
        )
        return [Rows(boxes, theirs, target=target)]

    def check_classes(self, term: Term) -> None:
        for head in (self.student, self.teacher):
            check_sigmoid(head, term)
        same_number_of_classes(self.student.channels, self.teacher.channels, term)

    @property
    def box_reading(self) -> Any:  # type: ignore[override]
        return self.teacher.reading

    def check_boxes(self, term: Term) -> None:
        if self.student.unit != self.teacher.unit:
            raise WiringError(
                f"{term.name}: the student's {self.student.kind} predicts boxes in {self.student.unit}, the teacher's "
                f"{self.teacher.kind} in {self.teacher.unit}; give both a head of one kind"
            )
        if self.student.unit == "deltas":
            same_box_coder(self.student, self.teacher, term)

    def shapes(self, wiring: Wiring, kind: Literal["classes", "boxes"], term: Term) -> list[tuple[Any, Any, Tap, Tap]]:
        same_resolution(wiring, term)
        ours, theirs = (getattr(head, kind) for head in (self.student, self.teacher))
        recorded = zip(wiring.student_recording.tensors(ours), wiring.teacher_recording.tensors(theirs), strict=True)
        return [(s, t, ours, theirs) for s, t in recorded]


def same_grid(student: DenseHead, teacher: DenseHead, term: Term) -> None:
    """Raises a :class:`WiringError` unless two heads predict on the same strides, and on the same anchors if both have some."""
    if student.strides != teacher.strides:
        raise WiringError(
            f"{term.name}: student and teacher predict on different strides, {student.strides} and {teacher.strides}; "
            "give both the same anchor_generator.strides"
        )
    if student.num_priors != teacher.num_priors:
        raise WiringError(
            f"{term.name}: the student has {student.num_priors} anchors a position, the teacher {teacher.num_priors}; "
            "give both the same anchor_generator, or compare features"
        )
    pairs = [getattr(head.generator, "base_anchors", None) for head in (student, teacher)]
    if None in pairs:
        return
    for level, (a, b) in enumerate(zip(*pairs, strict=True)):
        if a.shape != b.shape or not torch.allclose(a, b):
            raise WiringError(
                f"{term.name}: student and teacher have different anchors on level {level}, {a.tolist()} and {b.tolist()}; "
                "give both the same anchor_generator"
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


def check_sigmoid(head: DenseHead, term: Term) -> None:
    """Raises a :class:`WiringError` unless a head's classes are a sigmoid each."""
    if not head.sigmoid:
        raise WiringError(
            f"{term.name}: the {head.owner}'s {head.kind} has softmax classes; this term needs sigmoid ones"
        )


def distribution_bins(head: DenseHead, term: Term) -> int:
    """Number of bins of a head that predicts box edges as distributions.

    Raises:
        WiringError: the head predicts plain numbers.
    """
    if not head.distributions:
        raise WiringError(
            f"{term.name}: the {head.owner}'s {head.kind} predicts box edges as numbers, not as distributions "
            "(reg_max), so there is no localization to distil; use a GFLHead, or FeatureImitation and SoftTargets"
        )
    return head.bins


def pick(levels: Sequence[Tensor], chosen: Tensor, num_priors: int) -> Tensor:
    """Predictions at chosen priors, without a copy of all the others.

    Args:
        levels: per level ``(B, A·C, H, W)``.
        chosen: ``(B, N)`` mask over the priors of all levels, position by position.
        num_priors: A, those of one position.

    Returns:
        ``(K, C)``, level by level, in each the order of ``chosen``.
    """
    rows = []
    counts = [level.shape[-2] * level.shape[-1] * num_priors for level in levels]
    for level, mask in zip(levels, chosen.split(counts, 1), strict=True):
        image, prior = mask.nonzero(as_tuple=True)
        position, width = prior // num_priors, level.shape[-1]
        by_prior = level.unflatten(1, (num_priors, -1))
        rows.append(by_prior[image, prior % num_priors, :, position // width, position % width])
    return torch.cat(rows)


def in_rows(level: Tensor, count: int) -> Tensor:
    """``(B, A·C, H, W) -> (B, count, C)`` in float32, in the order of the level's H·W·A priors."""
    return level.permute(0, 2, 3, 1).reshape(len(level), count, -1).float()


def joint_logits(classes: Tensor, objectness: Tensor) -> Tensor:
    """The logit of the product of two probabilities given as logits of broadcasting shapes."""
    a, b = torch.broadcast_tensors(classes, objectness)
    # 1 / (pq) - 1 = e^-a + e^-b + e^-(a+b)
    return -torch.logsumexp(torch.stack([-a, -b, -(a + b)]), 0)


def pick_weights(weights: Tensor, chosen: Tensor, num_per_level: Sequence[int]) -> Tensor:
    """The weights ``(B, N)`` at chosen priors in the order of :func:`pick`: ``(K,)``."""
    counts = list(num_per_level)
    return torch.cat([w[m] for w, m in zip(weights.split(counts, 1), chosen.split(counts, 1), strict=True)])


def in_order_of_pick(chosen: Tensor, num_per_level: Sequence[int], *, images: bool = False) -> Tensor:
    """For each chosen prior, in the order of :func:`pick`, which of the N it is, or of which image: ``(K,)``."""
    places = torch.arange(chosen.shape[0 if images else 1], device=chosen.device)
    places = (places[:, None] if images else places).expand_as(chosen)
    return pick_weights(places, chosen, num_per_level)


def _edges(centres: Tensor, distances: Tensor) -> Tensor:
    return torch.cat([centres - distances[:, :2], centres + distances[:, 2:]], 1)


def _row(levels: Sequence[Tensor], images: int, width: int | None = None) -> Tensor:
    """All levels as ``(B, N)`` or ``(B, N, width)``."""
    shape = (images, -1) if width is None else (images, -1, width)
    return torch.cat([level.reshape(shape) for level in levels], 1)


def _side(stride: Any) -> int:
    return stride[0] if isinstance(stride, (tuple, list)) else stride
