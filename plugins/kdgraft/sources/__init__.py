"""Sources of supervision: a frozen teacher, an ensemble, a peer that trains too, the student itself."""

from ..registry import SOURCES
from .base import STUDENT, Source
from .cached import Cached
from .ensemble import Ensemble, EnsembleRecording, combined
from .gather import gather_sources
from .itself import Itself
from .peer import Peer
from .teacher import Teacher

__all__ = [
    "SOURCES",
    "STUDENT",
    "Cached",
    "Ensemble",
    "EnsembleRecording",
    "Itself",
    "Peer",
    "Source",
    "Teacher",
    "combined",
    "gather_sources",
]
