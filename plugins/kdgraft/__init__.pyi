from .batch import Batch
from .distiller import Distiller, DistillOutput
from .engine import Engine
from .errors import DistillError, UnsafeCheckpoint, WiringError
from .inheriting import inherit
from .netaug import NetAug
from .pairs import Numbers, Pairs, Predictions, Scores
from .readers import Reader
from .recorder import Recorder
from .regions import FineGrained, Region
from .registry import LOSSES, RECIPES, REGIONS, SCHEDULES, SOURCES, TERMS, Registry
from .schedules import Constant, Decay, Ramp, Schedule, Step, Stop, WarmUp
from .sources import Ensemble, FeatureTeacher, Itself, Peer, Peers, Source, Specialists, Teacher
from .taps import Recording, Tap
from .terms.adversarial import AdversarialScores, AdversarialTerm
from .terms.base import TapTerm, Term
from .terms.born_again import CWTM, DKPP
from .terms.boundary import BoundarySamples
from .terms.byot import BYOT
from .terms.classifiers import ClassifierTerm
from .terms.contrastive import CRD
from .terms.divergences import ForwardKL, GeneralizedJSD, ReverseKL, SkewedKL
from .terms.features import ActivationBoundaries, ChannelWise, FeatureImitation, FeatureTerm, Hint, PearsonImitation
from .terms.generation import FocalGlobal, MaskedGeneration, PerImageTerm
from .terms.generators import AdversarialImages, Reconstruction
from .terms.gradients import GradientTransfer
from .terms.labelled import DKD, NKD
from .terms.numbers import BoundedRegression
from .terms.one import ONE
from .terms.pairs import PairTerm, ScoreTerm, TemperedTerm
from .terms.predictions import DIST, LogitMatching, SoftTargets
from .terms.pretrained import FactorTransfer, PretrainedTerm
from .terms.relations import AttentionTransfer, MapTerm, PairwiseAffinity
from .terms.review import Review
from .terms.samples import PKT, RKD, CorrelationCongruence, SampleTerm, SimilarityPreserving
from .terms.share import TaskShare
from .terms.statistics import FSP, NST, FeatureMMD
from .terms.tokens import FreeKD, MasKD
from .terms.vectors import MarginMSE, SampleEmbeddings, VectorTerm
from .terms.weights import WeightMatching
from .views import Views

__version__: str

__all__ = [
    "BYOT",
    "CRD",
    "CWTM",
    "DIST",
    "DKD",
    "DKPP",
    "FSP",
    "LOSSES",
    "NKD",
    "NST",
    "ONE",
    "PKT",
    "RECIPES",
    "REGIONS",
    "RKD",
    "SCHEDULES",
    "SOURCES",
    "TERMS",
    "ActivationBoundaries",
    "AdversarialImages",
    "AdversarialScores",
    "AdversarialTerm",
    "AttentionTransfer",
    "Batch",
    "BoundarySamples",
    "BoundedRegression",
    "ChannelWise",
    "ClassifierTerm",
    "Constant",
    "CorrelationCongruence",
    "Decay",
    "DistillError",
    "DistillOutput",
    "Distiller",
    "Engine",
    "Ensemble",
    "FactorTransfer",
    "FeatureImitation",
    "FeatureMMD",
    "FeatureTeacher",
    "FeatureTerm",
    "FineGrained",
    "FocalGlobal",
    "ForwardKL",
    "FreeKD",
    "GeneralizedJSD",
    "GradientTransfer",
    "Hint",
    "Itself",
    "LogitMatching",
    "MapTerm",
    "MarginMSE",
    "MasKD",
    "MaskedGeneration",
    "NetAug",
    "Numbers",
    "PairTerm",
    "Pairs",
    "PairwiseAffinity",
    "PearsonImitation",
    "Peer",
    "Peers",
    "PerImageTerm",
    "Predictions",
    "PretrainedTerm",
    "Ramp",
    "Reader",
    "Reconstruction",
    "Recorder",
    "Recording",
    "Region",
    "Registry",
    "ReverseKL",
    "Review",
    "SampleEmbeddings",
    "SampleTerm",
    "Schedule",
    "ScoreTerm",
    "Scores",
    "SimilarityPreserving",
    "SkewedKL",
    "SoftTargets",
    "Source",
    "Specialists",
    "Step",
    "Stop",
    "Tap",
    "TapTerm",
    "TaskShare",
    "Teacher",
    "TemperedTerm",
    "Term",
    "UnsafeCheckpoint",
    "VectorTerm",
    "Views",
    "WarmUp",
    "WeightMatching",
    "WiringError",
    "inherit",
]
