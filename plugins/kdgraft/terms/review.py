"""Terms on all levels of a model together, which are fused from deep to shallow."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from torch import Tensor

from ..batch import Batch
from ..errors import WiringError, check_number
from ..losses import Ratio, hierarchical_context, weighted_ratio
from ..losses.masking import images_present
from ..losses.review import LevelFusion
from ..registry import RECIPES, TERMS
from ..taps import Recording, Tap
from .base import Taps, Wiring, sum_of
from .features import FeatureTerm, check_in_image


@TERMS.register
@RECIPES.register("reviewkd")
class Review(FeatureTerm):
    """Knowledge review (ReviewKD): fused levels, compared at several sizes (Chen et al. 2021, arXiv 2104.09044).

    The student's levels are fused from deep to shallow by attention and compared with the teacher's whole and pooled; the losses
    of the levels are added. Batch statistics of the fusion are those of all processes, without what the region leaves out.

    Args:
        tap: two or more levels, maps ``(B, C, H, W)`` from shallow to deep: a list of taps, or ``"neck[*]"``, a detector's pyramid,
            by default. In classification the authors tap each stage before its last ReLU and the pooled features ``(B, C, 1, 1)``.
        width: width in which levels are fused; by default that of the student's deepest level, at most 512 (the authors use 256 for
            MobileNet on ImageNet).
        region: see :class:`FeatureTerm`; positions with weight 0 are excluded, the others have equal weight.
        weight: in the authors' code 1 to 2 for Faster R-CNN (1 for R101 → R50), 1 for RetinaNet, 1 (R34 → R18) and 8
            (R50 → MobileNet) on ImageNet, 0.6 to 8 on CIFAR-100, where it rises linearly over the first 20 epochs. The loss is a
            mean over images, channels and positions, so that neither the batch size nor the size of the maps changes its scale.

    Example:
        >>> class Stages(nn.Sequential):
        ...     def __init__(self, width):
        ...         super().__init__(nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(width, 2 * width, 3, stride=2), nn.Flatten())
        >>> distiller = Distiller(Stages(4), Stages(8), [Review(["0", "1"])], example=images)
        >>> list(distiller(images).losses)
        ['distill.review.loss']
    """

    reads = "features"
    needs = ("maps",)

    def __init__(self, tap: Taps | None = None, *, width: int | None = None, **settings: Any) -> None:
        super().__init__(tap, adapter="any", **settings)
        if width is not None:
            check_number("Review", "width", width, 1, whole=True)
        self.width = width

    def check_pair(self, student: Tensor, teacher: Tensor, student_tap: Tap, teacher_tap: Tap, wiring: Wiring) -> None:
        check_in_image(self, teacher_tap, wiring)

    def wire(self, wiring: Wiring) -> None:
        super().wire(wiring)
        pairs = self.pairs(wiring.student_recording, wiring.teacher_recording)
        self.fusion = build_fusion(self, [(s, t) for s, t, _, _ in pairs], self.width)
        for number, (row, (s, t, _, _)) in enumerate(zip(self.rows, pairs, strict=True)):
            resized = ", resize" if row.adapter.endswith("resize") else ""
            self.rows[number] = row._replace(adapter=f"Fusion {s.shape[1]}→{t.shape[1]}{resized}")

    def forward(self, student: Recording, teacher: Recording, batch: Batch) -> Ratio:
        levels, weights, ratios = list(self.aligned(student, teacher, batch)), [], []
        weights = [weight for _, _, weight in levels]
        fused = self.fusion([s for s, _, _ in levels], weights)
        for own, (_, t, weight) in zip(fused, levels, strict=True):
            items = hierarchical_context(own, t, valid=weight, reduction="none")
            ratios.append(weighted_ratio(items, images_present(weight)))
        return sum_of(ratios)


def build_fusion(term: FeatureTerm, pairs: list[tuple[Tensor, Tensor]], width: int | None) -> LevelFusion:
    """Build the fusion of levels from the pairs of tensors of the dry run.

    Raises:
        WiringError: there is only one level, or the levels are not in order.
    """
    sizes = [(t.shape[2], t.shape[3]) for _, t in pairs]
    if len(pairs) < 2:
        raise WiringError(f"{term.name}: fuses several levels, got one; tap two or more stages, from shallow to deep")
    if any(deep[0] > shallow[0] or deep[1] > shallow[1] for shallow, deep in pairwise(sizes)):
        shown = ", ".join(f"{h}×{w}" for h, w in sizes)
        raise WiringError(f"{term.name}: list the levels from shallow to deep, the largest map first; got {shown}")
    fusion = LevelFusion([s.shape[1] for s, _ in pairs], [t.shape[1] for _, t in pairs], width)
    return fusion.to(pairs[0][0].device)
