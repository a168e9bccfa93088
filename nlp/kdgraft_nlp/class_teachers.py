"""Teachers of classes that are no classifiers: they give class scores of whole samples, and have no layers to compare."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from kdgraft import LogitMatching
from kdgraft.engine import Engine
from kdgraft.errors import DistillError, WiringError
from kdgraft.sources import Teacher
from kdgraft.terms import ScoreTerm, Term

from .predictions import MULTI_LABEL, REGRESSION
from .registry import SOURCES
from .soft_labels import Values, check_soft_labels, row_error
from .tasks import task_of

PER_CLASS = ("sequence", "image", "audio")
"""The tasks of models that give class scores of whole samples."""
LOWEST = torch.finfo(torch.float16).min
"""The logarithm of a probability of 0, which stays finite in every precision."""
CERTAIN = 100.0
"""The logit of a probability of 1 of a class by itself; the divergence subtracts logits, so that larger ones would cost digits."""


class Scorer(nn.Module):
    """Stands in the place of a classifier: computes class scores from entries of a batch.

    Attributes:
        config: the classes and the kind of problem, as in a classifier's own config.
        distill_task: the task of the classifier, see :func:`~kdgraft_nlp.tasks.task_of`.
        distill_inputs: the keys of a batch that it reads.
    """

    def __init__(self, reads: Sequence[str], classes: Sequence[str] | None) -> None:
        super().__init__()
        self.distill_inputs = frozenset(reads)
        self.distill_task = "sequence"
        self.classes = None if classes is None else [str(name) for name in classes]
        self.config: Any = PretrainedConfig()

    def fit_to(self, student: Any) -> None:
        """Take the task, the kind of problem and, where none are given, the number of classes of a student."""
        names = self.classes or [f"LABEL_{i}" for i in range(student.config.num_labels)]
        several = student.config.problem_type == MULTI_LABEL
        self.config = PretrainedConfig(
            id2label=dict(enumerate(names)),
            label2id={name: i for i, name in enumerate(names)},
            problem_type="multi_label_classification" if several else "single_label_classification",
        )
        self.distill_task = task_of(student)

    def distill_example(self, device: torch.device) -> dict[str, Any]:
        """Return what it reads of a small batch of two samples."""
        raise NotImplementedError

    def scores(self, batch: dict[str, Any]) -> Tensor:
        """Return class scores ``(B, C)``: logits, or logarithms of probabilities."""
        raise NotImplementedError

    def forward(self, **batch: Any) -> dict[str, Tensor]:
        """Return ``logits`` ``(B, C)``."""
        for name in self.distill_inputs:
            if name not in batch:
                raise DistillError(
                    f"the batch has no {name!r}, which the teacher reads; keep it in the data set and the collator"
                )
        return {"logits": self.scores(batch)}


class ClassTeacher(Teacher):
    """Base of teachers that give class scores of whole samples, and nothing else."""

    model: Scorer

    def fit_to(self, student: Any) -> None:
        """Take the classes and the task of a student.

        Raises:
            WiringError: the student does not score classes of whole samples.
        """
        kind = type(self).__name__
        if task_of(student) not in PER_CLASS or student.config.problem_type == REGRESSION:
            raise WiringError(
                f"{kind} gives classes of whole samples, which {type(student).__name__} does not score; use a classifier"
            )
        self.model.fit_to(student)

    def check_term(self, term: Term) -> None:
        """Raise a :class:`WiringError` for a term that reads more than class scores."""
        if not isinstance(term, ScoreTerm):
            raise WiringError(
                f"{term.name} reads more than class scores, and {type(self).__name__} has nothing else; use SoftTargets, or give a "
                "teacher beside it and name it by the term's source"
            )

    def check_data(self, found: Any) -> None:
        """Raise a :class:`DistillError` where a training set lacks what the teacher reads."""

    def check_views(self, views: Any) -> None:
        """Raise a :class:`DistillError` where a student sees other samples than those of the data set."""
        if views is not None:
            raise DistillError(f"{type(self).__name__} gives classes of the samples as they are; leave out views")


def check_class_teachers(engine: Engine) -> None:
    """Refuse terms that read of a :class:`ClassTeacher` more than it has."""
    for term in engine.all_terms:
        for name in engine.members(term.source):
            source = engine.sources.get(name)  # a peer also hears the student
            if isinstance(source, ClassTeacher):
                source.check_term(term)


def check_class_data(engine: Engine, views: Any, data: Any) -> None:
    """Raise a :class:`DistillError` where a training set, or the views of its samples, are not what a :class:`ClassTeacher` needs."""
    for source in engine.sources.values():
        if isinstance(source, ClassTeacher):
            source.check_views(views)
            source.check_data(data)


class _Column(Scorer):
    """Class scores from a column of the data set."""

    def __init__(self, column: str, values: Values, classes: Sequence[str] | None) -> None:
        super().__init__([column], classes)
        self.column, self.values = column, values
        self.checked = False

    def distill_example(self, device: torch.device) -> dict[str, Any]:
        count = self.config.num_labels
        return {self.column: torch.full((2, count), 1 / count, device=device)}

    def scores(self, batch: dict[str, Any]) -> Tensor:
        given = torch.as_tensor(batch[self.column]).float()
        if not self.checked:  # a data set that is read once, from a stream
            independent = self.config.problem_type == MULTI_LABEL
            told = row_error(given.tolist(), self.config.num_labels, self.values, independent)
            if told is not None:
                raise DistillError(f"{self.column!r} of row {told[0]} of a batch {told[1]}")
        if self.values == "logits":
            return given
        if self.config.problem_type != MULTI_LABEL:
            return given.log().clamp(min=LOWEST)
        return torch.logit(given).clamp(min=-CERTAIN, max=CERTAIN)


@SOURCES.register
class SoftLabels(ClassTeacher):
    """Class probabilities or logits of each sample in a column of the data set, which a teacher gave elsewhere.

    The column stays in the batch, as a tensor ``(B, C)``, and no model runs. Terms that compare probabilities listen to it:
    :class:`~kdgraft.SoftTargets`, divergences and others. A probability of 0 stays 0 at every temperature (of a
    multi-label student it is read as the logit −100).

    Args:
        column: the column: a list of one number for each class.
        values: ``"probabilities"``: at least 0, with a sum of 1 (within 0.01, for rounded ones; they are normalised), or each in [0, 1]
            for a multi-label student; ``"logits"``: any numbers.
        classes: the classes in the order of the numbers; by default that of the student.

    Raises:
        DistillError: when training is set up: a row has another length, or numbers that are no probabilities.

    Example:
        >>> SoftLabels("soft", classes=["negative", "positive"]).model.distill_inputs
        frozenset({'soft'})
    """

    def __init__(
        self,
        column: str,
        values: Literal["probabilities", "logits"] = "probabilities",
        classes: Sequence[str] | None = None,
    ) -> None:
        if not isinstance(column, str) or not column or column in ("labels", "label", "input_ids"):
            raise DistillError(f"SoftLabels: column must be the name of a column of soft labels, got {column!r}")
        if values not in ("probabilities", "logits"):
            raise DistillError(f"SoftLabels: values must be 'probabilities' or 'logits', got {values!r}")
        self.scorer = _Column(column, values, classes)
        super().__init__(self.scorer)
        self.column, self.values = column, values

    def check_term(self, term: Term) -> None:
        super().check_term(term)
        if self.values == "probabilities" and (isinstance(term, LogitMatching) or getattr(term, "standardize", False)):
            raise WiringError(
                f"{term.name} compares logits, which probabilities determine only up to a constant, and 0 not at all; use SoftTargets, or "
                "a column of logits with values='logits'"
            )

    def check_data(self, found: Any) -> None:
        """Raise a :class:`DistillError` for the first row of a training set whose soft labels are malformed."""
        names = getattr(found, "column_names", None)
        if names is not None and self.column not in names:
            raise DistillError(
                f"the training set has no column {self.column!r} but {', '.join(names)}; name its soft labels"
            )
        if not hasattr(found, "__len__"):
            return
        if names is not None:
            rows = found.with_format(None)[self.column][:]
        else:
            rows = [sample.get(self.column) for sample in (found[i] for i in range(len(found)))]
        config = self.model.config
        check_soft_labels(self.column, rows, config.num_labels, self.values, config.problem_type == MULTI_LABEL)
        self.scorer.checked = True
