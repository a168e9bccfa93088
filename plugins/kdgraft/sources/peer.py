"""A peer: a second student that learns beside the first one and teaches it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from .base import Source


class Peer(Source):
    """A second model that trains on the host's own loss, while it and the student imitate each other.

    Deep mutual learning (Zhang et al. 2018, arXiv 1706.00384): every term on a peer has a mirrored twin in which the peer imitates
    the student; in each, the imitated predictions carry no gradient. The engine owns the model, so that the host's optimizer
    trains it; its weights are saved with the state of the distillation, not in checkpoints of the student.

    Args:
        model: the second student; it must not share parameters with the first.

    Example:
        >>> distiller = Distiller(student, Peer(make_model(4)), [SoftTargets()], example=images)
        >>> list(distiller(images).losses)
        ['distill.soft_targets.loss', 'distill.soft_targets_of_teacher.loss']
    """

    trains = True

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def state(self) -> dict[str, Any]:
        return {"model": self.model.state_dict()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
