"""Terms on every pixel's class scores, and the core's feature terms with segmentation's region."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kdgraft.distributed import total_over_ranks, world_size
from kdgraft.errors import DistillError, WiringError, check_number
from kdgraft.generation import MaskedGeneration as CoreMaskedGeneration
from kdgraft.losses import (
    Ratio,
    binary_soft_targets,
    dist_between_classes,
    dist_within_classes,
    soft_targets,
    weighted_ratio,
)
from kdgraft.losses.soft_targets import check_temperature
from kdgraft.regions import Batch
from kdgraft.taps import Recording
from kdgraft.terms import ChannelWise as CoreChannelWise
from kdgraft.terms import FeatureImitation as CoreFeatureImitation
from kdgraft.terms import PearsonImitation as CorePearsonImitation
from kdgraft.terms import Taps, Wiring, mean_of

from .dense import LOGITS, ClassScores, HeadTerm, LogitTerm, reads_scores
from .registry import TERMS


@TERMS.register
class PixelSoftTargets(LogitTerm):
    """Soft targets of every pixel: KL over classes, mean over the pixels that count (Liu et al. 2019, section 3.1).

    Structured KD takes temperature 1 and weight 10. One output channel (binary segmentation) is compared as a sigmoid.

    Args:
        temperature: T > 0, with the factor T² (Hinton et al. 2015).
        tap, grid: see :class:`LogitTerm`.
    """

    def __init__(self, temperature: float = 1.0, **settings: Any) -> None:
        super().__init__(**settings)
        check_temperature(temperature)
        self.temperature = temperature

    def forward(self, student: Recording, teacher: Recording, batch: Batch) -> Ratio:
        return mean_of([weighted_ratio(self._items(s, t), v) for s, t, v in self.aligned(student, teacher, batch)])

    def _items(self, student: Tensor, teacher: Tensor) -> Tensor:
        if student.shape[1] == 1:
            return binary_soft_targets(student, teacher, self.temperature, reduction="none")[:, 0]
        return soft_targets(student, teacher, self.temperature, dim=1, reduction="none")


@TERMS.register
class DIST(LogitTerm):
    """DIST (Huang et al. 2022, arXiv 2205.10536) on dense maps: each pixel is an item.

    Correlation between classes for each pixel, and over all pixels of the batch for each class. The second relates images to
    each other: on several processes it correlates over the pixels of all of them.

    Args:
        beta, gamma: weights of the two parts.
        temperature: T > 0.
        tap, grid: see :class:`LogitTerm`.
    """

    def __init__(self, beta: float = 1.0, gamma: float = 1.0, temperature: float = 1.0, **settings: Any) -> None:
        super().__init__(**settings)
        check_temperature(temperature)
        check_number("DIST", "beta", beta)
        check_number("DIST", "gamma", gamma)
        self.beta, self.gamma, self.temperature = beta, gamma, temperature

    def wire(self, wiring: Wiring) -> None:
        super().wire(wiring)
        for s, _, s_tap, _ in self.pairs(wiring.student_recording, wiring.teacher_recording):
            if s.shape[1] < 2:
                raise WiringError(f"{self.name}: {s_tap} scores one class alone; use PixelSoftTargets")

    def forward(self, student: Recording, teacher: Recording, batch: Batch) -> Ratio:
        parts = []
        share = 1 / world_size()  # every process computes the same second part
        for s, t, valid in self.aligned(student, teacher, batch):
            between = weighted_ratio(dist_between_classes(s, t, self.temperature, dim=1, reduction="none"), valid)
            within = dist_within_classes(s, t, self.temperature, dim=1, weight=valid, total=total_over_ranks)
            parts.append(
                Ratio(
                    torch.stack([self.beta * between.numerator, self.gamma * share * within]),
                    torch.stack([between.denominator, torch.full_like(between.denominator, share)]),
                )
            )
        numerators, denominators = zip(*parts, strict=True)
        return Ratio(torch.cat(numerators) / len(parts), torch.cat(denominators))


@TERMS.register
class ChannelWise(ClassScores, CoreChannelWise):
    """Channel-wise distillation (CWD; Shu et al. 2021) of class scores or features, on the pixels that count.

    The authors take weight 3 and temperature 4 on the scores.

    Args:
        tap: class scores by default; any maps ``(B, C, H, W)``.
        temperature, adapter, region: see :class:`kdgraft.terms.ChannelWise`.
    """

    def __init__(self, tap: Taps = LOGITS, *, region: Any = "valid", **settings: Any) -> None:
        super().__init__(tap, region=region, **settings)
        scores = [reads_scores(tap) for tap in (*self.student_taps, *self.teacher_taps)]
        if any(scores) and not all(scores):
            raise DistillError(
                "ChannelWise: class scores and features are not compared in one term; add a term for each"
            )
        self.compares_classes = all(scores)

    def wire(self, wiring: Wiring) -> None:
        self.align_corners = self.compares_classes and self.corners["student"]
        if self.compares_classes:
            for pair in self.pairs(wiring.student_recording, wiring.teacher_recording):
                self.check_classes(*pair)
        super().wire(wiring)


@TERMS.register
class FeatureImitation(HeadTerm, CoreFeatureImitation):
    """The student's features imitate the teacher's through an adapter, on the pixels that count.

    The core's :class:`kdgraft.terms.FeatureImitation` with ``region="valid"`` by default.
    """

    def __init__(self, tap: Taps | None = None, *, region: Any = "valid", **settings: Any) -> None:
        super().__init__(tap, region=region, **settings)


@TERMS.register
class Hint(FeatureImitation):
    """FitNets' hint (arXiv 1412.6550): feature imitation of one layer, every pixel that counts, squared error."""


@TERMS.register
class PearsonImitation(HeadTerm, CorePearsonImitation):
    """Features that correlate with the teacher's over the pixels that count (PKD; Cao et al. 2022, arXiv 2207.02039).

    The core's :class:`kdgraft.terms.PearsonImitation` with ``region="valid"`` by default.
    """

    def __init__(self, tap: Taps | None = None, *, region: Any = "valid", **settings: Any) -> None:
        super().__init__(tap, region=region, **settings)


@TERMS.register
class MaskedGeneration(HeadTerm, CoreMaskedGeneration):
    """The student's features, some positions left out, must generate the teacher's on the pixels that count (MGD; 2205.01529).

    The core's :class:`kdgraft.generation.MaskedGeneration` with the authors' settings for segmentation: the backbone's last
    map and ``mask_ratio`` 0.75; and with ``region="valid"``.
    """

    def __init__(
        self, tap: Taps | None = "backbone[-1]", *, mask_ratio: float = 0.75, region: Any = "valid", **settings: Any
    ) -> None:
        super().__init__(tap, mask_ratio=mask_ratio, region=region, **settings)
