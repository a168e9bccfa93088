"""Terms on statistics of features: the products of two layers' channels, the distributions of channels and of vectors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..balance import Weight
from ..batch import Batch
from ..distributed import gather_over_ranks, world_size
from ..errors import DistillError, WiringError, check_number
from ..losses import Ratio, mmd, nst, weighted_ratio
from ..losses.fsp import flow_differences
from ..losses.mmd import Kernel, check_kernel, pooled_vectors
from ..registry import RECIPES, TERMS
from ..taps import Recording
from ..wiring import Wiring
from .base import Taps, mean_of, sum_of
from .features import FeatureTerm, check_equal
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
        maps = [teacher for _, teacher, _, _ in self.pairs(wiring.student_recording, wiring.teacher_recording)]
        if wiring.teacher_recording.repeats and any(maps[one] is maps[other] for one, other in self.layers):
            raise WiringError(
                f"{self.name} relates two layers of the teacher, and one map stands for both; set teacher_tap=[…, …], as many as the "
                "student's"
            )

    def check_adapted(self, student: Tensor, teacher: Tensor) -> None:
        check_equal(self, student, teacher)

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
        weight: Weight = 50.0,
        **settings: Any,
    ) -> None:
        super().__init__(tap, weight=weight, **settings)
        check_kernel(kernel, bandwidth)
        self.kernel, self.bandwidth = kernel, bandwidth

    def per_image(self, student: Tensor, teacher: Tensor, valid: Tensor | None) -> Tensor:
        return nst(student, teacher, kernel=self.kernel, bandwidth=self.bandwidth, valid=valid, reduction="none")


@TERMS.register
@RECIPES.register("mmd")
class FeatureMMD(FeatureTerm):
    """Maximum mean discrepancy (MMD) of feature vectors: their distribution follows the teacher's, by a kernel of choice.

    The vectors of an image's positions or of a sequence's tokens are a set, and the loss is the mean over sets. Single vectors
    ``(N, C)``, such as one per sample, are one set over the batch, those of other processes included. The loss of several taps is
    the mean of their losses. No weight is published for this form. With the Gaussian kernel the loss is at most 2, whatever the
    sizes; with the others it grows with the features' scale, and not with the number of channels or positions.

    Args:
        tap, student_tap, teacher_tap: maps ``(B, C, H, W)``, states ``(B, L, C)`` or vectors ``(N, C)``; a detector's pyramid or a
            segmentor's last stage by default.
        kernel: ``"gaussian"``, ``"linear"`` or ``"poly"``; see :func:`kdgraft.losses.mmd`.
        bandwidth: σ² of the Gaussian kernel; the mean squared distance of each set by default.
        items: largest number of vectors in a set for the Gaussian kernel, which compares all of them with each other. Positions and
            tokens beyond are averaged over patches; of single vectors evenly spaced ones are taken.
        adapter: adapter for channels that differ; ``"auto"`` builds one where they do, and none otherwise.
        region: see :class:`~kdgraft.terms.FeatureTerm`; it weighs the vectors in their set.

    Example:
        >>> distiller = Distiller(student, teacher, [FeatureMMD("conv")], example=images)
        >>> list(distiller(images).losses)
        ['distill.feature_mmd.loss']
    """

    reads = "features"

    def __init__(
        self,
        tap: Taps | None = None,
        *,
        kernel: Kernel = "gaussian",
        bandwidth: float | None = None,
        items: int = 512,
        **settings: Any,
    ) -> None:
        super().__init__(tap, **settings)
        check_kernel(kernel, bandwidth)
        check_number("FeatureMMD", "items", items, low=2, whole=True)
        self.kernel, self.bandwidth, self.items = kernel, bandwidth, items

    def check_adapted(self, student: Tensor, teacher: Tensor) -> None:
        check_equal(self, student, teacher)

    def forward(self, student: Recording, teacher: Recording, batch: Batch) -> Ratio:
        return mean_of([self._compare(*level) for level in self.aligned(student, teacher, batch)])

    def _compare(self, student: Tensor, teacher: Tensor, weight: Tensor | None) -> Ratio:
        if student.ndim == 2:
            return self._of_all_ranks(student, teacher, weight)
        (s, valid), (t, _) = (self._set(features, weight) for features in (student, teacher))
        items = mmd(s, t, kernel=self.kernel, bandwidth=self.bandwidth, valid=valid, reduction="none")
        return weighted_ratio(items, None if valid is None else (valid > 0).any(1))

    def _set(self, features: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return the vectors ``(B, N, C)`` of positions or tokens, few enough for the kernel, and their weights."""
        maps = features if features.ndim == 4 else features.transpose(-1, -2)[:, :, None]
        places = weight if weight is None or features.ndim == 4 else weight[:, None]
        most = self.items if self.kernel == "gaussian" else maps.shape[2] * maps.shape[3]
        return pooled_vectors(maps, places, max(most, 1))

    def _of_all_ranks(self, student: Tensor, teacher: Tensor, weight: Tensor | None) -> Ratio:
        """Compare single vectors ``(N, C)`` as one set over all processes, each of which computes the same value."""
        weight = student.new_ones(len(student)) if weight is None else weight
        s, t, w = (gather_over_ranks(x) for x in (student, teacher, weight))
        places = w.nonzero()[:, 0]
        if self.kernel == "gaussian" and len(places) > self.items:
            even = torch.arange(self.items, device=places.device) * len(places) // self.items
            s, t, w = (x[places[even]] for x in (s, t, w))
        value = mmd(s[None], t[None], kernel=self.kernel, bandwidth=self.bandwidth, valid=w[None])
        share = 1 / world_size()
        return Ratio(value * share, value.new_full((), share))


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
