"""Readers of the classes and boxes of two detectors by object queries, as aligned pairs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kdgraft.batch import Batch
from kdgraft.errors import WiringError
from kdgraft.pairs import Compared, Numbers, Pairs, Scores
from kdgraft.taps import Recording
from kdgraft.wiring import Wiring

from .queries import Matched, Queries, QueryMatching
from .tokens import tokens_of

REGIONS = {"all": "matched queries", "objects": "queries of objects"}


class _Queried:
    """What classes and boxes of matched queries have in common."""

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


class QueryBoxes(_Queried, Numbers):  # type: ignore[misc]
    """The boxes ``(K, 4)`` of matched queries: centre and size, as fractions of the image.

    Args:
        matching: the matching of the two models' queries.
        queries: see :meth:`~kdgraft_nlp.reader.HFReader.numbers`.
    """

    compares_classes = True  # the matching does
    needs_targets: Any

    def __init__(self, matching: QueryMatching, queries: Queries) -> None:
        self.matching, self.choice, self.taps = matching, queries, matching.taps

    @property
    def needs_objects(self) -> bool:
        return bool(self.needs_targets)

    def wire(self, wiring: Wiring) -> list[Compared]:
        self.check_objects()
        self.matching.settle(wiring)
        taps = self.taps[0][1], self.taps[1][1]
        boxes = wiring.student_recording[taps[0]], wiring.teacher_recording[taps[1]]
        return [Compared(*boxes, taps, REGIONS[self.queries])]

    def pairs(self, student: Recording, teacher: Recording, batch: Batch) -> list[Pairs]:
        found = self.matched(student, teacher, batch)
        return [Pairs(*found.places, found.weight, target=found.truth)]
