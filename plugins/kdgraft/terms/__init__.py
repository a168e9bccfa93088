"""Terms: what is compared. A term is a name, a source, taps or a reader, an adapter, a region, a loss and a weight schedule."""

from .base import TapTerm, Term, Wiring, WiringRow, build_terms, check_choice, mean_of, sum_of
from .features import ChannelWise, FeatureImitation, FeatureTerm, Hint, PearsonImitation
from .generation import FocalGlobal, MaskedGeneration, PerImageTerm
from .predictions import (
    DIST,
    ForwardKL,
    GeneralizedJSD,
    LogitMatching,
    ReverseKL,
    ScoreTerm,
    SkewedKL,
    SoftTargets,
    TemperedTerm,
)
from .relations import MapTerm, PairwiseAffinity

__all__ = [
    "DIST",
    "ChannelWise",
    "FeatureImitation",
    "FeatureTerm",
    "FocalGlobal",
    "ForwardKL",
    "GeneralizedJSD",
    "Hint",
    "LogitMatching",
    "MapTerm",
    "MaskedGeneration",
    "PairwiseAffinity",
    "PearsonImitation",
    "PerImageTerm",
    "ReverseKL",
    "ScoreTerm",
    "SkewedKL",
    "SoftTargets",
    "TapTerm",
    "TemperedTerm",
    "Term",
    "Wiring",
    "WiringRow",
    "build_terms",
    "check_choice",
    "mean_of",
    "sum_of",
]
