"""kdgraft: task-specific distillation for detection, segmentation and language models.

The core: losses, taps, adapters, regions, terms, schedules, sources, the engine, plans. It imports torch and accelerate; the host
plugins ``kdgraft_det``, ``kdgraft_seg`` and ``kdgraft_nlp`` build on it.
"""

from .batch import Batch
from .distiller import Distiller, DistillOutput
from .engine import Engine
from .errors import DistillError, UnsafeCheckpoint, WiringError
from .readers import Pairs, Reader, Scores
from .regions import FineGrained, Region
from .registry import LOSSES, RECIPES, REGIONS, SCHEDULES, TERMS, Registry
from .schedules import Constant, Decay, Ramp, Schedule, Step, Stop, WarmUp
from .sources import SOURCES, Ensemble, Itself, Peer, Source, Teacher
from .taps import Recorder, Recording, Tap
from .terms import (
    DIST,
    ChannelWise,
    FeatureImitation,
    FeatureTerm,
    FocalGlobal,
    ForwardKL,
    GeneralizedJSD,
    Hint,
    LogitMatching,
    MapTerm,
    MaskedGeneration,
    PairwiseAffinity,
    PearsonImitation,
    PerImageTerm,
    ReverseKL,
    ScoreTerm,
    SkewedKL,
    SoftTargets,
    TapTerm,
    TemperedTerm,
    Term,
)

__version__ = "0.1.0"

__all__ = [
    "DIST",
    "LOSSES",
    "RECIPES",
    "REGIONS",
    "SCHEDULES",
    "SOURCES",
    "TERMS",
    "Batch",
    "ChannelWise",
    "Constant",
    "Decay",
    "DistillError",
    "DistillOutput",
    "Distiller",
    "Engine",
    "Ensemble",
    "FeatureImitation",
    "FeatureTerm",
    "FineGrained",
    "FocalGlobal",
    "ForwardKL",
    "GeneralizedJSD",
    "Hint",
    "Itself",
    "LogitMatching",
    "MapTerm",
    "MaskedGeneration",
    "Pairs",
    "PairwiseAffinity",
    "PearsonImitation",
    "Peer",
    "PerImageTerm",
    "Ramp",
    "Reader",
    "Recorder",
    "Recording",
    "Region",
    "Registry",
    "ReverseKL",
    "Schedule",
    "ScoreTerm",
    "Scores",
    "SkewedKL",
    "SoftTargets",
    "Source",
    "Step",
    "Stop",
    "Tap",
    "TapTerm",
    "Teacher",
    "TemperedTerm",
    "Term",
    "UnsafeCheckpoint",
    "WarmUp",
    "WiringError",
]
