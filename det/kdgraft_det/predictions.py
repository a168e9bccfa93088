"""The choice of the two heads that a term on predictions compares."""

from __future__ import annotations

from typing import Any, Literal, get_args

from torch import nn

from kdgraft.errors import WiringError

from . import dense, mask_queries, queries, rois  # noqa: F401  register the readers of mmdet's heads
from .heads import Heads, find_reader

HeadName = Literal["auto", "bbox_head", "rpn_head", "roi_head", "panoptic_head"]
HEAD_NAMES = get_args(HeadName)


def find_heads(student: nn.Module, teacher: nn.Module, which: HeadName, term: str) -> Heads:
    """Return the heads of this name; ``"auto"`` is the head that predicts the final detections.

    Raises:
        WiringError: a model has no such head, the head cannot be read, or the two predict different things.
    """
    if which == "auto":
        which = next((name for name in ("roi_head", "panoptic_head") if hasattr(student, name)), "bbox_head")  # type: ignore[assignment]
    heads: list[Any] = [getattr(model, which, None) for model in (student, teacher)]
    for owner, model, head in zip(("student", "teacher"), (student, teacher), heads, strict=True):
        if head is None:
            raise WiringError(
                f"{term}: the {owner}, a {type(model).__name__}, has no {which}; features work across detectors, "
                "predictions are compared between heads of one kind"
            )
    models = {"student": student, "teacher": teacher}
    readers = [find_reader(head, which, owner, term) for owner, head in zip(models, heads, strict=True)]
    ours, theirs = readers
    if ours.pair is not theirs.pair:
        raise WiringError(
            f"{term}: the teacher's {theirs.kind} is not one that this term can read beside the student's {ours.kind}; give "
            "both heads of one kind; FeatureImitation works with any detector"
        )
    for reader, model in zip(readers, models.values(), strict=True):
        reader.prepare(model, term)
    pair: Heads = ours.pair(ours, theirs, term)
    return pair
