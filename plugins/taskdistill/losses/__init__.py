"""The losses: one method a file, each a pure function that says its shapes, units, reduction and source."""

from .hint import hint
from .localization import localization
from .logit_matching import logit_matching
from .reduction import Ratio, reduce_loss, upcast, weighted_ratio
from .soft_targets import SoftTargetsLoss, binary_soft_targets, mixed_targets, soft_targets

__all__ = [
    "Ratio",
    "SoftTargetsLoss",
    "binary_soft_targets",
    "hint",
    "localization",
    "logit_matching",
    "mixed_targets",
    "reduce_loss",
    "soft_targets",
    "upcast",
    "weighted_ratio",
]
