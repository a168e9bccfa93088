"""Terms on the relations between positions, for maps of any two widths and therefore without an adapter."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor

from ..balance import Weight
from ..batch import Batch
from ..losses import Ratio, attention_transfer, pairwise_affinity, weighted_ratio
from ..losses.affinity import Pool, check_patch
from ..registry import RECIPES, TERMS
from ..taps import Recording
from .base import Taps, check_choice, mean_of
from .features import FeatureTerm


class MapTerm(FeatureTerm):
    """Base of terms on maps of any two widths, without an adapter; the student's maps are resized to the teacher's grid.

    Args:
        tap, student_tap, teacher_tap: maps ``(B, C, H, W)``.
        region: see :class:`~kdgraft.terms.FeatureTerm`; positions with weight 0 are excluded, the others have equal weight.

    Example:
        >>> class Energy(MapTerm):
        ...     def per_image(self, student, teacher, valid):
        ...         return (student.square().mean((1, 2, 3)) - teacher.square().mean((1, 2, 3))).abs()
        >>> list(Distiller(student, teacher, [Energy("conv")], example=images)(images).losses)
        ['distill.energy.loss']
    """

    needs = ("maps",)

    def __init__(self, tap: Taps | None = None, **settings: Any) -> None:
        super().__init__(tap, adapter="any", **settings)

    def per_image(self, student: Tensor, teacher: Tensor, valid: Tensor | None) -> Tensor:
        """Compute the loss ``(B,)`` of each image from maps on the same grid; ``valid`` is ``(B, H, W)`` or ``None`` for all."""
        raise NotImplementedError

    def forward(self, student: Recording, teacher: Recording, batch: Batch) -> Ratio:
        ratios = []
        for s, t, weight in self.aligned(student, teacher, batch):
            valid = None if weight is None else weight > 0
            present = None if valid is None else valid.flatten(1).any(1)
            ratios.append(weighted_ratio(self.per_image(s, t, valid), present))
        return mean_of(ratios)


@TERMS.register
class PairwiseAffinity(MapTerm):
    """Pair-wise affinity: cosines between pooled nodes (Structured KD; Liu et al. 2019, arXiv 1903.04197), weight 10.

    It needs memory for min(N², C²) numbers per image of N nodes and C channels; see :func:`kdgraft.losses.pairwise_affinity`.

    Args:
        patch: side of a node in positions (2 in the paper), or a fraction of the map (0.5 in the authors' code).
        pool: ``"average"``, or ``"max"`` as in the authors' code.
        tap: maps ``(B, C, H, W)``; by default the input of the classifier, if the host has one.
        region: see :class:`MapTerm`.

    Example:
        >>> term = PairwiseAffinity(tap="conv", patch=0.5, pool="max")
        >>> list(Distiller(student, teacher, [term], example=images)(images).losses)
        ['distill.pairwise_affinity.loss']
    """

    reads = "embeddings"

    def __init__(self, patch: int | float = 2, pool: Pool = "average", **settings: Any) -> None:
        super().__init__(**settings)
        check_patch(patch, pool)
        self.patch, self.pool = patch, pool

    def per_image(self, student: Tensor, teacher: Tensor, valid: Tensor | None) -> Tensor:
        return pairwise_affinity(student, teacher, patch=self.patch, pool=self.pool, valid=valid, reduction="none")


@TERMS.register
@RECIPES.register("at")
class AttentionTransfer(MapTerm):
    """Attention transfer (AT) by activations: strengths of positions (Zagoruyko & Komodakis 2017, arXiv 1612.03928).

    The loss of several taps is the mean of their losses. The authors' code adds up the losses of the groups of a residual network,
    each with weight 1000.

    Args:
        tap, region: see :class:`MapTerm`; a detector's pyramid or a segmentor's last stage by default.
        variant: ``"code"`` or ``"paper"``; see :func:`kdgraft.losses.attention_transfer`.
        weight: β, 1000 in the authors' code.

    Example:
        >>> distiller = Distiller(student, teacher, [AttentionTransfer("conv")], example=images)
        >>> list(distiller(images).losses)
        ['distill.attention_transfer.loss']
    """

    reads = "features"

    def __init__(
        self,
        tap: Taps | None = None,
        *,
        variant: Literal["code", "paper"] = "code",
        weight: Weight = 1000.0,
        **settings: Any,
    ) -> None:
        super().__init__(tap, weight=weight, **settings)
        check_choice(self, "variant", variant, ("code", "paper"))
        self.variant = variant

    def per_image(self, student: Tensor, teacher: Tensor, valid: Tensor | None) -> Tensor:
        return attention_transfer(student, teacher, variant=self.variant, valid=valid, reduction="none")
