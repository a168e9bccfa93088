"""kdgraft: task-specific distillation for detection, segmentation and language models.

The core: losses, taps, adapters, regions, terms, schedules, sources, the engine, plans. It imports torch and accelerate; the host
plugins ``kdgraft_det``, ``kdgraft_seg`` and ``kdgraft_nlp`` build on it.
"""

from .distiller import Distiller, DistillOutput
from .engine import Engine
from .errors import DistillError, UnsafeCheckpoint, WiringError
from .fine_grained import FineGrained
from .generation import MaskedGeneration
from .regions import Batch, Region
from .registry import LOSSES, RECIPES, REGIONS, SCHEDULES, TERMS, Registry
from .schedules import Constant, Decay, Ramp, Schedule, Step, Stop, WarmUp
from .sources import SOURCES, Ensemble, Itself, Peer, Source, Teacher
from .taps import Recorder, Recording, Tap
from .terms import FeatureImitation, Hint, LogitMatching, SoftTargets, Term

__version__ = "0.1.0"

__all__ = [
    "LOSSES",
    "RECIPES",
    "REGIONS",
    "SCHEDULES",
    "SOURCES",
    "TERMS",
    "Batch",
    "Constant",
    "Decay",
    "DistillError",
    "DistillOutput",
    "Distiller",
    "Engine",
    "Ensemble",
    "FeatureImitation",
    "FineGrained",
    "Hint",
    "Itself",
    "LogitMatching",
    "MaskedGeneration",
    "Peer",
    "Ramp",
    "Recorder",
    "Recording",
    "Region",
    "Registry",
    "Schedule",
    "SoftTargets",
    "Source",
    "Step",
    "Stop",
    "Tap",
    "Teacher",
    "Term",
    "UnsafeCheckpoint",
    "WarmUp",
    "WiringError",
]
