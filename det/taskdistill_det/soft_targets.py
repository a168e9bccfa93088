"""Soft targets on the class outputs of dense heads."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor

from taskdistill.errors import DistillError
from taskdistill.losses import Ratio, binary_soft_targets, soft_targets, weighted_ratio
from taskdistill.losses.soft_targets import check_temperature
from taskdistill.regions import Batch
from taskdistill.taps import Recording
from taskdistill.terms import Term, Wiring

from .dense import CLASSES, TARGETS, AnchorRegion, Assignment, heads_of, pick, pick_weights, same_classes
from .registry import TERMS


@TERMS.register
class SoftTargets(Term):
    r"""Soft targets on a dense head's class outputs, each class a sigmoid of its own (or softmax across them).

    Per anchor the KL is summed over classes (or their mean), then weighted over the region:

    * ``"all"`` valid anchors: divided by the sum of the teacher's best class scores, which is the number of objects as the
      teacher sees them; unlike the number of positives it is never 0.
    * ``"main"`` (the positives) and ``"vlr"`` (weighted by IoU): divided by the sum of weights.

    Both sums are taken over all processes.

    Args:
        temperature: T > 0, with the factor T² (Hinton et al. 2015).
        activation: ``"sigmoid"`` (independent classes, what these heads are trained as), or ``"softmax"`` across the classes
            as LD's class distillation takes it (Zheng et al. 2022: T = 2, mean over classes, weight 10, main region).
        region: ``"all"``, ``"main"`` or ``"vlr"``.
        focus: γ of the factor :math:`|p_t - p_s|^\gamma`, sigmoid only; 1 in CrossKD.
        classes: ``"sum"`` over classes, or ``"mean"``.
    """

    student_taps = (CLASSES, TARGETS)
    teacher_taps = (CLASSES,)
    compares_classes = True

    def __init__(
        self,
        temperature: float = 1.0,
        *,
        activation: Literal["sigmoid", "softmax"] = "sigmoid",
        region: AnchorRegion = "all",
        focus: float = 0.0,
        classes: Literal["sum", "mean"] = "sum",
        weight: float = 1.0,
        schedule: Any = None,
        name: str | None = None,
    ) -> None:
        super().__init__(weight=weight, schedule=schedule, name=name)
        check_temperature(temperature)
        choices = {
            "activation": (activation, ("sigmoid", "softmax")),
            "region": (region, ("all", "main", "vlr")),
            "classes": (classes, ("sum", "mean")),
        }
        for argument, (given, allowed) in choices.items():
            if given not in allowed:
                raise DistillError(f"SoftTargets: {argument} must be one of {', '.join(allowed)}, got {given!r}")
        if focus < 0 or (focus and activation == "softmax"):
            raise DistillError(f"SoftTargets: focus must be >= 0, and 0 with softmax, got {focus}")
        self.temperature, self.activation, self.region, self.focus, self.classes = (
            temperature,
            activation,
            region,
            focus,
            classes,
        )
        self.num_classes = 0

    def wire(self, wiring: Wiring) -> None:
        student, teacher = heads_of(wiring, self)
        same_classes(student, teacher, self)
        self.num_classes = student.num_classes
        pairs = zip(wiring.student_recording.tensors(CLASSES), wiring.teacher_recording.tensors(CLASSES), strict=True)
        self.rows += [self.row(s, t, taps=(CLASSES, CLASSES), region=self.region) for s, t in pairs]

    def forward(self, student: Recording, teacher: Recording, batch: Batch) -> Ratio:
        assignment = Assignment.of(student, batch, self.num_classes)
        levels = assignment.num_per_level
        weights = assignment.weights(self.region, batch)
        chosen = weights > 0
        logits = pick(student.tensors(CLASSES), chosen, levels)
        targets = pick(teacher.tensors(CLASSES), chosen, levels)
        if batch.class_order is not None:
            targets = targets[:, batch.class_order]
        items = self._items(logits, targets)
        if self.region == "all":
            return Ratio(items.sum(), targets.float().sigmoid().amax(1).sum())
        return weighted_ratio(items, pick_weights(weights, chosen, levels))

    def _items(self, logits: Tensor, targets: Tensor) -> Tensor:
        if self.activation == "softmax":
            items = soft_targets(logits, targets, self.temperature, reduction="none")
        else:
            items = binary_soft_targets(logits, targets, self.temperature, focus=self.focus, reduction="none").sum(1)
        return items / logits.shape[1] if self.classes == "mean" else items
