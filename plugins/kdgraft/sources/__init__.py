"""Sources of supervision: a frozen teacher, an ensemble, specialists, a peer that trains too, the student itself."""

from ..registry import SOURCES
from .base import STUDENT, Source
from .cached import Cached, KnownRecording
from .ensemble import Ensemble, EnsembleRecording, combined
from .features import Extractor, FeatureTeacher
from .gather import gather_sources, students_in, with_parts, with_students
from .itself import Itself
from .libraries import LIBRARIES, library_teacher
from .peer import Peer, Peers
from .specialists import Specialists
from .teacher import Teacher

__all__ = [
    "LIBRARIES",
    "SOURCES",
    "STUDENT",
    "Cached",
    "Ensemble",
    "EnsembleRecording",
    "Extractor",
    "FeatureTeacher",
    "Itself",
    "KnownRecording",
    "Peer",
    "Peers",
    "Source",
    "Specialists",
    "Teacher",
    "combined",
    "gather_sources",
    "library_teacher",
    "students_in",
    "with_parts",
    "with_students",
]
