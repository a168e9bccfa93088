"""Wirings: the models and recordings to which a term is wired in the dry run, and the rows that ``kdgraft check`` prints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import nn

from .sources import Source
from .taps import Recording, Tap


@dataclass
class Wiring:
    """The two models of a term, their recordings of the dry run, and the fields of :class:`Batch` that the host fills.

    The student is the model that learns, the teacher the model that it imitates; in the twin of a term on a peer they swap roles.
    """

    student: nn.Module
    teacher: nn.Module
    student_recording: Recording
    teacher_recording: Recording
    fields: frozenset[str] = frozenset()
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Further facts that the host knows before training, for its own terms."""
    holder: Source | None = None
    """The source of the teacher's recording, for terms that run parts of its model; deep copies share a frozen one."""
    outside: tuple[str, ...] = ()
    """Modules whose maps do not cover the image, such as heads on regions of interest."""

    def in_image(self, tap: Tap) -> bool:
        """Return true if the positions of a tap's maps correspond to places in the image, as regions require."""
        return not any(tap.below(path) for path in self.outside)


class WiringRow(NamedTuple):
    """One line of ``kdgraft check``."""

    term: str
    student_tap: str
    student_shape: str
    adapter: str
    teacher_tap: str
    teacher_shape: str
    region: str
    weight: str
