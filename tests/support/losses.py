"""Every registered loss by the kind of its inputs, for the checks that all of them share.

A new loss gets every check of ``tests/plugins/losses/test_every_loss.py`` by its line in :data:`BY_NAME`.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

import golden.dense
from kdgraft import losses
from kdgraft.losses.dual_space import DIVERGENCES
from kdgraft.losses.focal_global import GlobalRelation
from kdgraft.losses.frequency import haar_bands
from kdgraft.losses.scale import unit
from support.tensors import gradient


class Kind(NamedTuple):
    """Shapes of student and teacher, and the axis of their channels or classes: ``None`` where each number is an item."""

    student: tuple[int, ...]
    teacher: tuple[int, ...]
    channels: int | None

    @property
    def places(self) -> tuple[int, ...]:
        """The shape of the student's positions, tokens or samples."""
        if self.channels is None:
            return self.student
        axis = self.channels % len(self.student)
        return self.student[:axis] + self.student[axis + 1 :]

    def spread(self, places: Tensor) -> Tensor:
        """A mask of the places, which broadcasts to the inputs."""
        return places if self.channels is None else places.unsqueeze(self.channels)


SAMPLES = Kind((5, 7), (5, 7), -1)
TWO_EMBEDDINGS = Kind((5, 7), (5, 4), -1)
EMBEDDINGS = Kind((7, 6), (7, 6), -1)
SCORES = Kind((2, 3, 7), (2, 3, 7), -1)
WORDS = Kind((2, 3, 7), (2, 3, 10), -1)
FEWER_WORDS = Kind((2, 3, 10), (2, 3, 7), -1)
EACH_CLASS = Kind((5, 7), (5, 7), None)
SCORES_OF_CRITIC = Kind((5,), (5,), None)
EDGES = Kind((5, 4, 9), (5, 4, 9), -1)
MAPS = Kind((2, 6, 3, 4), (2, 6, 3, 4), 1)
TWO_WIDTHS = Kind((2, 3, 3, 4), (2, 6, 3, 4), 1)
PIXELS = Kind((2, 6, 3), (2, 6, 6), -1)
SETS = Kind((2, 5, 4), (2, 5, 4), -1)
TOKENS = Kind((2, 5, 8), (2, 5, 12), -1)
ATTENTION = Kind((2, 3, 4, 5), (2, 3, 4, 5), None)
ROWS_OF_ATTENTION = Kind((2, 3, 4, 5), (2, 3, 4, 5), -1)

BOXES = Kind((5, 4), (5, 4), -1)
MASKS = Kind((5, 12), (5, 12), -1)

SHARED = torch.tensor([[0, 0], [2, 2], [6, 6]])
"""Entries of the same tokens in two vocabularies."""

FINITE = (0.0, 50.0, -1e15)
ANYTHING = (*FINITE, 1e30, -1e30, math.inf, -math.inf, math.nan)


@dataclass(frozen=True)
class Declared:
    """A loss and what holds for it.

    Args:
        loss: called as ``loss(student, teacher, **settings)``.
        kind: the kind of its inputs.
        items: the shape of what ``reduction="none"`` gives.
        leaves_out: its argument that leaves places out: ``"weight"`` weighs them, ``"valid"`` only leaves out, if any.
        equal: whether inputs that are equal cost nothing.
        positive: whether inputs that differ cost something.
        lengths: whether the lengths of the vectors matter.
        compares: whether the teacher's tensor is compared with the student's.
        teacher_learns: whether the gradient of the teacher is the numerical one, too.
        cuts: whether what is left out may be infinite without a trace in the gradient. Of the others 0 · inf is NaN there:
            the caller masks their inputs.
        counts_all: whether samples that are left out count in the mean.
    """

    loss: Callable[..., Tensor]
    kind: Kind
    items: tuple[int, ...]
    leaves_out: str = ""
    equal: bool = True
    positive: bool = True
    lengths: bool = True
    compares: bool = True
    teacher_learns: bool = True
    cuts: bool = False
    counts_all: bool = False

    def takes(self, name: str) -> bool:
        """Whether the loss has an argument of this name."""
        return name in inspect.signature(self.loss).parameters

    def inputs(self, dtype: torch.dtype = torch.float64, size: float = 3.0) -> tuple[Tensor, Tensor]:
        """Random inputs, the same at every call."""
        generator = torch.Generator().manual_seed(sum(self.kind.student))
        drawn = (size * torch.randn(shape, generator=generator, dtype=torch.float64) for shape in self.kind[:2])
        student, teacher = (x.to(dtype) for x in drawn)
        return student, teacher

    def figures(self, student: Tensor, teacher: Tensor, **settings: Any) -> tuple[Tensor, Tensor]:
        """The value, and the gradient of the student."""
        student = student.detach().clone().requires_grad_()
        value = self.loss(student, teacher, **settings)
        return value.detach(), gradient(value, student)

    def places(self) -> Tensor:
        """Weights 0, 1, 2, 0, … of the places, or which of them are valid; in each sample both kinds."""
        weights = torch.arange(math.prod(self.kind.places)).reshape(self.kind.places) % 3
        return weights.double() if self.leaves_out == "weight" else weights > 0

    def left_out(self, places: Tensor | None = None) -> dict[str, Tensor]:
        """The argument that leaves places out, or weighs them."""
        return {self.leaves_out: self.places() if places is None else places} if self.leaves_out else {}


def weighted(loss: Callable[..., Tensor], kind: Kind, items: tuple[int, ...], **holds: Any) -> Declared:
    """A loss whose places have weights."""
    return Declared(loss, kind, items, leaves_out="weight", **holds)


def masked(loss: Callable[..., Tensor], kind: Kind, items: tuple[int, ...], **holds: Any) -> Declared:
    """A loss that leaves places out of its inputs."""
    return Declared(loss, kind, items, leaves_out="valid", **{"cuts": True, **holds})


def _bounded(student: Tensor, teacher: Tensor, **settings: Any) -> Tensor:
    return losses.bounded_regression(student, teacher, teacher.detach(), **settings)


def _boxes(student: Tensor, teacher: Tensor, **settings: Any) -> Tensor:
    boxes = (losses.upcast(side).sigmoid() for side in (student, teacher))
    return losses.box_regression(*boxes, **settings)


def _labelled(loss: Callable[..., Tensor], dim: int = -1) -> Callable[..., Tensor]:
    def told(student: Tensor, teacher: Tensor, temperature: float = 2.0, **settings: Any) -> Tensor:
        items = student.select(dim, 0).shape
        labels = (torch.arange(math.prod(items[1:])) * 5 % student.shape[dim]).reshape(1, *items[1:]).expand(items)
        return loss(student, teacher, labels, temperature, dim=dim, **settings)

    return told


def _confident(student: Tensor, teacher: Tensor, dim: int = -1, **settings: Any) -> Tensor:
    told = lambda s, t, labels, temperature, **more: losses.confidence_weighted(s, t, labels, **more)  # noqa: E731
    return _labelled(told, dim)(student, teacher, **settings)


def _prototypes(student: Tensor, teacher: Tensor, *, valid: Tensor | None = None, **settings: Any) -> Tensor:
    labels = (torch.arange(math.prod(student[:, 0].shape)) // 2 % 3).reshape(student[:, 0].shape)
    labels = labels if valid is None else labels.masked_fill(~valid, 255)
    return losses.class_prototypes(student, teacher, labels, **settings)


def _features(student: Tensor, teacher: Tensor, *, valid: Tensor | None = None, **settings: Any) -> Tensor:
    scale = golden.wave(tuple(student[:, 0].shape), 0.4, 0.2, 0.3).abs().to(losses.upcast(student).dtype)
    return losses.focal_features(student, teacher, scale, valid=valid, **settings)


@cache
def _global_relation(channels: int, dtype: torch.dtype) -> GlobalRelation:
    """Away from its start, where the blocks add nothing; both models' blocks alike."""
    module = GlobalRelation(channels)
    golden.dense.fill(module)
    module.teacher.load_state_dict(module.student.state_dict())
    return module.to(dtype)


def _relation(student: Tensor, teacher: Tensor, *, valid: Tensor | None = None, **settings: Any) -> Tensor:
    return _global_relation(student.shape[1], losses.upcast(student).dtype)(student, teacher, valid=valid, **settings)


def _generation(student: Tensor, teacher: Tensor, *, valid: Tensor | None = None, **settings: Any) -> Tensor:
    def hand_on(maps: Tensor, valid: Tensor | None) -> Tensor:
        maps = losses.upcast(maps)
        return maps if valid is None else maps.masked_fill(~valid[:, None], 0)

    everything = torch.ones_like(student[:, 0], dtype=torch.bool)
    return losses.masked_generation(student, teacher, hand_on, everything, valid=valid, **settings)


def _soft_masks(maps: Tensor) -> Tensor:
    """Three masks of maps of this size, from 0.1 to 0.9."""
    count, height, width = len(maps), *maps.shape[-2:]
    masks = 0.5 + golden.wave((count, 3, height, width), 0.7, 0.3, 0.4)
    return masks.to(losses.upcast(maps).dtype)


def _marked(student: Tensor, teacher: Tensor, **settings: Any) -> Tensor:
    return losses.masked_imitation(student, teacher, _soft_masks(teacher), **settings)


def _bands(student: Tensor, teacher: Tensor, **settings: Any) -> Tensor:
    masks = [_soft_masks(level[:, 0]) for level in haar_bands(teacher, 2)[1]]
    return losses.frequency_imitation(student, teacher, masks, **settings)


def _memory(student: Tensor, teacher: Tensor, **settings: Any) -> Tensor:
    return losses.memory_relations(
        student, teacher, golden.dense.embeddings()[2].bfloat16().to(teacher.dtype), **settings
    )


def _tokens(student: Tensor, teacher: Tensor, *, valid: Tensor | None = None, **settings: Any) -> Tensor:
    if valid is not None:
        settings |= dict(valid=valid[:, None, None], weight=valid[:, None])
    return losses.token_relations(student, teacher, 2, **settings)


def _rows(student: Tensor, teacher: Tensor, *, weight: Tensor | None = None, **settings: Any) -> Tensor:
    return losses.attention_distributions(student, teacher, weight=weight, **settings)


def _flow(student: Tensor, teacher: Tensor, *, valid: Tensor | None = None, **settings: Any) -> Tensor:
    # Halved, which rounds nothing: a slope of the fourth power of 700 does not fit float16.
    s, t = ((maps / 2, maps[:, 1::2] / 2) for maps in (student, teacher))
    return losses.fsp(s, t, valid=(valid, valid), **settings)


def _unit_vectors(student: Tensor, teacher: Tensor, *, valid: Tensor | None = None, **settings: Any) -> Tensor:
    # A slope of the fourth power of 700 does not fit float16.
    cut = (
        (losses.upcast(x) if valid is None else losses.upcast(x).masked_fill(~valid[..., None], 0))
        for x in (student, teacher)
    )
    s, t = (unit(x, -1) for x in cut)
    return losses.mmd(s, t, kernel="poly", valid=valid, **settings)


def _dual_space(student: Tensor, teacher: Tensor, **settings: Any) -> Tensor:
    return losses.dual_space(student, teacher, teacher.argmin(-1), **settings)


def _adversary(kind: str) -> dict[str, Declared]:
    told_apart = lambda student, teacher, **settings: losses.critic_loss(teacher, student, kind, **settings)  # noqa: E731
    fooled = lambda student, teacher, **settings: losses.adversarial(student, kind, **settings)  # noqa: E731
    shared: dict[str, Any] = dict(kind=SCORES_OF_CRITIC, items=(5,), equal=False, positive=False)
    return {
        f"critic_loss {kind}": Declared(told_apart, **shared),
        f"adversarial {kind}": Declared(fooled, **shared, compares=False),
    }


def _contrast(student: Tensor, teacher: Tensor, **settings: Any) -> Tensor:
    negatives = golden.dense.embeddings()[2].bfloat16().to(teacher.dtype)
    return losses.crd(student, teacher, negatives, temperature=0.5, **settings)


def _own_class(student: Tensor, valid: Tensor | None) -> Tensor:
    """A class for each of the samples, −100 where they are left out."""
    labels = torch.arange(len(student)) * 5 % student.shape[1]
    return labels if valid is None else labels.masked_fill(~valid, -100)


def _exit(student: Tensor, teacher: Tensor, *, valid: Tensor | None = None, **settings: Any) -> Tensor:
    labels = _own_class(student, valid)
    return losses.exit_imitation(student, teacher, labels, student, teacher, feature_weight=0.1, **settings)


def _branches(student: Tensor, teacher: Tensor, *, valid: Tensor | None = None, **settings: Any) -> Tensor:
    scores = torch.stack([losses.upcast(student), losses.upcast(student).flip(1)])
    return losses.native_ensemble(scores, teacher, _own_class(student, valid), **settings)


def _conditional() -> dict[str, Declared]:
    labels = torch.arange(5) * 3 % 5
    told_apart = lambda s, t, **settings: losses.conditional_critic_loss(t, s, labels[: len(s)], **settings)  # noqa: E731
    fooled = lambda s, t, **settings: losses.conditional_adversarial(s, labels[: len(s)], **settings)  # noqa: E731
    shared: dict[str, Any] = dict(kind=SAMPLES, items=(5,), equal=False)
    return {
        "conditional_critic_loss": Declared(told_apart, **shared),
        "conditional_adversarial": Declared(fooled, **shared, compares=False),
    }


BY_NAME: dict[str, Declared] = {
    # (…, C): a distribution over classes
    "soft_targets": weighted(losses.soft_targets, SCORES, (2, 3)),
    "soft_targets of maps": weighted(partial(losses.soft_targets, dim=1), MAPS, (2, 3, 4)),
    "logit_matching": weighted(losses.logit_matching, SCORES, (2, 3)),
    "logit_matching centred": weighted(partial(losses.logit_matching, center=True), SCORES, (2, 3)),
    "reverse_kl": weighted(losses.reverse_kl, SCORES, (2, 3)),
    "generalized_jsd": weighted(losses.generalized_jsd, SCORES, (2, 3)),
    "generalized_jsd at 0": weighted(partial(losses.generalized_jsd, beta=0), SCORES, (2, 3)),
    "generalized_jsd at 1": weighted(partial(losses.generalized_jsd, beta=1), SCORES, (2, 3)),
    "skewed_kl": weighted(losses.skewed_kl, SCORES, (2, 3)),
    "skewed_kl reverse": weighted(partial(losses.skewed_kl, reverse=True), SCORES, (2, 3)),
    "skewed_kl at 0": weighted(partial(losses.skewed_kl, alpha=0), SCORES, (2, 3)),
    # The least value of a cross-entropy is the teacher's entropy, and class weights move its place.
    "weighted_soft_targets": weighted(losses.weighted_soft_targets, SCORES, (2, 3), equal=False),
    "universal_logits": weighted(losses.universal_logits, WORDS, (2, 3)),
    "universal_logits of fewer words": weighted(losses.universal_logits, FEWER_WORDS, (2, 3)),
    "gold": weighted(partial(losses.gold, shared=SHARED), WORDS, (2, 3)),
    "gold of fewer words": weighted(partial(losses.gold, shared=SHARED), FEWER_WORDS, (2, 3)),
    # Without cross-entropy equal inputs would cost nothing.
    **{
        f"dual_space by {name}": weighted(
            partial(_dual_space, divergence=name), SCORES, (2, 3), equal=False, teacher_learns=False
        )
        for name in DIVERGENCES
    },
    "exit_imitation": masked(_exit, SAMPLES, (5,), equal=False),
    "native_ensemble": masked(_branches, SAMPLES, (5,), equal=False, teacher_learns=False),
    "margin_mse": weighted(losses.margin_mse, SAMPLES, (5,)),
    "box_regression": weighted(_boxes, BOXES, (5,)),
    "mask_regression": weighted(losses.mask_regression, MASKS, (5,)),
    "localization": weighted(losses.localization, EDGES, (5, 4)),
    "localization of the paper": weighted(partial(losses.localization, variant="paper"), EDGES, (5, 4)),
    "dist_between_classes": weighted(losses.dist_between_classes, SAMPLES, (5,), cuts=True),
    "dist_between_classes of maps": weighted(partial(losses.dist_between_classes, dim=1), MAPS, (2, 3, 4), cuts=True),
    "dist_within_classes": weighted(losses.dist_within_classes, SAMPLES, (7,), cuts=True),
    "dist_within_classes of maps": weighted(partial(losses.dist_within_classes, dim=1), MAPS, (6,), cuts=True),
    "decoupled": weighted(_labelled(losses.decoupled), SCORES, (2, 3), cuts=True),
    "decoupled of maps": weighted(_labelled(losses.decoupled, 1), MAPS, (2, 3, 4), cuts=True),
    "normalized": weighted(_labelled(losses.normalized), SCORES, (2, 3), equal=False, cuts=True),
    "normalized of maps": weighted(_labelled(losses.normalized, 1), MAPS, (2, 3, 4), equal=False, cuts=True),
    "confidence_weighted": weighted(_confident, SCORES, (2, 3), equal=False, cuts=True),
    "confidence_weighted of maps": weighted(partial(_confident, dim=1), MAPS, (2, 3, 4), equal=False, cuts=True),
    # each class on its own
    "binary_soft_targets": weighted(losses.binary_soft_targets, EACH_CLASS, (5, 7)),
    "focused_entropy": weighted(losses.focused_entropy, EACH_CLASS, (5, 7)),
    "weighted_binary_soft_targets": weighted(losses.weighted_binary_soft_targets, EACH_CLASS, (5, 7), equal=False),
    # (N, D): vectors
    "cosine": weighted(losses.cosine, SAMPLES, (5,), lengths=False),
    "patient": weighted(losses.patient, SAMPLES, (5,), lengths=False),
    "patient in code": weighted(partial(losses.patient, variant="code"), SAMPLES, (5,), lengths=False),
    "bounded_regression": weighted(_bounded, SAMPLES, (5,), teacher_learns=False),
    # A sample's two embeddings may be equal, but are never sure to be told from others.
    "crd": weighted(_contrast, EMBEDDINGS, (7,), lengths=False, equal=False),
    "memory_relations": Declared(_memory, EMBEDDINGS, (7,), lengths=False),
    # (B, C): samples, related to each other
    "rkd_distance": masked(losses.rkd_distance, TWO_EMBEDDINGS, (5,), lengths=False),
    "rkd_angle": masked(losses.rkd_angle, TWO_EMBEDDINGS, (5,), lengths=False),
    "similarity_preserving": masked(losses.similarity_preserving, TWO_EMBEDDINGS, (5,), lengths=False),
    "correlation_congruence": masked(losses.correlation_congruence, TWO_EMBEDDINGS, (5,), lengths=False),
    "pkt": masked(losses.pkt, TWO_EMBEDDINGS, (5,), lengths=False),
    "pkt of the paper": masked(partial(losses.pkt, variant="paper"), TWO_EMBEDDINGS, (5,), lengths=False),
    # (B, N, D): pixels of several images, tokens of several texts
    "pixel_relations": masked(losses.pixel_relations, PIXELS, (2, 2, 6), lengths=False),
    "token_relations": masked(_tokens, TOKENS, (2, 2, 5), cuts=False),
    # (B, N, C): sets of vectors. Of its own bandwidth, which is a constant, no numerical gradient.
    "mmd": masked(partial(losses.mmd, bandwidth=9.0), SETS, (2,)),
    "mmd linear": masked(partial(losses.mmd, kernel="linear"), SETS, (2,)),
    "mmd poly of unit vectors": masked(_unit_vectors, SETS, (2,)),
    # (B, H, L, L): attention
    "attention_scores": weighted(losses.attention_scores, ATTENTION, (2, 3, 4, 5), cuts=True),
    "attention_distributions": weighted(_rows, ROWS_OF_ATTENTION, (2, 3, 4)),
    "attention_distributions over keys": masked(losses.attention_distributions, ATTENTION, (2, 3, 4), counts_all=True),
    # (B, C, H, W): maps
    "hint": weighted(losses.hint, MAPS, (2, 3, 4)),
    "hint l1": weighted(partial(losses.hint, norm="l1"), MAPS, (2, 3, 4)),
    # Units that are right by less than the margin cost something, and of the teacher only the signs count.
    "activation_boundaries": weighted(losses.activation_boundaries, MAPS, (2, 3, 4), equal=False, teacher_learns=False),
    "gradient_transfer": masked(losses.gradient_transfer, MAPS, (2,)),
    "pearson": weighted(losses.pearson, MAPS, (6,), cuts=True, lengths=False),
    "channel_wise": masked(losses.channel_wise, MAPS, (2, 6)),
    "focal_features": masked(_features, MAPS, (2,), counts_all=True),
    "focal_attention": masked(losses.focal_attention, MAPS, (2,), counts_all=True),
    "GlobalRelation": masked(_relation, MAPS, (2,), counts_all=True),
    "masked_generation": masked(_generation, MAPS, (2,), counts_all=True),
    "fsp": masked(_flow, MAPS, (2,)),
    "nst": masked(losses.nst, TWO_WIDTHS, (2,), lengths=False),
    "nst linear": masked(partial(losses.nst, kernel="linear"), TWO_WIDTHS, (2,), lengths=False),
    # Of its own bandwidth, which is a constant, no numerical gradient.
    "nst gaussian": masked(partial(losses.nst, kernel="gaussian", bandwidth=0.7), TWO_WIDTHS, (2,), lengths=False),
    "class_prototypes": masked(_prototypes, TWO_WIDTHS, (2, 3, 4), lengths=False),
    **{
        f"pairwise_affinity of patches of {patch}, {pool}": masked(
            partial(losses.pairwise_affinity, patch=patch, pool=pool),
            TWO_WIDTHS,
            (2,),
            lengths=False,
        )
        for patch in (1, 2)  # 12 nodes, more than channels, and 4
        for pool in ("average", "max")
    },
    # scores of a critic
    **_adversary("wgan-gp"),
    **_adversary("lsgan"),
    **_adversary("hinge"),
    **_conditional(),
    "attention_transfer": masked(losses.attention_transfer, TWO_WIDTHS, (2,), lengths=False),
    "factor_transfer": masked(losses.factor_transfer, MAPS, (2,), lengths=False),
    "frequency_imitation": masked(_bands, MAPS, (2,)),
    "masked_imitation": masked(_marked, MAPS, (2,)),
    "hierarchical_context": masked(losses.hierarchical_context, MAPS, (2,)),
    "factor_transfer of the paper": masked(partial(losses.factor_transfer, variant="paper"), MAPS, (2,), lengths=False),
}
"""By the name of a registered loss, and its settings after a blank."""
