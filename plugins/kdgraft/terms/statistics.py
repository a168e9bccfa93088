"""Terms on statistics of features: the products of two layers' channels, the distributions of channels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..batch import Batch
from ..errors import DistillError, WiringError
from ..losses import Ratio, nst, weighted_ratio
from ..losses.discrepancy import Kernel, check_kernel
from ..losses.fsp import flow_differences
from ..registry import RECIPES, TERMS
from ..taps import Recording
from ..wiring import Wiring
from .base import Taps, sum_of
from .features import FeatureTerm
from .relations import MapTerm


@TERMS.register
@RECIPES.register("fsp")
class FSP(FeatureTerm):
    """Flow of solution procedure (FSP): products of two layers' features, averaged over positions (Yim et al., CVPR 2017).

    The losses of several pairs of layers are added, as in the paper. It publishes no weight, as it first trains the student on this
    loss alone and then on the labels; here the loss is added to the task's own. The loss grows with the fourth power of the
    features' scale, and depends neither on the size of the batch nor, by the means, on that of the maps or the number of channels.

    Args:
        tap, student_tap, teacher_tap: the maps ``(B, C, H, W)`` of at least two layers, in order; a detector's pyramid by default.
        pairs: the pairs of layers to compare, by their places in the list of tapped maps, such as ``[[0, 1], [0, 2]]``; each layer
            and the next one by default.
        adapter: ``"auto"`` builds a 1×1 convolution for each layer whose channels differ from the teacher's (the paper has layers
            of equal channels only); ``"none"`` refuses such layers.
        region: see :class:`~kdgraft.terms.FeatureTerm`; positions with weight 0 are excluded, the others have equal weight.

    Example:
        >>> term = FSP(["conv:input", "conv"])
        >>> list(Distiller(student, teacher, [term], example=images)(images).losses)
        ['distill.fsp.loss']
    """

    reads = "features"
    needs = ("maps",)

    def __init__(
        self, tap: Taps | None = None, *, pairs: Sequence[Sequence[int]] | None = None, **settings: Any
    ) -> None:
        super().__init__(tap, **settings)
        self.layers = None if pairs is None else _checked(pairs)

    def wire(self, wiring: Wiring) -> None:
        super().wire(wiring)
        count = len(self.placed)
        if self.layers is None:
            self.layers = [(place, place + 1) for place in range(count - 1)]
        largest = max((place for pair in self.layers for place in pair), default=1)
        if largest >= count:
            taps = ", ".join(f"'{tap}'" for tap in self.student_taps)
            raise WiringError(
                f"{self.name}: {taps} gives {count} map{'s' if count > 1 else ''}, but {largest + 1} are compared in pairs; tap "
                "more layers, as in tap=['layer1', 'layer2']"
            )

    def check_adapted(self, student: Tensor, teacher: Tensor) -> None:
        if student.shape[1] != teacher.shape[1]:
            raise WiringError(
                f"{self.name}: the student's {student.shape[1]} channels and the teacher's {teacher.shape[1]} give products "
                "that cannot be compared; use adapter='auto'"
            )

    def forward(self, student: Recording, teacher: Recording, batch: Batch) -> Ratio:
        maps = list(self.aligned(student, teacher, batch))
        ratios = []
        for one, other in self.layers or ():
            (s1, t1, valid1), (s2, t2, valid2) = maps[one], maps[other]
            ratios.append(weighted_ratio(*flow_differences((s1, s2), (t1, t2), (valid1, valid2))))
        return sum_of(ratios)


@TERMS.register
@RECIPES.register("nst")
class NST(MapTerm):
    """Neuron selectivity transfer (NST): distribution of the channels' patterns (Huang & Wang 2017, arXiv 1707.01219).

    Channels are normalised, so that the loss depends neither on the features' scale nor, by the means over channels and images, on
    their number; with the polynomial kernel it is at most 2. The loss of several taps is the mean of their losses. The authors'
    weight is for the last stage of Inception-BN on ImageNet; a port that adds up all stages uses it too.

    Args:
        tap, region: see :class:`MapTerm`; a detector's pyramid or a segmentor's last stage by default.
        kernel: ``"poly"``, ``"linear"`` or ``"gaussian"``; see :func:`kdgraft.losses.nst`.
        bandwidth: σ² of the Gaussian kernel; the mean squared distance of each image by default.
        weight: 50 in the authors' code, with ``kernel="poly"``.

    Example:
        >>> distiller = Distiller(student, teacher, [NST("conv", kernel="gaussian")], example=images)
        >>> list(distiller(images).losses)
        ['distill.nst.loss']
    """

    reads = "features"

    def __init__(
        self,
        tap: Taps | None = None,
        *,
        kernel: Kernel = "poly",
        bandwidth: float | None = None,
        weight: float = 50.0,
        **settings: Any,
    ) -> None:
        super().__init__(tap, weight=weight, **settings)
        check_kernel(kernel, bandwidth)
        self.kernel, self.bandwidth = kernel, bandwidth

    def per_image(self, student: Tensor, teacher: Tensor, valid: Tensor | None) -> Tensor:
        return nst(student, teacher, kernel=self.kernel, bandwidth=self.bandwidth, valid=valid, reduction="none")


def _checked(pairs: Any) -> list[tuple[int, int]]:
    """Return pairs of places; raise a :class:`DistillError` for anything else, such as names of layers."""
    entries = pairs if isinstance(pairs, (list, tuple)) else []
    fine = [
        isinstance(pair, (list, tuple)) and len(pair) == 2 and all(type(p) is int and p >= 0 for p in pair)
        for pair in entries
    ]
    if not fine or not all(fine):
        raise DistillError(
            f"FSP: pairs must be a list of pairs of places in the list of taps, such as [[0, 1], [1, 2]], got {pairs!r}"
        )
    return [(one, other) for one, other in entries]
