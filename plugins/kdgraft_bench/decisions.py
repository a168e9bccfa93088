"""A model's decisions on the tested items, and the figures that follow from them: calibration, agreement, confusion."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kdgraft.errors import DistillError
from kdgraft.files import written_whole

BINS = 15
"""The bins of the calibration error, as in Guo et al. (2017), 1706.04599."""


@dataclass(frozen=True)
class Decisions:
    """The class that a model gives to each of N items: sentences, tokens, pixels, or a detector's annotated objects.

    Attributes:
        names: the names of the classes.
        label: the true class of each item, ``(N,)``.
        predicted: the model's class, ``(N,)``; ``len(names)`` for an object that a detector misses.
        confidence: the probability or score that the model gives to a prediction, ``(M,)``; M is N, but for a detector the number of
            its detections.
        right: true where that prediction is right, ``(M,)``.
        sample: the tested sample of which each item is a part, ``(N,)``.
    """

    names: tuple[str, ...]
    label: np.ndarray
    predicted: np.ndarray
    confidence: np.ndarray
    right: np.ndarray
    sample: np.ndarray

    @classmethod
    def of(
        cls, names: Sequence[str], label: np.ndarray, predicted: np.ndarray, confidence: np.ndarray, sample: np.ndarray
    ) -> Decisions:
        """Return the decisions of a classifier, whose items are its predictions."""
        return cls(tuple(names), label, predicted, confidence, label == predicted, sample)

    def write(self, path: Path) -> None:
        """Write them to an ``.npz`` file."""
        small = np.int16 if len(self.names) < np.iinfo(np.int16).max else np.int32
        with written_whole(path) as part, part.open("wb") as file:
            np.savez_compressed(
                file,
                names=np.array(self.names),
                label=self.label.astype(small),
                predicted=self.predicted.astype(small),
                confidence=self.confidence.astype(np.float32),
                right=self.right,
                sample=self.sample.astype(np.int32),
            )

    @classmethod
    def read(cls, path: Path) -> Decisions:
        """Read a file of :meth:`write`."""
        try:
            with np.load(path, allow_pickle=False) as found:
                label, predicted, sample = (found[key].astype(np.int64) for key in ("label", "predicted", "sample"))
                names = tuple(map(str, found["names"]))
                return cls(names, label, predicted, found["confidence"].astype(np.float64), found["right"], sample)
        except (OSError, ValueError, KeyError) as error:
            raise DistillError(f"cannot read {path}: {error}") from None


def calibration_error(confidence: np.ndarray, right: np.ndarray) -> float:
    """Return the expected calibration error: |confidence − share that is right|, averaged over 15 equal bins by their counts.

    Args:
        confidence: in [0, 1], ``(M,)``.
        right: ``(M,)``.

    Returns:
        A number in [0, 1]; NaN without predictions.
    """
    if not len(confidence):
        return float("nan")
    place = np.minimum((confidence * BINS).astype(int), BINS - 1)
    sums = np.bincount(place, weights=confidence - right, minlength=BINS)
    return float(np.abs(sums).sum() / len(confidence))


def same_items(one: Decisions, other: Decisions) -> bool:
    """Return true if two models were tested on the same items, as far as these tell; other tokens of a text are other items."""
    return len(one.label) == len(other.label) and bool((one.label == other.label).all())


def agreement(one: Decisions, other: Decisions) -> float:
    """Return the share of the items on which two models decide alike.

    Raises:
        DistillError: these are not the same items.
    """
    if not same_items(one, other):
        raise DistillError("the two models were tested on different items; test both on one set")
    return float((one.predicted == other.predicted).mean()) if len(one.label) else float("nan")


def telling(teacher: Decisions, plain: Decisions, best: Decisions, count: int) -> list[int]:
    """Return the samples in which the decisions of the three models differ most, the most telling one first.

    An item counts where the distilled student decides otherwise than the plain one, and twice where the teacher agrees with it.
    """
    changed = plain.predicted != best.predicted
    weight = changed * (1.0 + (best.predicted == teacher.predicted))
    sums = np.bincount(plain.sample, weights=weight)
    return [int(place) for place in np.argsort(-sums, kind="stable")[:count]]


def confusion(decisions: Decisions, classes: Sequence[int]) -> np.ndarray:
    """Return the shares of each class's items that are taken for each of the classes, and for any other.

    Returns:
        ``(C, C + 1)``; every row sums to 1, or is NaN where the class has no item.
    """
    column = np.full(len(decisions.names) + 1, len(classes))
    column[list(classes)] = np.arange(len(classes))
    rows = [
        np.bincount(column[decisions.predicted[decisions.label == one]], minlength=len(classes) + 1) for one in classes
    ]
    counts = np.stack(rows).astype(np.float64)
    with np.errstate(invalid="ignore"):
        return counts / counts.sum(1, keepdims=True)


def recalls(decisions: Decisions) -> np.ndarray:
    """Return the share of each class's items that are given to it, ``(C,)``; NaN where a class has no item."""
    total = np.bincount(decisions.label, minlength=len(decisions.names)).astype(np.float64)
    right = np.bincount(decisions.label[decisions.label == decisions.predicted], minlength=len(decisions.names))
    with np.errstate(invalid="ignore"):
        return right / total
