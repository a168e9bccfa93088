"""Metrics of an evaluation: of classes, of labels, of numbers and of tagged words.

They are computed here because scikit-learn and seqeval, which depends on it, would be the largest requirements of training.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np


def metrics_of(task: str, names: Sequence[str] | None) -> Callable[[Any], dict[str, float]] | None:
    """Return the function that computes the metrics of a Trainer's evaluation; ``None`` for language models, which have the loss."""
    if task == "classification":
        return lambda found: class_scores(_outputs(found).argmax(-1), found.label_ids, len(names or []))
    if task == "multiple_choice":
        return lambda found: {"accuracy": float((_outputs(found).argmax(-1) == found.label_ids).mean())}
    if task == "multi_label":
        return lambda found: label_scores(_outputs(found) > 0, found.label_ids > 0)
    if task == "regression":
        return lambda found: number_scores(_outputs(found), found.label_ids)
    if task == "tokens":
        return lambda found: tag_scores(_outputs(found).argmax(-1), found.label_ids, names or [])
    return None


def _outputs(found: Any) -> Any:
    """Return the logits; hidden states follow them where the student's config asks for these."""
    return found.predictions[0] if isinstance(found.predictions, tuple) else found.predictions


def scores(predicted: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Return accuracy and macro-F1, the mean F1 of all classes among the labels or the predictions."""
    classes, found = np.unique(np.stack([labels, predicted]), return_inverse=True)
    truth, ours = (np.eye(len(classes), dtype=bool)[row] for row in found.reshape(2, -1))
    f1 = 2 * (truth & ours).sum(0) / (truth.sum(0) + ours.sum(0))
    return {"accuracy": float((labels == predicted).mean()), "macro_f1": float(f1.mean())}


def class_scores(predicted: np.ndarray, labels: np.ndarray, classes: int) -> dict[str, float]:
    """Return :func:`scores`, Matthews' correlation and, of two classes, the F1 of the second one, which GLUE reports."""
    found = {**scores(predicted, labels), "matthews_correlation": matthews(predicted, labels)}
    return {**found, "f1": _f1(predicted == 1, labels == 1)} if classes == 2 else found


def matthews(predicted: np.ndarray, labels: np.ndarray) -> float:
    """Return Matthews' correlation of any number of classes (Gorodkin 2004); 0 where all are predicted, or labelled, alike."""
    classes = np.unique(np.stack([labels, predicted]))
    truth, ours = ((values[:, None] == classes).astype(float) for values in (labels, predicted))
    return _correlation(_centred(truth), _centred(ours))


def label_scores(predicted: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Return the F1 of all decisions, and the mean F1 of the classes; that of a class in neither argument is 0.

    Args:
        predicted, labels: ``(samples, classes)``, boolean.
    """
    each = [_f1(ours, truth) for ours, truth in zip(predicted.T, labels.T, strict=True)]
    return {"micro_f1": _f1(predicted, labels), "macro_f1": float(np.mean(each))}


def _f1(predicted: np.ndarray, truth: np.ndarray) -> float:
    return 2 * float((predicted & truth).sum()) / max(int(predicted.sum() + truth.sum()), 1)


def number_scores(predicted: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Return the mean squared error, and Pearson's and Spearman's correlation; the correlation of constants is 0."""
    predicted, truth = predicted.reshape(-1).astype(float), truth.reshape(-1).astype(float)
    return {
        "mse": float(((predicted - truth) ** 2).mean()),
        "pearson": _correlation(_centred(predicted), _centred(truth)),
        "spearman": _correlation(_centred(_ranks(predicted)), _centred(_ranks(truth))),
    }


def _correlation(first: np.ndarray, second: np.ndarray) -> float:
    """Return the correlation of two centred arrays; 0 where one is constant."""
    size = float(np.sqrt((first**2).sum() * (second**2).sum()))
    return float((first * second).sum()) / size if size else 0.0


def _centred(values: np.ndarray) -> np.ndarray:
    """Return values without their mean, exactly 0 where all are equal."""
    moved = values - values[0]
    return moved - moved.mean(0)


def _ranks(values: np.ndarray) -> np.ndarray:
    """Return the rank of each value, and the mean of their ranks for equal ones."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return (ends - (counts - 1) / 2)[place]


def tag_scores(predicted: np.ndarray, labels: np.ndarray, names: Sequence[str]) -> dict[str, float]:
    """Return the accuracy of tags, and the F1 of complete spans in BIO tags (micro-averaged, as conlleval computes it)."""
    found = truly = right = correct = total = 0
    for row, truth in zip(predicted, labels, strict=True):
        kept = truth != -100
        ours, theirs = ([names[i] for i in values[kept]] for values in (row, truth))
        correct += sum(a == b for a, b in zip(ours, theirs, strict=True))
        total += len(theirs)
        mine, real = spans(ours), spans(theirs)
        found, truly, right = found + len(mine), truly + len(real), right + len(mine & real)
    return {"accuracy": correct / max(total, 1), "span_f1": 2 * right / max(found + truly, 1)}


def spans(tags: Sequence[str]) -> set[tuple[str, int, int]]:
    """Return (type, first word, one past the last word) of each span in BIO tags; an I without a span before it starts one."""
    result, start, kind = set(), 0, ""
    for place, tag in enumerate([*tags, "O"]):
        prefix, _, name = tag.partition("-")
        if kind and (prefix != "I" or name != kind):
            result.add((kind, start, place))
            kind = ""
        if prefix in ("B", "I") and not kind:
            start, kind = place, name
    return result
