"""Knowledge distillation for Hugging Face: subclass the Trainer, or wrap a trainer that you already have."""

from kdgraft.hosts import require

require("transformers", "kdgraft_nlp")

from kdgraft import DIST, ForwardKL, GeneralizedJSD, LogitMatching, ReverseKL, SkewedKL, SoftTargets  # noqa: E402

from .attention_terms import AttentionMaps, Relations  # noqa: E402
from .cache import TeacherCache  # noqa: E402
from .class_teachers import SoftLabels  # noqa: E402
from .collator import DistillCollator  # noqa: E402
from .dual_space import DSKD  # noqa: E402
from .filling import fill_store  # noqa: E402
from .initialisation import init_from_teacher  # noqa: E402
from .label_words import LabelWords  # noqa: E402
from .logits import GOLD, UniversalLogits  # noqa: E402
from .minillm import MiniLLM  # noqa: E402
from .on_policy import OnPolicy  # noqa: E402
from .query_terms import MatchedBoxes, MatchedMasks  # noqa: E402
from .recipes import distilbert, gkd, minilm, minilmv2, mobilebert, pkd, tinybert  # noqa: E402
from .registry import RECIPES, SOURCES, TERMS  # noqa: E402
from .served import Served  # noqa: E402
from .state_terms import Embeddings, HiddenStates, PatientStates  # noqa: E402
from .stored import Stored  # noqa: E402
from .student import undistill  # noqa: E402
from .trainer import DistillTrainer, distill  # noqa: E402

__all__ = [
    "DIST",
    "DSKD",
    "GOLD",
    "RECIPES",
    "SOURCES",
    "TERMS",
    "AttentionMaps",
    "DistillCollator",
    "DistillTrainer",
    "Embeddings",
    "ForwardKL",
    "GeneralizedJSD",
    "HiddenStates",
    "LabelWords",
    "LogitMatching",
    "MatchedBoxes",
    "MatchedMasks",
    "MiniLLM",
    "OnPolicy",
    "PatientStates",
    "Relations",
    "ReverseKL",
    "Served",
    "SkewedKL",
    "SoftLabels",
    "SoftTargets",
    "Stored",
    "TeacherCache",
    "UniversalLogits",
    "distilbert",
    "distill",
    "fill_store",
    "gkd",
    "init_from_teacher",
    "minilm",
    "minilmv2",
    "mobilebert",
    "pkd",
    "tinybert",
    "undistill",
]
