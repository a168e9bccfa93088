"""The layout of predictions (per sample, token or pixel) and their kind: one of several classes, or independent classes."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kdgraft.adapters import resize_to
from kdgraft.errors import DistillError, WiringError
from kdgraft.pairs import Pairs

from .tasks import PER_SAMPLE, PER_TOKEN

MULTI_LABEL = "multi_label_classification"
REGRESSION = "regression"

_LAYOUTS = {2: "(samples, classes)", 3: "(samples, tokens, classes)", 4: "(samples, classes, height, width)"}


def check_layout(name: str, task: str, student: nn.Module, logits: Tensor) -> None:
    """Refuse logits whose class axis is not known.

    Args:
        name: the name of the term, for messages.
        task: the student's task; see :func:`~kdgraft_nlp.tasks.task_of`.
        student: the student.
        logits: the student's logits in the dry run.

    Raises:
        WiringError: the kind of model is unknown and not a classifier of samples, or the logits do not have its kind's shape.
    """
    if task == "question":
        return
    expected = 3 if task in PER_TOKEN else 4 if task == "segmentation" else 2
    if logits.ndim == expected:
        return
    problem = "have no known class axis, as this kind of model is unknown"
    if task in (*PER_SAMPLE, *PER_TOKEN, "segmentation"):
        problem = f"must be {_LAYOUTS[expected]}"
    raise WiringError(
        f"{name}: the logits {tuple(logits.shape)} of {type(student).__name__} {problem}; use terms on layers, or FeatureImitation "
        "with taps of your own"
    )


def same_classes(name: str, student: int, teacher: int) -> None:
    """Raise a :class:`WiringError` unless both models score the same number of classes."""
    if student != teacher:
        raise WiringError(f"{name}: student and teacher have {student} and {teacher} classes; they must have the same")


class ProblemTypes(NamedTuple):
    """The ``problem_type`` in each model's config, or ``None``."""

    student: str | None = None
    teacher: str | None = None

    @property
    def named(self) -> str | None:
        """The problem type of the student, or else of the teacher."""
        return self.student or self.teacher


def problem_types_of(name: str, student: Any, teacher: Any) -> ProblemTypes:
    """Return the problem types in the two configs.

    Raises:
        WiringError: the problem types differ.
    """
    found = ProblemTypes(
        *(getattr(getattr(model, "config", None), "problem_type", None) for model in (student, teacher))
    )
    if found.student and found.teacher and found.student != found.teacher:
        raise WiringError(
            f"{name}: problem_type is {found.student} in the student's config and {found.teacher} in the teacher's; set the same in both"
        )
    return found


def independent(name: str, problem: ProblemTypes, logits: Tensor, labels: Any) -> bool:
    """Return whether classes are independent (multi-label), by the configs or, as in the models themselves, by the labels.

    Args:
        name: the name of the term, for messages.
        problem: the result of :func:`problem_types_of`.
        logits: the student's logits.
        labels: the labels of the batch.

    Raises:
        DistillError: the labels are regression targets, or do not fit the teacher's problem type.
    """
    if problem.named == MULTI_LABEL:
        return True
    if not isinstance(labels, Tensor) or not labels.is_floating_point():
        return False
    if labels.shape != logits.shape:
        raise DistillError(
            f"{name}: float labels {tuple(labels.shape)} for logits {tuple(logits.shape)} are regression targets; use BoundedRegression or terms on layers"
        )
    if problem.student is None and problem.teacher is not None:
        raise DistillError(
            f"{name}: the labels are one float per class, against the teacher's {problem.teacher}; set the student's problem_type"
        )
    return problem.student is None


def ignored_index(model: Any) -> int:
    """Return the label of pixels that a segmentor's own loss ignores."""
    names = ("semantic_loss_ignore_index", "loss_ignore_index")
    return next((getattr(model.config, name) for name in names if hasattr(model.config, name)), 255)


def counted_pixels(labels: Any, ignored: int) -> Tensor | None:
    """Return the pixels that have a class, ``(B, H, W)``; ``None`` without labels."""
    if not isinstance(labels, Tensor):
        return None
    return (labels != ignored) & (labels >= 0)


def by_pixel(student: Tensor, teacher: Tensor, labels: Any) -> tuple[Tensor, Tensor]:
    """Resize both maps ``(B, C, H, W)`` to the labels' grid, as a segmentor's own loss does, or else to the teacher's grid.

    Returns:
        The maps of student and teacher, ``(B, H, W, C)``.
    """
    size = labels.shape[-2:] if isinstance(labels, Tensor) else teacher.shape[-2:]
    return resize_to(student, size).movedim(1, -1), resize_to(teacher, size).movedim(1, -1)


def picked(student: Tensor, teacher: Tensor, weight: Tensor | None, labels: Tensor | None = None) -> Pairs:
    """Select the items that count, so that no softmax is computed for the others; ``labels`` are integers of the items."""
    if labels is not None and (labels.shape != student.shape[:-1] or labels.is_floating_point()):
        labels = None
    if weight is None:
        return Pairs(student, teacher, labels=labels)
    labels = None if labels is None else labels[weight]
    return Pairs(student[weight], teacher[weight], count=weight.sum().to(torch.float32), labels=labels)
