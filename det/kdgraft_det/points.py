"""Distillation points of DETR-type detectors: queries that two decoders can both be given, in a second pass on one encoder's memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from mmdet.models.detectors import DABDETR, DETR, DINO, ConditionalDETR, DeformableDETR
from torch import Tensor, nn

from kdgraft.errors import WiringError

Given = Mapping[str, Any]
"""The arguments of a detector's ``forward_decoder``, by name."""
_SMALL = 1e-5


class Points:
    """Queries as one kind of detector takes them: numbers ``(B, N, width)``. It keeps no module.

    The base class is that of detectors whose queries are boxes: centre and size as fractions of the image, before the sigmoid.
    They mean the same to all detectors of any width; embeddings only mean something to detectors of one kind and width.
    """

    space: ClassVar[str] = "boxes"

    def __init__(self, model: Any) -> None:
        self.kind, self.width = type(model).__name__, 4
        self.queries = model.num_queries

    def own(self, given: Given) -> Tensor:
        """Return the points ``(B, N, width)`` of a recorded pass, without DINO's denoising queries, which come first."""
        boxes: Tensor = given["reference_points"][:, -self.queries :]
        return boxes.detach().float().logit(eps=_SMALL)

    def enter(self, model: Any, points: Tensor) -> dict[str, Any]:
        """Return the arguments of ``forward_decoder`` with which these points are the queries."""
        raise NotImplementedError


class _Boxes(Points):
    """DAB-DETR: anchor boxes, with nothing in them at first."""

    def own(self, given: Given) -> Tensor:
        found: Tensor = given["query_pos"]
        return found.detach()

    def enter(self, model: Any, points: Tensor) -> dict[str, Any]:
        return dict(query_pos=points, query=points.new_zeros(*points.shape[:2], model.embed_dims))


class _Embeddings(_Boxes):
    """DETR and Conditional DETR: position embeddings, with nothing in them at first."""

    space = "embeddings"

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.width = model.embed_dims


class _Halves(Points):
    """Deformable DETR: embeddings of position and content; the reference points are a projection of the former."""

    space = "embeddings"

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.width = 2 * model.embed_dims

    def own(self, given: Given) -> Tensor:
        return torch.cat([given["query_pos"], given["query"]], -1).detach()

    def enter(self, model: Any, points: Tensor) -> dict[str, Any]:
        position, content = points.chunk(2, -1)
        reference = model.reference_points_fc(position).sigmoid()
        return dict(query_pos=position, query=content, reference_points=reference)


class _Proposals(Points):
    """Deformable DETR in two stages: proposed boxes; each model projects their sine embedding to position and content."""

    def enter(self, model: Any, points: Tensor) -> dict[str, Any]:
        embedded = model.pos_trans_norm(model.pos_trans_fc(model.get_proposal_pos_embed(points)))
        position, content = embedded.chunk(2, -1)
        return dict(query_pos=position, query=content, reference_points=points.sigmoid())


class _Mixed(Points):
    """DINO: proposed boxes, with the model's own learned content in the order of its queries."""

    def enter(self, model: Any, points: Tensor) -> dict[str, Any]:
        learned = model.query_embedding.weight
        content = learned[torch.arange(points.shape[1], device=learned.device) % len(learned)]
        return dict(query=content.expand(len(points), -1, -1), reference_points=points.sigmoid(), dn_mask=None)


_KINDS: tuple[tuple[type, type[Points]], ...] = (
    (DINO, _Mixed),
    (DeformableDETR, _Halves),
    (DABDETR, _Boxes),
    (ConditionalDETR, _Embeddings),
    (DETR, _Embeddings),
)
_METHODS = ("pre_decoder", "forward_decoder", "forward_transformer")


def points_of(model: nn.Module, owner: str, term: str) -> Points:
    """Return how a detector takes its queries.

    Raises:
        WiringError: it has none, or its class builds them in a way of its own.
    """
    for kind, points in _KINDS:
        if all(getattr(type(model), method, 0) is getattr(kind, method) for method in _METHODS):
            if getattr(model, "num_patterns", 0):
                raise WiringError(
                    f"{term}: the {owner}'s {type(model).__name__} has num_patterns={model.num_patterns}, learned contents of every "
                    "query that the other model lacks; this term needs num_patterns=0"
                )
            return (_Proposals if getattr(model, "as_two_stage", False) and points is _Halves else points)(model)
    names = ", ".join(kind.__name__ for kind, _ in reversed(_KINDS))
    raise WiringError(
        f"{term}: the {owner}, a {type(model).__name__}, has no decoder that this term can give queries to ({names}); use SoftTargets, "
        "or FeatureImitation, which works with any detector"
    )


def same_points(student: Points, teacher: Points, term: str) -> None:
    """Raise a :class:`WiringError` unless one query means the same to both detectors."""
    both = student, teacher
    if student.space == "boxes" == teacher.space:
        return
    kinds = [(points.space, points.kind if points.space == "embeddings" else "") for points in both]
    if kinds[0] != kinds[1]:
        raise WiringError(
            f"{term}: the student's {student.kind} takes {student.space} as queries, the teacher's {teacher.kind} {teacher.space} of its "
            "own kind; the two decoders are given the same queries, so give both models one kind"
        )
    if student.width != teacher.width:
        raise WiringError(
            f"{term}: the student's {student.kind} takes queries of {student.width} numbers, the teacher's of {teacher.width}; the two "
            "decoders are given the same queries, so give both the same embed_dims (queries that are boxes, as DAB-DETR's and DINO's, "
            "need no such thing)"
        )
