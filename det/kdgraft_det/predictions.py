"""The choice of the two heads that a term on predictions compares."""

from __future__ import annotations

from typing import Any, Literal, get_args

from torch import nn

from kdgraft.errors import WiringError

from .dense import DenseHeads
from .heads import Heads
from .queries import QueryHeads, has_queries
from .rois import RoIHeads

HeadName = Literal["auto", "bbox_head", "rpn_head", "roi_head"]
HEAD_NAMES = get_args(HeadName)


def find_heads(student: nn.Module, teacher: nn.Module, which: HeadName, term: str) -> Heads:
    """Return the heads of this name; ``"auto"`` is the head that predicts the final detections.

    Raises:
        WiringError: a model has no such head, the head cannot be read, or the two predict different things.
    """
    if which == "auto":
        which = "roi_head" if hasattr(student, "roi_head") else "bbox_head"
    heads: list[Any] = [getattr(model, which, None) for model in (student, teacher)]
    for owner, model, head in zip(("student", "teacher"), (student, teacher), heads, strict=True):
        if head is None:
            raise WiringError(
                f"{term}: the {owner}, a {type(model).__name__}, has no {which}; features work across detectors, "
                "predictions are compared between heads of one kind"
            )
    if which == "roi_head":
        return RoIHeads(student, teacher, term)
    if any(has_queries(head) for head in heads):
        return QueryHeads(student, teacher, term)
    return DenseHeads(heads[0], heads[1], which, term)
