"""Views of images in the Trainer: what the student and its teachers see of one batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor

from kdgraft.consistent import Teaching
from kdgraft.errors import DistillError
from kdgraft.terms import Term
from kdgraft.terms.share import silences_task
from kdgraft.views import Views

from .tokens import TEACHER_INPUTS

PIXELS = "pixel_values"
MakeViews = Callable[[Any, Any], tuple[Any, Any]]


def check_views(views: Any, terms: Iterable[Term], takes: Iterable[str]) -> None:
    """Raise a :class:`DistillError` for views that a student's batches cannot have.

    Args:
        views: the function that makes them.
        terms: the terms of the distillation.
        takes: the names of the student's inputs.
    """
    if not callable(views):
        raise DistillError(f"views must be a function such as kdgraft.consistent.Teaching(), got {views!r}")
    if PIXELS not in takes:
        raise DistillError(f"views are of images, and the student takes no {PIXELS}; leave views out")
    if mixes(views) and not silences_task(terms):
        raise DistillError(
            "mixup leaves images without labels for the host's own loss; use recipe='funmatch', add TaskShare(), or give Teaching "
            "mixup=False"
        )


def mixes(views: Any) -> bool:
    """Return true for teaching with mixup."""
    return isinstance(views, Teaching) and views.mixup


def viewed(views: MakeViews, inputs: Mapping[str, Any], sources: Iterable[str]) -> dict[str, Any]:
    """Return a batch in which student and sources have their views.

    Args:
        views: the function that makes them of ``(images, labels)``; in teaching with mixup the labels are left out.
        inputs: the batch, with ``pixel_values`` ``(B, C, H, W)``.
        sources: the names of the sources that do not train.

    Raises:
        DistillError: the batch has no images, or its sources have several views.
    """
    if not isinstance(inputs.get(PIXELS), Tensor):
        raise DistillError(f"views need {PIXELS} in the batch, which has {', '.join(inputs)}")
    found = {name: value for name, value in inputs.items() if not (mixes(views) and name == "labels")}
    images, labels = views(inputs[PIXELS], found.get("labels"))
    if labels is not None:
        found["labels"] = labels
    if not isinstance(images, Views):
        return {**found, PIXELS: images}
    images.check(set(sources))
    own = {id(images.of(name)): images.of(name) for name in sources}
    if len(own) > 1:
        raise DistillError("views: all sources must have the same view in the Trainer")
    found[PIXELS] = images.student
    for view in own.values():
        if view is not images.student:
            found[TEACHER_INPUTS] = {**found.get(TEACHER_INPUTS, {}), PIXELS: view}
    return found
