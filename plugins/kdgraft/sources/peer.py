"""Peers: further students that learn beside the first one and teach it."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..errors import DistillError, WiringError, check_flag
from ..registry import SOURCES
from .base import STUDENT, Source, share_parameters
from .ensemble import Ensemble

logger = logging.getLogger("kdgraft")


@SOURCES.register
class Peer(Source):
    """A second model that trains on the host's own loss, while it and the student imitate each other.

    Deep mutual learning (Zhang et al. 2018, arXiv 1706.00384): every term on a peer has a mirrored twin in which the peer imitates
    the student; in each, the imitated predictions carry no gradient. The engine owns the model, so that the host's optimizer
    trains it; its weights are saved with the state of the distillation, not in checkpoints of the student. :class:`Peers` has
    several.

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
        if not isinstance(model, nn.Module):
            raise DistillError(f"Peer: the model must be an nn.Module, got {type(model).__name__}")
        self.model = model

    def state(self) -> dict[str, Any]:
        return {"model": self.model.state_dict()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.model.load_state_dict(state["model"])


@SOURCES.register
class Peers(Source):
    r"""Deep mutual learning of K students, of which these models are K − 1 (Zhang et al. 2018, arXiv 1706.00384).

    Each of the K trains on the host's own loss, and on each term towards each of the others, with the term's weight divided by
    K − 1 (eq. 8): :math:`L_i = L_i^{host} + \frac{w}{K-1} \sum_{j \ne i} L(i, j)`; the imitated model j gets no gradient. The
    sources ``<name>_0``, ``<name>_1`` … are the single peers, so that each can be exported, and heard by itself. A term is
    logged for each ordered pair, as ``distill.<term>_from_<name>_0.loss`` where the student imitates the first peer, and as
    ``distill.<term>_of_<name>_0_from_student.loss`` where that peer imitates the student.

    With ``average`` each student imitates one distribution instead, the arithmetic mean of the others' probabilities (DML_e,
    section 3.4). There is then one term for each student: ``distill.<term>.loss`` and ``distill.<term>_of_<name>_0.loss``.

    The paper updates the students one after the other on the same batch, each against the new predictions of those before it;
    here one pass of each gives all losses, and one step of the optimizer updates all. The authors' code adds the K − 1 terms
    without dividing: give K − 1 times the weight for that.

    Args:
        models: the other students, one or more; neither they nor the first share parameters.
        average: imitate the mean of the others' predictions; only for terms on predictions, and two models or more.

    Example:
        >>> peers = Peers([make_model(4), make_model(6)], average=True)
        >>> distiller = Distiller(student, recipe="dml", teachers=dict(teacher=peers), example=images)
        >>> list(distiller(images).losses)
        ['distill.soft_targets.loss', 'distill.soft_targets_of_teacher_0.loss', 'distill.soft_targets_of_teacher_1.loss']
        >>> list(distiller.peers)
        ['teacher_0', 'teacher_1']
    """

    def __init__(self, models: Sequence[nn.Module], average: bool = False) -> None:
        super().__init__()
        if not isinstance(models, (list, tuple)) or not models:
            raise DistillError(
                f"Peers: models must be a list of one other student or more, got {models!r}; a single student has no peers"
            )
        check_flag("Peers", "average", average)
        if average and len(models) < 2:
            raise DistillError("Peers: the average of one other student is that student; leave average out")
        self._peers, self.average = [Peer(model) for model in models], average

    @property
    def members(self) -> tuple[str, ...]:
        return tuple(self.parts())

    def parts(self) -> dict[str, Source]:
        return {f"{self.name}_{place}": peer for place, peer in enumerate(self._peers)}

    def means(self, student: str) -> dict[str, Ensemble]:
        """Return for each of the K students the ensemble of all others, in the order of :attr:`members`."""
        everybody = (student, *self.members)
        return {one: Ensemble([other for other in everybody if other != one]) for one in everybody}


def check_peers(models: Mapping[str, nn.Module], peers: Collection[str]) -> None:
    """Raise a :class:`WiringError` for a peer that has nothing to train, or shares what it trains with another model.

    Warn about a peer that starts as the student or another peer does, and has nothing to teach it.

    Args:
        models: the student and all models of sources, by name.
        peers: the names of the peers among them.
    """
    for name in peers:
        if not any(parameter.requires_grad for parameter in models[name].parameters()):
            raise WiringError(
                f"{name!r} is a peer, and all its parameters are frozen (is it a teacher too?); pass a copy.deepcopy"
            )
        for other, model in models.items():
            if other != name and share_parameters(models[name], model):
                raise WiringError(f"{other} and the peer {name!r} share parameters; pass a copy.deepcopy of one")
    learning = [name for name in models if name == STUDENT or name in peers]
    for place, name in enumerate(learning):
        for other in learning[:place]:
            if _equal(models[name], models[other]):
                logger.warning(
                    "%s and the peer %s start with equal weights, so that they learn the same: build them from different random "
                    "numbers (does a function of yours seed them?), or from different checkpoints",
                    other if other == STUDENT else f"the peer {other}",
                    name,
                )


def _equal(one: nn.Module, other: nn.Module) -> bool:
    """Return true if two models have equal parameters; those on the meta device have none yet."""
    ours, theirs = dict(one.named_parameters()), dict(other.named_parameters())
    if ours.keys() != theirs.keys():
        return False
    pairs = [(ours[name], theirs[name]) for name in ours]
    return all(not a.is_meta and not b.is_meta and a.device == b.device and torch.equal(a, b) for a, b in pairs)
