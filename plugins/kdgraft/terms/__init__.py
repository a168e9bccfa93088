"""Terms: each combines a name, a source, taps or a reader, an adapter, a region, a loss and a weight schedule.

The terms themselves are public names of :mod:`kdgraft`; this package exports the bases that other packages extend.
"""

from . import (
    adversarial,
    born_again,
    boundary,
    byot,
    classifiers,
    contrastive,
    divergences,
    features,
    generation,
    generators,
    gradients,
    labelled,
    numbers,
    one,
    predictions,
    pretrained,
    relations,
    review,
    samples,
    share,
    statistics,
    tokens,
    vectors,
    weights,
)
from .adversarial import AdversarialTerm
from .base import TapTerm, Term, build_terms, check_choice, mean_of, sum_of
from .classifiers import ClassifierTerm
from .features import FeatureTerm
from .generation import PerImageTerm
from .numbers import MaskTerm
from .pairs import PairTerm, ScoreTerm, TemperedTerm
from .pretrained import PretrainedTerm
from .relations import MapTerm
from .samples import SampleTerm
from .vectors import VectorTerm

__all__ = [
    "AdversarialTerm",
    "ClassifierTerm",
    "FeatureTerm",
    "MapTerm",
    "MaskTerm",
    "PairTerm",
    "PerImageTerm",
    "PretrainedTerm",
    "SampleTerm",
    "ScoreTerm",
    "TapTerm",
    "TemperedTerm",
    "Term",
    "VectorTerm",
    "adversarial",
    "born_again",
    "boundary",
    "build_terms",
    "byot",
    "check_choice",
    "classifiers",
    "contrastive",
    "divergences",
    "features",
    "generation",
    "generators",
    "gradients",
    "labelled",
    "mean_of",
    "numbers",
    "one",
    "predictions",
    "pretrained",
    "relations",
    "review",
    "samples",
    "share",
    "statistics",
    "sum_of",
    "tokens",
    "vectors",
    "weights",
]
