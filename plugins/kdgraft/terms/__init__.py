"""Terms: each combines a name, a source, taps or a reader, an adapter, a region, a loss and a weight schedule.

The terms themselves are public names of :mod:`kdgraft`; this package exports the bases that other packages extend.
"""

from . import divergences, features, generation, predictions, pretrained, relations, review, statistics
from .base import TapTerm, Term, build_terms, check_choice, mean_of, sum_of
from .features import FeatureTerm
from .generation import PerImageTerm
from .predictions import ScoreTerm, TemperedTerm
from .pretrained import PretrainedTerm
from .relations import MapTerm

__all__ = [
    "FeatureTerm",
    "MapTerm",
    "PerImageTerm",
    "PretrainedTerm",
    "ScoreTerm",
    "TapTerm",
    "TemperedTerm",
    "Term",
    "build_terms",
    "check_choice",
    "divergences",
    "features",
    "generation",
    "mean_of",
    "predictions",
    "pretrained",
    "relations",
    "review",
    "statistics",
    "sum_of",
]
