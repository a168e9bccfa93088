"""A generalist and its specialists as one source: the distribution that agrees best with all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ..classes import class_axis
from ..errors import DistillError, WiringError
from ..registry import SOURCES
from ..specialists import check_classes, combine_specialists
from ..taps import Recording
from .ensemble import Ensemble, EnsembleRecording, Kind


@SOURCES.register
class Specialists(Ensemble):
    """A generalist together with specialists for classes that it confuses (Hinton et al. 2015, arXiv 1503.02531, section 5).

    For each item those specialists are heard that know the class which the generalist finds most probable. The student learns
    from the distribution over all classes that is closest to generalist and specialists, see
    :func:`kdgraft.specialists.combine_specialists`; :mod:`kdgraft.specialists` also has what builds and trains specialists. Only
    terms on scores of exclusive classes can use it.

    Args:
        generalist: the name of the source that scores all classes.
        specialists: the classes of each specialist by the name of its source, in the student's order of classes. A specialist scores
            these, in this order, and the dustbin class of all others last.

    Example:
        >>> from kdgraft.specialists import specialist_of
        >>> animals = specialist_of(teacher, [1, 3])
        >>> sources = dict(all=teacher, animals=animals, both=Specialists("all", dict(animals=[1, 3])))
        >>> distiller = Distiller(student, terms=[SoftTargets(source="both")], teachers=sources, example=images)
        >>> list(distiller(images).losses)
        ['distill.soft_targets.loss']
    """

    alike = "a specialist scores its own classes and, last, the dustbin class of all others"

    def __init__(self, generalist: str, specialists: Mapping[str, Sequence[int]]) -> None:
        if not isinstance(generalist, str) or not isinstance(specialists, Mapping) or not specialists:
            raise DistillError(
                "Specialists: give the name of the generalist, and the classes of each specialist by the name of its source, "
                f"such as dict(a=[0, 3]); got {generalist!r} and {specialists!r}"
            )
        if generalist in specialists:
            raise DistillError(f"Specialists: {generalist!r} is the generalist and cannot be a specialist, too")
        super().__init__([generalist, *specialists])
        self.classes = {name: check_classes("Specialists", own) for name, own in specialists.items()}

    @property
    def told(self) -> str:
        generalist, *others = self.members
        return f"{generalist} with the specialists {', '.join(others)}"

    def shape_of(self, member: str, first: tuple[int, ...]) -> tuple[int, ...]:
        if member not in self.classes:
            return first
        axis = class_axis(len(first))
        own = check_classes(f"Specialists, {member!r}", self.classes[member], first[axis])
        shape = list(first)
        shape[axis] = len(own) + 1
        return tuple(shape)

    def check_features(self, term: str) -> None:
        raise WiringError(
            f"{term}: Specialists give predictions, which this term does not compare; use source={self.members[0]!r}"
        )

    def check(self, term: str, reader: Any, predictions: Any) -> None:
        if reader.no_specialists:
            raise WiringError(f"{term}: {self.name!r} is Specialists: {reader.no_specialists}")
        if not getattr(predictions, "compares_classes", False):
            raise WiringError(
                f"{term}: Specialists score classes, which this term does not compare; use source={self.members[0]!r}"
            )
        if getattr(predictions, "independent", False) is not False:
            raise WiringError(
                f"{term}: Specialists need exclusive classes, of which one is the dustbin, and these are scored each on its own; "
                f"use source={self.members[0]!r}"
            )

    def of(self, recordings: Sequence[Recording]) -> EnsembleRecording:
        for recording in recordings[1:]:
            if recording.class_order is not None:
                raise DistillError(
                    f"{self.name!r}: the order of the classes of {recording.model!r} must be that of the Specialists, and was changed "
                    "by their names; leave the names of a specialist's classes out"
                )
        return super().of(recordings)

    def average(self, values: Sequence[Tensor], kind: Kind, dim: int = -1) -> Tensor:
        if kind != "softmax":
            raise DistillError(f"{self.name!r}: Specialists need exclusive classes; use source={self.members[0]!r}")
        return combine_specialists(values[0], values[1:], list(self.classes.values()), dim)
