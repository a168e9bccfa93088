from .distiller import Distiller, DistillOutput
from .engine import Engine
from .errors import DistillError, UnsafeCheckpoint, WiringError
from .fine_grained import FineGrained
from .generation import MaskedGeneration
from .regions import Batch, Region
from .registry import LOSSES, RECIPES, REGIONS, SCHEDULES, SOURCES, TERMS, Registry
from .schedules import Constant, Decay, Ramp, Schedule, Step, Stop, WarmUp
from .sources import Ensemble, Itself, Peer, Source, Teacher
from .taps import Recorder, Recording, Tap
from .terms import FeatureImitation, Hint, LogitMatching, SoftTargets, Term

__version__: str

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
