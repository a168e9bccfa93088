"""The losses: one method a file, each a pure function that says its shapes, units, reduction and source."""

from .adversarial import adversarial, critic_loss, gradient_penalty
from .affinity import pairwise_affinity
from .channel_wise import channel_wise
from .class_prototypes import class_prototypes
from .cross_image import memory_relations, pixel_relations
from .dist import dist_between_classes, dist_within_classes
from .hint import hint
from .localization import localization
from .logit_matching import logit_matching
from .reduction import Ratio, reduce_loss, upcast, weighted_ratio
from .soft_targets import SoftTargetsLoss, binary_soft_targets, mixed_targets, soft_targets

__all__ = [
    "Ratio",
    "SoftTargetsLoss",
    "adversarial",
    "binary_soft_targets",
    "channel_wise",
    "class_prototypes",
    "critic_loss",
    "dist_between_classes",
    "dist_within_classes",
    "gradient_penalty",
    "hint",
    "localization",
    "logit_matching",
    "memory_relations",
    "mixed_targets",
    "pairwise_affinity",
    "pixel_relations",
    "reduce_loss",
    "soft_targets",
    "upcast",
    "weighted_ratio",
]
