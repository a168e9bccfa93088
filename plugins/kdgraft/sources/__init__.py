"""Sources of supervision: a frozen teacher, an ensemble, specialists, a peer that trains too, the student itself."""

from ..registry import SOURCES
from .base import STUDENT, Source
from .cached import Cached
from .ensemble import Ensemble, EnsembleRecording, combined
from .gather import gather_sources, students_in, with_parts, with_students
from .itself import Itself
from .peer import Peer, Peers
from .specialists import Specialists
from .teacher import Teacher

__all__ = [
    "SOURCES",
    "STUDENT",
    "Cached",
    "Ensemble",
    "EnsembleRecording",
    "Itself",
    "Peer",
    "Peers",
    "Source",
    "Specialists",
    "Teacher",
    "combined",
    "gather_sources",
    "students_in",
    "with_parts",
    "with_students",
]
