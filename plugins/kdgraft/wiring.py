"""Wirings: what a term is wired to in the dry run, and how ``kdgraft check`` tells it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import nn

from .sources import Source
from .taps import Recording, Tap


@dataclass
class Wiring:
    """What a term is wired to: both models, what the dry run recorded, and which :class:`Batch` fields the host fills.

    The student is whoever listens, the teacher whoever is listened to.
    """

    student: nn.Module
    teacher: nn.Module
    student_recording: Recording
    teacher_recording: Recording
    fields: frozenset[str] = frozenset()
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What else the host knows before training that its own terms ask for."""
    holder: Source | None = None
    """The source of the teacher's recording, for terms that run parts of its model: deep copies share a frozen one."""
    outside: tuple[str, ...] = ()
    """Modules whose maps are no pictures of the image (heads on regions of interest)."""

    def in_image(self, tap: Tap) -> bool:
        """Whether the positions of what a tap reads lie in the image, so that a region can place them."""
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
