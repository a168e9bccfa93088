"""Terms on features: an adapter maps the student's features to the teacher's space, and a region weighs the positions."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters import AdapterKind, adapter_label, build_adapter
from ..balance import Weight
from ..batch import Batch
from ..distributed import total_over_ranks, world_size
from ..errors import DistillError, WiringError, check_number
from ..losses import (
    Ratio,
    activation_boundaries,
    channel_wise,
    pearson,
    sparsity_mismatch,
    weighted_ratio,
)
from ..losses.soft_targets import check_temperature
from ..readers import class_dim, in_order
from ..regions import All, Region
from ..registry import LOSSES, RECIPES, REGIONS, TERMS
from ..taps import Recording, Tap
from .base import Taps, TapTerm, Term, Wiring, mean_of, sum_of


class FeatureTerm(TapTerm):
    """Base of terms on features: taps, adapters, a region and the alignment of both models' tensors, without a loss.

    A subclass computes its loss in :meth:`forward` from the tensors that :meth:`aligned` yields.

    Args:
        tap, student_tap, teacher_tap: maps ``(B, C, H, W)`` or vectors ``(…, C)``.
        adapter: ``"auto"``, ``"conv1x1"``, ``"mlp"`` (two 1×1 convolutions), ``"linear"``, ``"none"`` (equal channels) or ``"any"``
            (no adapter, for a loss that accepts any two widths); each tensor has its own, sized by the dry run.
        region: ``"all"`` (without padding and ignored positions), ``"foreground"`` if the host has boxes, or another registered
            region.

    Example:
        >>> class Means(FeatureTerm):
        ...     def forward(self, student, teacher, batch):
        ...         ((s, t, weight),) = self.aligned(student, teacher, batch)
        ...         return weighted_ratio((s.mean(1) - t.mean(1)).abs(), weight)
        >>> list(Distiller(student, teacher, [Means("conv")], example=images)(images).losses)
        ['distill.means.loss']
    """

    adapts_always = False
    """True if ``adapter="auto"`` builds an adapter even where the channels agree."""

    def __init__(
        self, tap: Taps | None = None, *, adapter: AdapterKind = "auto", region: Any = "all", **settings: Any
    ) -> None:
        super().__init__(tap, **settings)
        self.adapter_kind: AdapterKind = adapter
        self.region, self.region_name = build_region(region, self)
        self.adapters = nn.ModuleList()
        self.placed: list[bool] = []

    def wire(self, wiring: Wiring) -> None:
        check_region(self, self.region, self.region_name, wiring)
        for s, t, s_tap, t_tap in self.pairs(wiring.student_recording, wiring.teacher_recording):
            if "maps" in self.needs:
                check_maps(self, s, t, s_tap, t_tap)
            self.check_pair(s, t, s_tap, t_tap, wiring)
            self.placed.append(placed(self, self.region, self.region_name, t, t_tap, wiring))
            same = s.ndim == t.ndim and s.shape[class_dim(t)] == t.shape[class_dim(t)]
            kind = "none" if self.adapter_kind == "auto" and same and not self.adapts_always else self.adapter_kind
            where, corners = f"{self.name} ({s_tap} → {t_tap})", self.reader.align_corners(s_tap)
            adapter = build_adapter(kind, s, t, where, align_corners=corners)
            self.check_adapted(adapter(s.detach(), t), t)
            self.adapters.append(adapter)
            label = adapter_label(adapter, s, t)
            self.rows.append(self.row(s, t, taps=(s_tap, t_tap), adapter=label, region=self.region_name))

    def check_pair(self, student: Tensor, teacher: Tensor, student_tap: Tap, teacher_tap: Tap, wiring: Wiring) -> None:
        """Raise a :class:`WiringError` if the term cannot compare the two tensors; called before the adapter is built."""

    def check_adapted(self, student: Tensor, teacher: Tensor) -> None:
        """Raise a :class:`WiringError` if the term cannot compare the adapted tensor with the teacher's."""

    def aligned(
        self, student: Recording, teacher: Recording, batch: Batch
    ) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        """Yield for each tapped tensor the student's after its adapter, the teacher's, and the weights of the positions."""
        pairs = self.pairs(student, teacher)
        for adapter, (s, t, _, t_tap), in_image in zip(self.adapters, pairs, self.placed, strict=True):
            if self.compares_classes:
                t = in_order(t, teacher.class_order, class_dim(t))
            weight = self.region(batch.at(t_tap, t), t, teacher.scale) if in_image else None
            if weight is not None:
                # Values outside the region must not reach the gradient, not even an infinity (0 · inf is NaN).
                t = t.masked_fill((weight == 0).unsqueeze(class_dim(t)), 0)
            yield adapter(s, t), t, weight


@TERMS.register
class FeatureImitation(FeatureTerm):
    """The student's features imitate the teacher's through an adapter, on a region, by any loss per position.

    The defaults give FitNets' hint (arXiv 1412.6550) with the adapter of Chen et al. (NeurIPS 2017), on every position. The loss
    of several tensors, such as the levels of a pyramid, is the mean of their losses.

    Args:
        tap, student_tap, teacher_tap, adapter, region: see :class:`FeatureTerm`.
        loss: a registered loss, or a function of ``(student, teacher, dim=…, reduction="none")`` that returns a value per
            position: ``"hint"``, ``"cosine"`` for directions alone; ``dict(type="hint", norm="l1")`` sets its arguments.

    Example:
        >>> term = FeatureImitation("conv", loss=dict(type="hint", norm="l1"))
        >>> for row in Distiller(student, teacher, [term], example=images).rows: print(row.student_shape, row.adapter)
        2×4×8×8 ConvAdapter 4→8
    """

    adapts_always = True

    def __init__(self, tap: Taps | None = None, *, loss: Any = "hint", **settings: Any) -> None:
        super().__init__(tap, **settings)
        self.loss = _loss_function(loss)

    def check_adapted(self, student: Tensor, teacher: Tensor) -> None:
        dim = class_dim(teacher)
        places = teacher.select(dim, 0).shape
        try:
            found = self.loss(student, teacher, dim=dim, reduction="none").shape
        except DistillError as error:
            raise WiringError(f"{self.name}: {error}; use adapter='auto', or another loss") from error
        if found != places:
            raise WiringError(
                f"{self.name}: a loss on features gives one value per position, {tuple(places)} here, but this one gives "
                f"{tuple(found)}; use another loss, or a term that includes its loss (PearsonImitation, ChannelWise)"
            )

    def forward(self, student: Recording, teacher: Recording, batch: Batch) -> Ratio:
        return mean_of([self._compare(*level) for level in self.aligned(student, teacher, batch)])

    def _compare(self, student: Tensor, teacher: Tensor, weight: Tensor | None) -> Ratio:
        items = self.loss(student, teacher, dim=class_dim(teacher), reduction="none")
        return weighted_ratio(items, weight)


@TERMS.register
class Hint(FeatureImitation):
    """FitNets' hint (arXiv 1412.6550): feature imitation of one layer, every position, squared error.

    Example:
        >>> distiller = Distiller(student, teacher, [Hint("conv", weight=2.0)], example=images)
        >>> list(distiller(images).losses)
        ['distill.hint.loss']
    """


@TERMS.register
class PearsonImitation(FeatureTerm):
    """Pearson correlation with the teacher's features, channel by channel, at any scale (PKD; Cao et al. 2022, arXiv 2207.02039).

    The correlation is over all positions of the batch, including those of other processes. The losses of several tensors are
    added, as in the authors' code: their weights, 6 for Faster R-CNN and 10 for RetinaNet, apply to each level.

    Args:
        tap: maps ``(B, C, H, W)`` or vectors ``(…, C)``.
        adapter: adapter for channels that differ; ``"auto"`` builds a 1×1 convolution where they do, and none otherwise.
        region: see :class:`FeatureTerm`; positions with weight 0 are excluded.

    Example:
        >>> distiller = Distiller(student, teacher, [PearsonImitation("conv", weight=6.0)], example=images)
        >>> list(distiller(images).losses)
        ['distill.pearson_imitation.loss']
    """

    def forward(self, student: Recording, teacher: Recording, batch: Batch) -> Ratio:
        return sum_of([self._compare(*level) for level in self.aligned(student, teacher, batch)])

    def _compare(self, student: Tensor, teacher: Tensor, weight: Tensor | None) -> Ratio:
        dim = class_dim(teacher)
        share = 1 / world_size()  # every process computes the same value
        value = pearson(student, teacher, dim=dim, weight=weight, total=total_over_ranks)
        return Ratio(value * share, value.new_full((), share))


@TERMS.register
class ChannelWise(FeatureTerm):
    """Channel-wise distillation (CWD): each channel's softmax over positions (Shu et al. 2021, arXiv 2011.13256).

    The loss of several taps is the mean of their losses. The authors use weight 3 and temperature 4 for class scores of
    segmentors, weight 10 and temperature 1 for features of detectors.

    Args:
        tap: maps ``(B, C, H, W)``: features, or class scores, which are the host's default.
        temperature: T > 0.
        adapter: adapter for channels that differ; ``"auto"`` builds a 1×1 convolution where they do, and none otherwise.
        region: see :class:`FeatureTerm`; positions with weight 0 are excluded.

    Example:
        >>> term = ChannelWise("conv", temperature=1.0, weight=10.0)
        >>> list(Distiller(student, teacher, [term], example=images)(images).losses)
        ['distill.channel_wise.loss']
    """

    reads = "scores"
    needs = ("maps",)

    def __init__(self, tap: Taps | None = None, *, temperature: float = 4.0, **settings: Any) -> None:
        super().__init__(tap, **settings)
        check_temperature(temperature)
        self.temperature = temperature

    def prepare(self, student: nn.Module, teacher: nn.Module) -> None:
        super().prepare(student, teacher)
        scores = [self.reader.reads_scores(tap) for tap in (*self.student_taps, *self.teacher_taps)]
        if any(scores) and not all(scores):
            raise DistillError(
                "ChannelWise: one term cannot compare both class scores and features; add a term for each"
            )
        self.compares_classes = all(scores)

    def check_pair(self, student: Tensor, teacher: Tensor, student_tap: Tap, teacher_tap: Tap, wiring: Wiring) -> None:
        if self.compares_classes:
            self.reader.check_classes(student, teacher, student_tap, teacher_tap)

    def forward(self, student: Recording, teacher: Recording, batch: Batch) -> Ratio:
        ratios = []
        for s, t, valid in self.aligned(student, teacher, batch):
            items = channel_wise(s, t, self.temperature, valid=valid, reduction="none")
            present = None if valid is None else (valid.flatten(1) > 0).any(1, keepdim=True)
            ratios.append(weighted_ratio(items, present))
        return mean_of(ratios)


@TERMS.register
@RECIPES.register("ab")
class ActivationBoundaries(FeatureTerm):
    """Activation boundaries (AB): units are on or off where the teacher's are (Heo et al. 2019, arXiv 1811.03233).

    Tap both models before a ReLU. Squared errors are summed over units and positions and divided by the number of images; the
    losses of several taps are added, each with half the weight of the next one. The authors' weight of 3/1000 is for CIFAR-10, with
    maps of 32×32, 16×16 and 8×8; the loss grows with the number of units and positions. They train the student on this loss alone
    first and then on the labels; here it is added to the task's own loss, and ``schedule=dict(type="Stop", …)`` ends it. Their
    adapter ends with a batch normalisation, which this one lacks.

    The log has the share of units whose state differs from the teacher's as ``distill.activation_boundaries.mismatch``; see
    :func:`kdgraft.losses.sparsity_mismatch`.

    Args:
        tap, student_tap, teacher_tap: maps ``(B, C, H, W)`` or vectors ``(…, C)`` before an activation, from the first layer to the
            last; a detector's pyramid or a segmentor's last stage by default. The teacher's may also be after the ReLU.
        margin: m >= 0; a unit costs nothing beyond it.
        adapter: ``"auto"`` builds an adapter where the channels differ, and none otherwise.
        region: see :class:`FeatureTerm`; positions with weight 0 are excluded.

    Example:
        >>> distiller = Distiller(student, teacher, [ActivationBoundaries("conv")], example=images)
        >>> list(distiller(images).losses)
        ['distill.activation_boundaries.loss', 'distill.activation_boundaries.mismatch']
    """

    reads = "features"

    def __init__(self, tap: Taps | None = None, *, margin: float = 1.0, weight: Weight = 3e-3, **settings: Any) -> None:
        super().__init__(tap, weight=weight, **settings)
        check_number("ActivationBoundaries", "margin", margin)
        self.margin = margin

    def wire(self, wiring: Wiring) -> None:
        super().wire(wiring)
        pairs = self.pairs(wiring.student_recording, wiring.teacher_recording)
        for adapter, (s, _, tap, _) in zip(self.adapters, pairs, strict=True):
            if not list(adapter.parameters()) and (s >= 0).all() and (s == 0).any():
                raise WiringError(
                    f"{self.name}: no unit of the student's {tap} is below 0, as after a ReLU, so that none can learn to be off; "
                    "tap the layer before it, or use adapter='conv1x1'"
                )

    def check_adapted(self, student: Tensor, teacher: Tensor) -> None:
        check_equal(self, student, teacher)

    def forward(self, student: Recording, teacher: Recording, batch: Batch) -> Ratio:
        ratios, shares = [], []
        for depth, (s, t, weight) in enumerate(self.aligned(student, teacher, batch), 1 - len(self.adapters)):
            dim = class_dim(t)
            items = activation_boundaries(s, t, margin=self.margin, dim=dim, weight=weight, reduction="none")
            present = None if weight is None else (weight.reshape(len(weight), -1) > 0).any(1)
            ratios.append(weighted_ratio(items.reshape(len(items), -1).sum(1) * 2.0**depth, present))
            shares.append(sparsity_mismatch(s, t, dim=dim, weight=weight))
        self.monitor["mismatch"] = torch.stack(shares).mean()
        return sum_of(ratios)


def _loss_function(spec: Any) -> Callable[..., Tensor]:
    settings: dict[str, Any] = {}
    if isinstance(spec, dict):
        settings = {key: value for key, value in spec.items() if key != "type"}
        spec = spec.get("type")
    function = LOSSES.get(spec) if isinstance(spec, str) else spec
    if not callable(function):
        raise DistillError(f"loss must be a name, a dict with a type, or a function; got {spec!r}")
    takes = inspect.signature(function).parameters
    unknown = [key for key in settings if key not in takes or key in ("dim", "weight", "reduction")]
    if unknown or not {"dim", "reduction"} <= set(takes):
        name = getattr(function, "__name__", repr(function))
        problem = f"takes no {unknown[0]!r}" if unknown else "must take dim and reduction to be used on features"
        raise DistillError(f"loss {name} {problem}")
    return lambda student, teacher, **place: function(student, teacher, **settings, **place)


def build_region(spec: Any, term: Term) -> tuple[Region, str]:
    """Build a region from its name, a dict or an instance; return it with its name."""
    region = REGIONS.build(spec)
    if not isinstance(region, Region):
        raise DistillError(
            f"{type(term).__name__}: a region is a name or a Region, one of {', '.join(REGIONS)}; got {spec!r}"
        )
    return region, spec if isinstance(spec, str) else type(region).__name__


def check_region(term: Term, region: Region, name: str, wiring: Wiring) -> None:
    """Raise a :class:`WiringError` unless the host provides the fields that the region needs."""
    missing = region.needs - wiring.fields
    if missing:
        raise WiringError(
            f"{term.name}: region {name!r} needs {', '.join(sorted(missing))}, not given here; use region='all'"
        )


def placed(term: Term, region: Region, name: str, teacher: Tensor, tap: Tap, wiring: Wiring) -> bool:
    """Return true if the region has to locate the tapped positions in the image; region ``"all"`` weighs proposals equally.

    Raises:
        WiringError: the region cannot locate them.
    """
    if isinstance(region, All) and not wiring.in_image(tap):
        return False
    if "tokens" in wiring.fields and teacher.ndim > 3:
        raise WiringError(
            f"{term.name}: region {name!r} cannot exclude the padding of {tap} {tuple(teacher.shape)}; tap states (B, L, C) of "
            "tokens"
        )
    needed = not isinstance(region, All) or "image_sizes" in wiring.fields
    if needed and (teacher.ndim != 4 or not wiring.in_image(tap)):
        raise WiringError(
            f"{term.name}: region {name!r} cannot place the positions of {tap} {tuple(teacher.shape)} in the image; "
            + ("tap a map (B, C, H, W), such as the output of a stage" if wiring.in_image(tap) else "use region='all'")
        )
    return True


def check_maps(term: Term, student: Tensor, teacher: Tensor, student_tap: Tap, teacher_tap: Tap) -> None:
    """Raise a :class:`WiringError` unless both tensors are maps."""
    if student.ndim != 4 or teacher.ndim != 4:
        raise WiringError(
            f"{term.name}: {student_tap} {tuple(student.shape)} and {teacher_tap} {tuple(teacher.shape)} must be maps "
            "(B, C, H, W)"
        )


def check_equal(term: Term, student: Tensor, teacher: Tensor) -> None:
    """Raise a :class:`WiringError` unless the adapted tensor has the teacher's shape, which ``adapter="any"`` does not ensure."""
    if student.shape[1:] != teacher.shape[1:]:
        raise WiringError(
            f"{term.name}: student {tuple(student.shape)} and teacher {tuple(teacher.shape)} must agree; use adapter='auto'"
        )


def check_in_image(term: Term, tap: Tap, wiring: Wiring) -> None:
    """Raise a :class:`WiringError` for a tap on proposals, as a loss of images cannot place them."""
    if not wiring.in_image(tap):
        raise WiringError(
            f"{term.name}: {tap} yields maps of proposals, but this loss compares images; tap a stage or the neck, "
            "or use FeatureImitation"
        )
