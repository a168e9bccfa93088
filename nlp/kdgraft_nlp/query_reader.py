"""Readers of the classes, boxes and masks of two models that predict by object queries, as aligned pairs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from kdgraft.batch import Batch
from kdgraft.errors import WiringError
from kdgraft.pairs import Compared, Numbers, Pairs, Scores
from kdgraft.taps import Recording
from kdgraft.wiring import Wiring

from .masks import MaskMatching
from .queries import Matched, Queries, QueryMatching
from .tasks import task_of
from .tokens import tokens_of

REGIONS = {"all": "matched queries", "objects": "queries of objects"}


def matching_of(student: nn.Module, teacher: nn.Module, term: str) -> QueryMatching:
    """Return the matching of two models' queries, by boxes or by masks."""
    kind = MaskMatching if task_of(student) == "universal" else QueryMatching
    return kind(student, teacher, term)


class _Queried:
    """Base of the readers of classes and of places of matched queries."""

    averages = False  # each teacher may match queries of its own
    matching: QueryMatching
    choice: Queries

    @property
    def needs_objects(self) -> bool:
        """True for a term that compares with the labels."""
        raise NotImplementedError

    @property
    def queries(self) -> str:
        """The queries that count: ``"all"`` or ``"objects"``."""
        return self.choice if self.choice != "auto" else "objects" if self.needs_objects else "all"

    def count(self, batch: Batch) -> Tensor | None:
        """Return the number of objects, or of images, whose weights add up to 1 each."""
        if self.queries == "objects":
            return self.matching.objects(batch)
        return torch.tensor(float(tokens_of(batch).samples))

    def matched(self, student: Recording, teacher: Recording, batch: Batch) -> Matched:
        """Return the matched queries of a step."""
        match = self.matching.by_objects if self.queries == "objects" else self.matching.by_predictions
        return match(student, teacher, batch)

    def check_objects(self) -> None:
        """Raise a :class:`WiringError` where a term needs the labels of queries that have none."""
        if self.queries == "objects" and not self.matching.knows_objects:
            raise WiringError(
                f"{self.matching.term} compares the queries of objects, which are known for detectors, not for "
                f"{self.matching.student.kind}; use SoftTargets and MatchedMasks, without queries='objects'"
            )
        if self.needs_objects and self.queries == "all":
            raise WiringError(
                f"{self.matching.term} compares with the labels, and queries='all' have none; leave queries out, or set queries='objects'"
            )


class QueryScores(_Queried, Scores):  # type: ignore[misc]
    """The class logits ``(K, C)`` of matched queries; "no object" is the last class of a softmax.

    Args:
        matching: the matching of the two models' queries.
        queries: see :meth:`~kdgraft_nlp.reader.HFReader.scores`.
    """

    no_labels = "add labels ([{class_labels, boxes}, …]) to the batch"
    background = True

    def __init__(self, matching: QueryMatching, queries: Queries) -> None:
        self.matching, self.choice, self.taps = matching, queries, matching.taps
        self.independent = not matching.student.softmax

    @property
    def needs_objects(self) -> bool:
        return self.needs_labels

    def wire(self, wiring: Wiring) -> list[Compared]:
        self.check_objects()
        logits = self.matching.settle(wiring)
        self.width = logits[0].shape[-1]
        return [Compared(*logits, (self.taps[0][0], self.taps[1][0]), REGIONS[self.queries])]

    def pairs(self, student: Recording, teacher: Recording, batch: Batch) -> list[Pairs]:
        found = self.matched(student, teacher, batch)
        return [Pairs(*found.classes, found.weight, labels=found.labels, independent=bool(self.independent))]


class QueryPlaces(_Queried, Numbers):  # type: ignore[misc]
    """The boxes ``(K, 4)`` of matched queries: centre and size, as fractions of the image; or their masks, logits ``(K, P)``.

    Args:
        matching: the matching of the two models' queries.
        queries: see :meth:`~kdgraft_nlp.reader.HFReader.numbers`.
    """

    compares_classes = True  # the matching does
    needs_targets: Any
    takes_masks: bool = False
    """True for a term on masks; of others, none leaves out the padding of their pixels."""

    def __init__(self, matching: QueryMatching, queries: Queries) -> None:
        self.matching, self.choice, self.taps = matching, queries, matching.taps

    @property
    def needs_objects(self) -> bool:
        return bool(self.needs_targets)

    def wire(self, wiring: Wiring) -> list[Compared]:
        self.check_objects()
        if isinstance(self.matching, MaskMatching) and not self.takes_masks:
            raise WiringError(
                f"{self.matching.term} compares numbers, and {self.matching.student.kind} predicts masks; use MatchedMasks"
            )
        self.matching.settle(wiring)
        taps = self.taps[0][1], self.taps[1][1]
        boxes = wiring.student_recording[taps[0]], wiring.teacher_recording[taps[1]]
        return [Compared(*boxes, taps, REGIONS[self.queries])]

    def pairs(self, student: Recording, teacher: Recording, batch: Batch) -> list[Pairs]:
        found = self.matched(student, teacher, batch)
        return [Pairs(*found.places, found.weight, target=found.truth, present=found.present)]
