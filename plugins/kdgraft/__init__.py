"""kdgraft: task-specific distillation for detection, segmentation and language models.

The core: losses, taps, adapters, regions, terms, schedules, teacher, distiller. It imports torch alone; the host plugins
``kdgraft_det``, ``kdgraft_seg`` and ``kdgraft_nlp`` build on it.
"""

from .distiller import Distiller, DistillOutput, HostDistiller
from .errors import DistillError, UnsafeCheckpoint, WiringError
from .fine_grained import FineGrained
from .generation import MaskedGeneration
from .regions import Batch, Region
from .registry import LOSSES, RECIPES, REGIONS, SCHEDULES, TERMS, Registry
from .schedules import Constant, Decay, Ramp, Schedule, Step, Stop, WarmUp
from .taps import Recorder, Recording, Tap
from .teacher import Teacher
from .terms import FeatureImitation, Hint, LogitMatching, SoftTargets, Term

__version__ = "0.1.0"

__all__ = [
    "LOSSES",
    "RECIPES",
    "REGIONS",
    "SCHEDULES",
    "TERMS",
    "Batch",
    "Constant",
    "Decay",
    "DistillError",
    "DistillOutput",
    "Distiller",
    "FeatureImitation",
    "FineGrained",
    "Hint",
    "HostDistiller",
    "LogitMatching",
    "MaskedGeneration",
    "Ramp",
    "Recorder",
    "Recording",
    "Region",
    "Registry",
    "Schedule",
    "SoftTargets",
    "Step",
    "Stop",
    "Tap",
    "Teacher",
    "Term",
    "UnsafeCheckpoint",
    "WarmUp",
    "WiringError",
]
