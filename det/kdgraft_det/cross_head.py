"""Cross-head distillation: the student's head features pass through the remaining layers of the teacher's head.

Wang et al., "CrossKD: Cross-Head Knowledge Distillation for Object Detection", CVPR 2024, arXiv 2306.11369.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from mmdet.models.losses.iou_loss import giou_loss
from torch import Tensor, nn

from kdgraft.adapters import AdapterKind, adapter_label, build_adapter
from kdgraft.balance import Weight
from kdgraft.batch import Batch
from kdgraft.distributed import total_over_ranks
from kdgraft.errors import WiringError, check_number
from kdgraft.losses import Ratio, align_scale, focused_entropy, localization
from kdgraft.recorder import shadow
from kdgraft.regions import All
from kdgraft.taps import Recording, Tap
from kdgraft.terms import Term
from kdgraft.wiring import Wiring

from .dense import check_sigmoid
from .dense_heads import DenseHead, dense_head
from .picking import in_rows, joint_logits
from .registry import TERMS
from .resolution import same_resolution


@TERMS.register
class CrossHead(Term):
    r"""Cross-head distillation (CrossKD): the student's head features pass through the teacher's last head layers.

    The output of a convolution of each of the student's towers is normalised to the teacher's mean and standard deviation
    (:func:`~kdgraft.losses.align_scale`), passes a ReLU if that is the teacher's activation, and then passes the remaining
    layers of the *teacher's* tower, which are frozen. (The authors' code records the output before the ReLU, but that ReLU works
    in place on the recorded tensor.) These predictions imitate the teacher's own at every anchor whose position lies in the image:

    * classes by :func:`~kdgraft.losses.focused_entropy`, summed and divided by the student's positives (at least 1 an
      image, as mmdet counts them). The classes and the objectness of YOLOX are joined to the score that it ranks by.
    * boxes weighted by the teacher's best class score: with distributions the KL of an edge summed over its bins, mean over
      edges, divided by the sum of weights; other boxes by GIoU, divided by the positives.

    Both denominators are summed over all processes, and so are the statistics. The heads of student and teacher may differ in
    kind, in the number of convolutions and in their classes, as both outputs are the teacher's. The authors' code leaves out
    RetinaNet's anchors between its two thresholds. For FCOS it uses the IoU loss, divides by the sum of the centre-ness, and has
    the weights 0.4 and 0.75 and ``reused=2``. For ATSS it adds the centre-ness of positives.

    Beside the plain step and the teacher's forward pass, a step runs the reused layers and the head's outputs on the student's
    features, forward and backward to their input: for GFL, ResNet-101 teaching ResNet-18, 8.8 % more operations, at any image size.

    Args:
        reused: the number of last convolutions of each tower that are the teacher's; if these are all, the pyramid is aligned.
        classes, boxes: weights of the two parts; ``boxes`` is by default 4 with distributions and 1 without, as published.
        adapter: for towers of different widths; ``"auto"`` is none for equal widths and a 1×1 convolution otherwise.
    """

    runs_teacher = True

    def __init__(
        self,
        reused: int = 1,
        *,
        classes: float = 1.0,
        boxes: float | None = None,
        adapter: AdapterKind = "auto",
        weight: Weight = 1.0,
        **settings: Any,
    ) -> None:
        super().__init__(weight=weight, **settings)
        check_number("CrossHead", "reused", reused, whole=True)
        check_number("CrossHead", "classes", classes)
        if boxes is not None:
            check_number("CrossHead", "boxes", boxes)
        self.reused, self.classes, self.boxes = reused, classes, boxes
        self.adapter_kind: AdapterKind = adapter
        self.adapters = nn.ModuleList()
        self.region = All()

    def prepare(self, student: nn.Module, teacher: nn.Module) -> None:
        """Find the towers of both heads, and refuse heads that have none or too few convolutions."""
        models = {"student": student, "teacher": teacher}
        self._ours, self._theirs = (self._read(model, owner) for owner, model in models.items())
        self._student_towers, self._teacher_towers = (self._tower_taps(model, o) for o, model in models.items())
        self.student_taps = (*chain(*self._student_towers), *self._ours.assignment_taps)
        self.teacher_taps = (*chain(*self._teacher_towers), *self._outputs)

    def _read(self, model: nn.Module, owner: str) -> DenseHead:
        head: Any = getattr(model, "bbox_head", None)
        if not any(hasattr(head, names[0]) for names in _TOWERS):
            name = type(head).__name__ if head is not None else f"{type(model).__name__} without bbox_head"
            raise WiringError(
                f"{self.name}: the {owner}'s head {name} has no towers of classes and boxes that could be crossed; "
                "FeatureImitation works with any detector"
            )
        found = dense_head(head, "bbox_head", owner, self.name)
        check_sigmoid(found, self.name)
        return found

    def _tower_taps(self, model: nn.Module, owner: str) -> list[list[Tap]]:
        taps = []
        for tower in _towers(model.bbox_head):
            found = []
            for path, convs in _levels(model.bbox_head, tower):
                if not len(convs):
                    raise WiringError(
                        f"{self.name}: the {owner}'s bbox_head.{path} has no convolutions that could be crossed; set "
                        "its stacked_convs to 1 or more, or use FeatureImitation"
                    )
                stage = len(convs) - self.reused
                if stage < 0:
                    raise WiringError(
                        f"{self.name}: the {owner}'s bbox_head.{path} has {len(convs)} convolutions, fewer than reused={self.reused}; "
                        "reuse fewer"
                    )
                found.append(Tap.parse(f"bbox_head.{path}.{stage - 1}" if stage else "bbox_head:input[*]"))
            taps.append(list(dict.fromkeys(found)))
        return taps

    def wire(self, wiring: Wiring) -> None:
        """Build an adapter for each pair of tower outputs, and refuse models that predict on different grids."""
        assert wiring.holder is not None
        same_resolution(wiring, self.name)
        self.holder = wiring.holder
        self.bins = self._theirs.bins
        self.box_weight = self.boxes if self.boxes is not None else (4.0 if self.bins else 1.0)
        for mine, theirs in zip(self._student_towers, self._teacher_towers, strict=True):
            students, teachers = _tapped(wiring.student_recording, mine), _tapped(wiring.teacher_recording, theirs)
            grids = [[tuple(t.shape[-2:]) for t, _ in tower] for tower in (students, teachers)]
            if grids[0] != grids[1]:
                raise WiringError(
                    f"{self.name}: student and teacher predict on different grids, {grids[0]} and {grids[1]} positions; "
                    "give both the same strides"
                )
            for (s, s_tap), (t, t_tap) in zip(students, teachers, strict=True):
                same = s.shape[1] == t.shape[1]
                kind = "none" if self.adapter_kind == "auto" and same else self.adapter_kind
                adapter = build_adapter(kind, s, t, f"{self.name} ({s_tap} → {t_tap})")
                self.adapters.append(adapter)
                self.rows.append(
                    self.row(s, t, taps=(s_tap, t_tap), adapter=adapter_label(adapter, s, t), region="all")
                )

    def forward(self, student: Recording, teacher: Recording, batch: Batch) -> Ratio:
        """Return the loss on classes and the loss on boxes, each with its own denominator."""
        found = self._cross(student, teacher, batch)[: len(self._outputs)]
        # The padding must not reach the gradient: equal values there have no loss.
        outputs, targets = (
            [[self._blanked(level, batch) for level in levels] for levels in pair]
            for pair in (found, [teacher.tensors(tap) for tap in self._outputs])
        )
        scores, wanted = self._scores(outputs), self._scores(targets)
        classes = torch.stack(
            [focused_entropy(s, t, reduction="sum") for s, t in zip(scores, wanted, strict=True)]
        ).sum()
        trust = torch.cat([self._trust(t, out, batch) for t, out in zip(wanted, outputs[1], strict=True)], 1)
        boxes = (self._box_items(outputs[1], targets[1]).masked_fill(trust == 0, 0) * trust).sum()
        positives = self._ours.assignment(student, batch).counted.to(boxes)
        shares = torch.stack([positives, trust.sum() if self.bins else positives])
        return Ratio(torch.stack([self.classes * classes, self.box_weight * boxes]), shares)

    @property
    def _head(self) -> Any:
        return self.holder.model.bbox_head

    @property
    def _outputs(self) -> tuple[Tap, ...]:
        """The compared outputs of the teacher's head; a separate objectness comes last and belongs to the classes."""
        classes, *objectness = self._theirs.class_taps
        return (classes, self._theirs.boxes, *objectness)

    def _cross(self, student: Recording, teacher: Recording, batch: Batch) -> Any:
        """Return the outputs of the teacher's head on the student's features, each a list of levels."""
        adapters = iter(self.adapters)
        with ExitStack() as stack:
            towers = zip(_towers(self._head), self._student_towers, self._teacher_towers, strict=True)
            for name, mine, theirs in towers:
                levels = []
                for (s, _), (t, _) in zip(_tapped(student, mine), _tapped(teacher, theirs), strict=True):
                    levels.append(align_scale(next(adapters)(s, t), t, self.region(batch, t), total_over_ranks))
                entering = iter(levels)
                for _, convs in _levels(self._head, name):
                    self._enter(stack, convs, entering)
            with self.holder.context(levels[0].device.type):
                # The head only passes these levels on to the convolutions that are skipped.
                return self._head(levels)

    def _enter(self, stack: ExitStack, convs: Sequence[Any], entering: Iterator[Tensor]) -> None:
        """Replace the skipped convolutions of a tower, so that the given features enter behind them."""
        skipped = convs[: len(convs) - self.reused]
        if not skipped:
            first = convs[0].forward
            stack.callback(shadow(convs[0], "forward", lambda _: first(next(entering))))
            return
        relu = isinstance(getattr(getattr(skipped[-1], "pointwise_conv", skipped[-1]), "activate", None), nn.ReLU)
        for conv in skipped[:-1]:
            stack.callback(shadow(conv, "forward", lambda x: x))
        stack.callback(shadow(skipped[-1], "forward", lambda _: F.relu(next(entering)) if relu else next(entering)))

    def _scores(self, outputs: Sequence[Sequence[Tensor]]) -> list[Tensor]:
        """Return the class logits ``(B, N, C)`` of each level."""
        counts = self._counts(outputs[0])
        found, *objectness = (
            [in_rows(level, n) for level, n in zip(levels, counts, strict=True)]
            for levels in (outputs[0], *outputs[2:])
        )
        if not objectness:
            return found
        return [joint_logits(level, extra) for level, extra in zip(found, objectness[0], strict=True)]

    def _counts(self, levels: Sequence[Tensor]) -> list[int]:
        return [level.shape[-2] * level.shape[-1] * self._theirs.num_priors for level in levels]

    def _blanked(self, level: Tensor, batch: Batch) -> Tensor:
        inside = self.region(batch, level)
        return level if inside is None else level.masked_fill((inside == 0)[:, None], 0)

    def _trust(self, scores: Tensor, level: Tensor, batch: Batch) -> Tensor:
        """Return the teacher's best class score ``(B, N)`` at a level's anchors, 0 for positions in the padding."""
        best = scores.amax(-1).sigmoid()
        inside = self.region(batch, level)
        if inside is None:
            return best
        return (best.unflatten(1, (inside[0].numel(), -1)) * inside.flatten(1)[..., None]).flatten(1)

    def _box_items(self, outputs: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
        """Return the distance of two boxes, ``(B, N)``."""
        if self.bins:
            counts = self._counts(outputs)
            s, t = (
                torch.cat([in_rows(level, n) for level, n in zip(levels, counts, strict=True)], 1).unflatten(
                    -1, (4, self.bins)
                )
                for levels in (outputs, targets)
            )
            return localization(s, t, 1.0, variant="paper", reduction="none").mean(-1)
        s, t = (self._theirs.decoded(levels) for levels in (outputs, targets))
        items = giou_loss(s.flatten(0, 1), t.flatten(0, 1), eps=1e-6, reduction="none")
        return items.view(s.shape[:2])


_TOWERS = (("cls_convs", "reg_convs"), ("multi_level_cls_convs", "multi_level_reg_convs"))


def _towers(head: Any) -> tuple[str, str]:
    """Return the names of a head's two lists of convolutions, for classes and for boxes."""
    return next(names for names in _TOWERS if hasattr(head, names[0]))


def _levels(head: Any, tower: str) -> list[tuple[str, Any]]:
    """Return the convolutions of a tower with their path: one entry if the levels share them, else one a level."""
    convs = getattr(head, tower)
    if any(isinstance(own, (nn.ModuleList, nn.Sequential)) for own in convs):
        return [(f"{tower}.{level}", own) for level, own in enumerate(convs)]
    return [(tower, convs)]


def _tapped(recording: Recording, taps: Sequence[Tap]) -> list[tuple[Tensor, Tap]]:
    return [(tensor, tap) for tap in taps for tensor in recording.tensors(tap)]
