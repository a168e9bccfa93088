"""Terms on the relations between samples: one vector per sample, gathered over the processes, for models of any two widths."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..balance import Weight
from ..batch import Batch
from ..distributed import gather_over_ranks, most_over_ranks, world_size
from ..errors import DistillError, WiringError, check_number
from ..losses import (
    Ratio,
    correlation_congruence,
    pkt,
    rkd_angle,
    rkd_distance,
    similarity_preserving,
    upcast,
)
from ..losses.correlation_congruence import check_kernel
from ..pooling import first_of_each, last_of_each, mean_of_each
from ..regions import All, Region
from ..registry import RECIPES, TERMS
from ..taps import Recording, Tap
from .base import Taps, TapTerm, Wiring, check_choice, mean_of
from .features import build_region, check_region, placed

Pool = Literal["mean", "first", "last", "flat"]
_ONE_TOKEN = ("first", "last")


class SampleTerm(TapTerm):
    """Base of terms on the relations between the samples of a batch, those of all processes together.

    A subclass computes the loss of N samples in :meth:`compare`. The loss of several taps is the mean of their losses. With
    gradient accumulation the samples of each part are related to each other, not to those of other parts: the parts' losses are
    averaged, and a larger batch relates more.

    Args:
        tap, student_tap, teacher_tap: vectors ``(B, C)``, taken as they are; maps ``(B, C, H, W)`` or states ``(B, L, C)``, pooled
            to one vector per sample. By default a segmentor's or detector's last stage, or the last hidden state of a Hugging
            Face model. The two models' widths, grids and tokens may differ.
        pool: ``"mean"`` over the positions that count; the ``"first"`` token of states; or ``"flat"``: all positions one after
            another, with 0 for those that do not count, which processes exchange as a whole.
        region: ``"all"`` (without padding and ignored positions) or another registered region, whose weights the mean uses.
            Samples without a position that counts are left out.

    Example:
        >>> class Norms(SampleTerm):
        ...     def compare(self, student, teacher, present):
        ...         ratios = [x.norm(dim=1) / x.norm(dim=1).mean() for x in (student[present], teacher[present])]
        ...         return (ratios[0] - ratios[1]).square().mean()
        >>> list(Distiller(student, teacher, [Norms("conv")], example=images)(images).losses)
        ['distill.norms.loss']
    """

    reads = "samples"
    needs: ClassVar[tuple[str, ...]] = ("samples",)
    pools: ClassVar[tuple[str, ...]] = ("mean", "first", "flat")

    def __init__(self, tap: Taps | None = None, *, pool: Pool = "mean", region: Any = "all", **settings: Any) -> None:
        super().__init__(tap, **settings)
        check_choice(self, "pool", pool, self.pools)
        self.pool: Pool = pool
        self.region, self.region_name = build_region(region, self)
        if pool in _ONE_TOKEN and not isinstance(self.region, All):
            raise DistillError(
                f"{type(self).__name__}: pool={pool!r} takes one token whatever the region; leave region out"
            )

    def wire(self, wiring: Wiring) -> None:
        check_region(self, self.region, self.region_name, wiring)
        for s, t, s_tap, t_tap in self.pairs(wiring.student_recording, wiring.teacher_recording):
            for tensor, tap, recording in ((s, s_tap, wiring.student_recording), (t, t_tap, wiring.teacher_recording)):
                self._check(tensor, tap, self.pool_of(recording) in _ONE_TOKEN, wiring)
            self._check_samples(s, t, s_tap, t_tap)
            region = "–" if s.ndim == t.ndim == 2 else self._region_name()
            self.rows.append(self.row(s, t, taps=(s_tap, t_tap), adapter="any", region=region))

    def _region_name(self) -> str:
        return f"{self.pool} token" if self.pool in _ONE_TOKEN else self.region_name

    def _check(self, tensor: Tensor, tap: Tap, one_token: bool, wiring: Wiring) -> None:
        """Raise a :class:`WiringError` unless a tensor gives one vector per sample."""
        shape, samples = tuple(tensor.shape), wiring.facts.get("samples")
        if tensor.ndim not in (2, 3, 4) or not wiring.in_image(tap) or (one_token and tensor.ndim == 4):
            kinds = "states (B, L, C)" if one_token else "vectors (B, C), states (B, L, C) or maps (B, C, H, W)"
            raise WiringError(f"{self.name}: {tap} {shape} gives no vector per sample; tap {kinds} of whole samples")
        if "tokens" in wiring.fields or tensor.ndim > 2 or not isinstance(self.region, All):
            placed(self, self.region, self.region_name, tensor, tap, wiring)
        flat = tensor.ndim == 2 and "tokens" in wiring.fields  # the states of all sequences after one another
        if samples is not None and len(tensor) != samples and not flat:
            raise WiringError(
                f"{self.name}: {tap} {shape} does not hold one entry for each of {samples} samples; tap another module"
            )

    def _check_samples(self, student: Tensor, teacher: Tensor, student_tap: Tap, teacher_tap: Tap) -> None:
        if len(student) != len(teacher):
            raise WiringError(
                f"{self.name}: {student_tap} {tuple(student.shape)} and {teacher_tap} {tuple(teacher.shape)} must hold the same "
                "samples"
            )

    def pool_of(self, recording: Recording) -> Pool:
        """Return how the positions of one model become vectors."""
        return self.pool

    def samples(self, student: Recording, teacher: Recording, batch: Batch) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield for each tap both models' vectors ``(N, C)`` in float32, and ``(N,)``, true for samples that count.

        These are the samples of this process.
        """
        for s, t, s_tap, t_tap in self.pairs(student, teacher):
            ours, here = self._vectors(s, s_tap, student, batch)
            theirs, there = self._vectors(t, t_tap, teacher, batch)
            self._check_samples(ours, theirs, s_tap, t_tap)
            yield ours, theirs, here & there

    def _vectors(self, tensor: Tensor, tap: Tap, recording: Recording, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return one vector per sample of one model, and true for samples that have one."""
        return vectors_of(self.name, self.region, self.pool_of(recording), tensor, tap, recording, batch)

    def forward(self, student: Recording, teacher: Recording, batch: Batch) -> Ratio:
        return mean_of([self._related(*found) for found in self.samples(student, teacher, batch)])

    def _related(self, student: Tensor, teacher: Tensor, present: Tensor) -> Ratio:
        share = 1 / world_size()  # every process computes the same value
        widths = (student.shape[1], teacher.shape[1], 1)
        everyone = gather_over_ranks(torch.cat([student, teacher, present[:, None].to(student.dtype)], 1))
        s, t, counts = everyone.split(widths, 1)
        value = self.compare(s, t, counts[:, 0] > 0)
        return Ratio(value * share, value.new_full((), share))

    def compare(self, student: Tensor, teacher: Tensor, present: Tensor) -> Tensor:
        """Compute the loss of N samples of all processes.

        Args:
            student: ``(N, C_s)``.
            teacher: ``(N, C_t)``.
            present: ``(N,)``, true for the samples that count.
        """
        raise NotImplementedError


def vectors_of(
    term: str, region: Region, pool: Pool, tensor: Tensor, tap: Tap, recording: Recording, batch: Batch
) -> tuple[Tensor, Tensor]:
    """Return one vector ``(N, C)`` per sample of a model, and ``(N,)``, true for samples that have one.

    Args:
        term: the term's name, for messages.
        region: the weights of the positions.
        pool: see :class:`SampleTerm`.
        tensor: vectors ``(B, C)``, states ``(B, L, C)`` or maps ``(B, C, H, W)``.
        tap: the tap of ``tensor``.
        recording: the recording that it comes from.
        batch: the facts about the batch.
    """
    place = batch.at(tap, tensor, owner=recording.owner)
    weight, texts = region(place, tensor, recording.scale), place.texts
    if tensor.ndim == 2 and (weight is None or place.tokens is None):
        return upcast(tensor), torch.ones_like(tensor[:, 0], dtype=torch.bool)
    if weight is not None and tensor.ndim == 2:
        assert place.tokens is not None
        tensor, weight = tensor.view(*place.tokens.shape, -1), weight.view(place.tokens.shape)
    if pool == "mean":
        return mean_of_each(tensor, weight, texts)
    if pool == "flat":
        if texts is not None:
            raise WiringError(f"{term}: rows hold several texts, which cannot be flattened; use pool='mean'")
        return _flattened(tensor, weight)
    select = first_of_each if pool == "first" else last_of_each
    picked = upcast(select(tensor, None if weight is None else weight > 0, texts))
    if weight is None or texts is not None:
        return picked, torch.ones_like(picked[:, 0], dtype=torch.bool)
    present = (weight > 0).any(1)
    return picked.masked_fill(~present[:, None], 0), present


def _flattened(tensor: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return ``(B, …)`` on the largest grid of all processes, flattened, and true for samples with a position that counts."""
    rows = upcast(tensor if tensor.ndim == 4 else tensor.transpose(1, 2))  # (B, C, positions)
    present = torch.ones_like(rows[:, 0].flatten(1)[:, 0], dtype=torch.bool)
    if weight is not None:
        rows, present = rows.masked_fill((weight == 0)[:, None], 0) * weight[:, None], (weight > 0).flatten(1).any(1)
    most = most_over_ranks(torch.tensor(rows.shape[2:], device=rows.device)).tolist()
    wider = [
        more for size, own in zip(reversed(most), reversed(rows.shape[2:]), strict=True) for more in (0, size - own)
    ]
    return F.pad(rows, wider).flatten(1), present


@TERMS.register
@RECIPES.register("rkd")
class RKD(SampleTerm):
    """RKD: distances between samples and angles of triplets follow the teacher's (Park et al. 2019, arXiv 1904.05068).

    The published weights are 1 and 2 for embeddings in metric learning (batches of 64 or 128 with several samples of each class),
    and 25 and 50 for the last features of classifiers of CIFAR-100. The losses are means, which do not grow with the batch or the
    width; a larger batch has more triplets. The angles need N² · (N + C) numbers for N samples of all processes and C channels.

    Args:
        tap, pool, region: see :class:`~kdgraft.terms.SampleTerm`.
        distance: the weight of the distances.
        angle: the weight of the angles.

    Example:
        >>> distiller = Distiller(student, teacher, [RKD("conv", distance=25.0, angle=50.0)], example=images)
        >>> list(distiller(images).losses)
        ['distill.rkd.loss']
    """

    def __init__(self, tap: Taps | None = None, *, distance: float = 1.0, angle: float = 2.0, **settings: Any) -> None:
        super().__init__(tap, **settings)
        for name, part in (("distance", distance), ("angle", angle)):
            check_number("RKD", name, part)
        if not distance and not angle:
            raise DistillError("RKD: distance and angle are both 0, so that nothing is compared; leave the term out")
        self.distance, self.angle = float(distance), float(angle)

    def compare(self, student: Tensor, teacher: Tensor, present: Tensor) -> Tensor:
        parts = ((self.distance, rkd_distance), (self.angle, rkd_angle))
        found = [weight * loss(student, teacher, valid=present) for weight, loss in parts if weight]
        return torch.stack(found).sum()


@TERMS.register
@RECIPES.register("sp")
class SimilarityPreserving(SampleTerm):
    """SP: rows of the samples' Gram matrix follow the teacher's (Tung & Mori 2019, arXiv 1907.09682).

    RepDistiller's weight is 3000, on the last maps of classifiers of CIFAR-100 in batches of 64. The loss is divided by N², and
    shrinks about as 1 / N with the number N of samples; neither the width nor the size of maps matters.

    Args:
        tap, region: see :class:`~kdgraft.terms.SampleTerm`.
        pool: ``"flat"`` for whole maps as in the paper; the mean costs processes less to exchange.
        weight: 3000 in RepDistiller, which the authors verified.

    Example:
        >>> distiller = Distiller(student, teacher, [SimilarityPreserving("conv", pool="flat")], example=images)
        >>> list(distiller(images).losses)
        ['distill.similarity_preserving.loss']
    """

    def __init__(self, tap: Taps | None = None, *, weight: Weight = 3000.0, **settings: Any) -> None:
        super().__init__(tap, weight=weight, **settings)

    def compare(self, student: Tensor, teacher: Tensor, present: Tensor) -> Tensor:
        return similarity_preserving(student, teacher, valid=present)


@TERMS.register
@RECIPES.register("cc")
class CorrelationCongruence(SampleTerm):
    """CC: a Gaussian kernel of the samples follows the teacher's (Peng et al. 2019, arXiv 1904.01802).

    The paper draws batches with several samples of each class, which is up to the data loader here. No code of the authors is
    public; the default weight is that of a public re-implementation (Knowledge-Distillation-Zoo) for the last features of
    classifiers of CIFAR-10 in batches of 128. The loss is a mean over pairs of samples: neither batch nor width changes its scale.

    Args:
        tap, pool, region: see :class:`~kdgraft.terms.SampleTerm`.
        gamma: γ of the kernel exp(−γ‖x − y‖²), 0.4 in the re-implementation.
        order: the order P of its Taylor series.

    Example:
        >>> distiller = Distiller(student, teacher, [CorrelationCongruence("conv")], example=images)
        >>> list(distiller(images).losses)
        ['distill.correlation_congruence.loss']
    """

    def __init__(
        self,
        tap: Taps | None = None,
        *,
        gamma: float = 0.4,
        order: int = 2,
        weight: Weight = 100.0,
        **settings: Any,
    ) -> None:
        super().__init__(tap, weight=weight, **settings)
        check_kernel(gamma, order)
        self.gamma, self.order = gamma, order

    def compare(self, student: Tensor, teacher: Tensor, present: Tensor) -> Tensor:
        return correlation_congruence(student, teacher, gamma=self.gamma, order=self.order, valid=present)


@TERMS.register
@RECIPES.register("pkt")
class PKT(SampleTerm):
    """PKT: probabilities of being each other's neighbours follow the teacher's (Passalis & Tefas 2018, arXiv 1803.10837).

    RepDistiller's weight is 30000, on the last features of classifiers of CIFAR-100 in batches of 64; the authors train without a
    loss beside it. In ``variant="code"`` the loss is a mean over pairs, and shrinks about as 1 / N with the number N of samples.

    Args:
        tap, pool, region: see :class:`~kdgraft.terms.SampleTerm`.
        variant: ``"code"`` or ``"paper"``; see :func:`kdgraft.losses.pkt`.
        weight: 30000 in RepDistiller, for ``variant="code"``.

    Example:
        >>> distiller = Distiller(student, teacher, [PKT("conv")], example=images)
        >>> list(distiller(images).losses)
        ['distill.pkt.loss']
    """

    def __init__(
        self,
        tap: Taps | None = None,
        *,
        variant: Literal["code", "paper"] = "code",
        weight: Weight = 30000.0,
        **settings: Any,
    ) -> None:
        super().__init__(tap, weight=weight, **settings)
        check_choice(self, "variant", variant, ("code", "paper"))
        self.variant: Literal["code", "paper"] = variant

    def compare(self, student: Tensor, teacher: Tensor, present: Tensor) -> Tensor:
        return pkt(student, teacher, variant=self.variant, valid=present)
