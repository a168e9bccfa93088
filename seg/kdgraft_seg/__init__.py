"""Distillation for MMSegmentation: ``custom_imports = dict(imports=['kdgraft_seg'])`` and ``model.type='DistilledSegmentor'``."""

from kdgraft.hosts import require

require("mmseg", "kdgraft_seg")
import kdgraft_mm  # noqa: E402, F401

from .adversarial import AdversarialMask  # noqa: E402
from .reader import SegReader as READER  # noqa: E402, N814
from .recipes import cirkd, cwd, ifvd, maskd, skd  # noqa: E402
from .registry import RECIPES, TERMS  # noqa: E402
from .relations import ClassPrototypes, CrossImageRelations  # noqa: E402
from .segmentor import DistilledSegmentor  # noqa: E402

__all__ = [
    "READER",
    "RECIPES",
    "TERMS",
    "AdversarialMask",
    "ClassPrototypes",
    "CrossImageRelations",
    "DistilledSegmentor",
    "cirkd",
    "cwd",
    "ifvd",
    "maskd",
    "skd",
]
