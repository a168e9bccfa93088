"""Distillation for MMDetection: ``custom_imports = dict(imports=['kdgraft_det'])`` and ``model.type='DistilledDetector'``."""

from kdgraft.hosts import require

require("mmdet", "kdgraft_det")
import kdgraft_mm  # noqa: E402, F401

from .bckd import BCKD  # noqa: E402
from .cross_head import CrossHead  # noqa: E402
from .dense_heads import DenseHead  # noqa: E402
from .detector import DistilledDetector  # noqa: E402
from .heads import HEADS, HeadReader  # noqa: E402
from .instance_masks import InstanceMasks  # noqa: E402
from .kd_detr import KDDETR  # noqa: E402
from .localization import LocalizationDistillation  # noqa: E402
from .mask_queries import MaskQueryHead  # noqa: E402
from .queries import QueryHead  # noqa: E402
from .reader import DetReader as READER  # noqa: E402, N814
from .recipes import (  # noqa: E402
    chen2017,
    combined,
    crosskd,
    fgd,
    fgfi,
    imitation,
    ld,
    mgd,
    pkd,
    rtdetrv4,
    ultralytics,
)
from .registry import RECIPES, TERMS  # noqa: E402
from .rois import BoxHead, MaskHead, RoIHead  # noqa: E402
from .scored import ScoredImitation  # noqa: E402

__all__ = [
    "BCKD",
    "HEADS",
    "KDDETR",
    "READER",
    "RECIPES",
    "TERMS",
    "BoxHead",
    "CrossHead",
    "DenseHead",
    "DistilledDetector",
    "HeadReader",
    "InstanceMasks",
    "LocalizationDistillation",
    "MaskHead",
    "MaskQueryHead",
    "QueryHead",
    "RoIHead",
    "ScoredImitation",
    "chen2017",
    "combined",
    "crosskd",
    "fgd",
    "fgfi",
    "imitation",
    "ld",
    "mgd",
    "pkd",
    "rtdetrv4",
    "ultralytics",
]
