"""Distillation for MMDetection: ``custom_imports = dict(imports=['taskdistill_det'])`` and ``model.type='DistilledDetector'``."""

from taskdistill.hosts import require

require("mmdet", "taskdistill_det")

from .cross_head import CrossHead  # noqa: E402
from .detector import DistilledDetector  # noqa: E402
from .localization import LocalizationDistillation  # noqa: E402
from .recipes import combined, cross_head, imitation, localization  # noqa: E402
from .registry import RECIPES, TERMS  # noqa: E402
from .soft_targets import SoftTargets  # noqa: E402

__all__ = [
    "RECIPES",
    "TERMS",
    "CrossHead",
    "DistilledDetector",
    "LocalizationDistillation",
    "SoftTargets",
    "combined",
    "cross_head",
    "imitation",
    "localization",
]
