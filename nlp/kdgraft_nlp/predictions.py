"""How predictions are laid out: per sample, per token or per pixel; one class out of several, or classes on their own."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn

from kdgraft.adapters import resize_to
from kdgraft.errors import DistillError, WiringError

from .tasks import PER_SAMPLE, PER_TOKEN

MULTI_LABEL = "multi_label_classification"

_LAYOUTS = {2: "(samples, classes)", 3: "(samples, tokens, classes)", 4: "(samples, classes, height, width)"}


def check_layout(name: str, task: str, student: nn.Module, logits: Tensor) -> None:
    """Refuses logits whose axes nobody has named.

    Args:
        name: the term, for messages.
        task: the student's, see :func:`~kdgraft_nlp.tasks.task_of`.
        logits: what the student gave in the dry run.

    Raises:
        WiringError: a model of unknown kind, other than a classifier of samples, or logits of another shape than its kind's.
    """
    if task == "question":
        return
    expected = 3 if task in PER_TOKEN else 4 if task == "segmentation" else 2
    if logits.ndim == expected:
        return
    kind = type(student).__name__
    if task in (*PER_SAMPLE, *PER_TOKEN, "segmentation"):
        raise WiringError(
            f"{name}: the logits of {kind} are {tuple(logits.shape)}, and those of its kind {_LAYOUTS[expected]}; use terms on "
            "layers, or FeatureImitation with taps of your own"
        )
    raise WiringError(
        f"{name}: {kind} is a model of a kind that is not known here, and which axis of its logits {tuple(logits.shape)} holds "
        "the classes cannot be told; use terms on layers, or FeatureImitation with taps of your own"
    )


class ProblemTypes(NamedTuple):
    """The ``problem_type`` that each model's config names, or ``None``."""

    student: str | None = None
    teacher: str | None = None

    @property
    def named(self) -> str | None:
        """That of either."""
        return self.student or self.teacher


def problem_types_of(name: str, student: Any, teacher: Any) -> ProblemTypes:
    """What the two configs say of the outputs.

    Raises:
        WiringError: they disagree.
    """
    found = ProblemTypes(
        *(getattr(getattr(model, "config", None), "problem_type", None) for model in (student, teacher))
    )
    if found.student and found.teacher and found.student != found.teacher:
        raise WiringError(
            f"{name}: problem_type is {found.student} in the student's config and {found.teacher} in the teacher's; their "
            "outputs do not mean the same"
        )
    return found


def independent(name: str, problem: ProblemTypes, logits: Tensor, labels: Any) -> bool:
    """Whether each class is right or wrong on its own, told from the configs or, as the models do, from the labels.

    Args:
        name: the term, for messages.
        problem: of :func:`problem_types_of`.
        logits: of the student.
        labels: of the batch.

    Raises:
        DistillError: the labels are numbers to be predicted, or do not fit what the teacher was made for.
    """
    if problem.named == MULTI_LABEL:
        return True
    if not isinstance(labels, Tensor) or not labels.is_floating_point():
        return False
    if labels.shape != logits.shape:
        raise DistillError(
            f"{name}: labels that are floats {tuple(labels.shape)} beside logits {tuple(logits.shape)} are numbers to be "
            "predicted, and softmax over them means nothing; use terms on layers, or integer labels for classes"
        )
    if problem.student is None and problem.teacher is not None:
        raise DistillError(
            f"{name}: the labels are floats, one for each class, and the teacher's problem_type is {problem.teacher}; set "
            "problem_type in the student's config"
        )
    return problem.student is None


def ignored_index(model: Any) -> int:
    """The label of pixels that a segmentor's own loss leaves out."""
    names = ("semantic_loss_ignore_index", "loss_ignore_index")
    return next((getattr(model.config, name) for name in names if hasattr(model.config, name)), 255)


def counted_pixels(labels: Any, ignored: int) -> Tensor | None:
    """``(B, H, W)``: which pixels have a class; ``None`` without labels."""
    if not isinstance(labels, Tensor):
        return None
    return (labels != ignored) & (labels >= 0)


def by_pixel(student: Tensor, teacher: Tensor, labels: Any) -> tuple[Tensor, Tensor]:
    """Both maps ``(B, C, H, W)`` on the grid of the labels, as a segmentor's own loss does it, as ``(B, H, W, C)``.

    Without labels on the teacher's grid.
    """
    size = labels.shape[-2:] if isinstance(labels, Tensor) else teacher.shape[-2:]
    return resize_to(student, size).movedim(1, -1), resize_to(teacher, size).movedim(1, -1)
