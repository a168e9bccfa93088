"""The term without a loss, which leaves a share of the host's own loss."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from ..balance import AutoWeight
from ..errors import DistillError, check_share
from ..readers import Reader
from ..registry import TERMS
from ..schedules import Constant
from ..sources import STUDENT
from .base import Term, Wiring


@TERMS.register
class TaskShare(Term):
    """A share of the host's own loss, none by default, while the term is active.

    The term has no loss and hears no source. With a schedule that stops, the first stage of a two-stage method trains on the other
    terms alone: FitNets (arXiv 1412.6550), FSP (CVPR 2017) and AB (arXiv 1811.03233) train on features first and then on labels.
    Without a schedule the whole training is on the teacher's predictions, as on data without labels (arXiv 2106.05237). It applies
    to peers as to the student.

    A share of 0 gives parameters that no other term reaches a gradient of zeros rather than none, as DDP needs; an optimizer's
    weight decay still moves them.

    Args:
        share: the factor in [0, 1) on the host's own loss. As far as a schedule reduces the term, the factor approaches 1.
        losses: names of the host's own losses in hosts that have several, such as ``["loss_bbox"]`` in detection; all by default.
        schedule: when the term is active; see :func:`kdgraft.schedules.build_schedule`.
        name: name of the term in logs.

    Example:
        >>> terms = [Hint("conv"), TaskShare(schedule=Stop(5, by="epoch"))]
        >>> distiller = Distiller(student, teacher, terms, example=images)
        >>> out = distiller(images)
        >>> torch.equal(out.total(torch.tensor(2.0)), out.loss)
        True
        >>> distiller.epoch = 5
        >>> distiller(images).host_share
        1.0
    """

    alone = True

    def __init__(
        self,
        share: float = 0.0,
        *,
        losses: Sequence[str] | None = None,
        schedule: Any = None,
        name: str | None = None,
    ) -> None:
        super().__init__(schedule=schedule, name=name, source=STUDENT)
        check_share("TaskShare", "share", share)
        if share == 1:
            raise DistillError("TaskShare: share=1 leaves the host's own loss as it is; remove the term")
        named = isinstance(losses, (list, tuple)) and losses and all(isinstance(one, str) for one in losses)
        if losses is not None and not named:
            raise DistillError(f"TaskShare: losses must be a list of names of the host's own losses, got {losses!r}")
        self.host_share, self.host_losses = float(share), list(losses or ())

    def check_settings(self, reader: type[Reader]) -> None:
        super().check_settings(reader)
        if self.host_losses and not reader.names_losses:
            raise DistillError(f"{self.name}: this host has one loss of its own; leave losses out")

    def wire(self, wiring: Wiring) -> None:
        names = ", ".join(self.host_losses)
        own = f"own loss {names}" if names else "own loss"
        self.rows.append(self.row(f"× {self.host_share:g}", "–", taps=(own, "–")))


def silences_task(terms: Iterable[Term]) -> bool:
    """Return true if one of the terms leaves nothing to any of the student's own losses throughout the training."""
    return any(
        term.host_share == 0 and not term.host_losses and isinstance(term.schedule, Constant) and term.weight > 0
        for term in terms
        if term.listener == STUDENT
    )


def check_auto(terms: Iterable[Term], peers: Sequence[str]) -> None:
    """Raise a :class:`DistillError` for a weight that is set by the host's own loss where that has no fixed meaning.

    Args:
        terms: the user's terms.
        peers: the names of the sources that train beside the student.
    """
    terms = list(terms)
    auto = next((term.name for term in terms if isinstance(term.balance, AutoWeight)), None)
    if auto is not None and peers:
        raise DistillError(
            f"{auto}: weight='auto' compares with the student's own loss, and {peers[0]!r} trains on one of its own; set weight to a number"
        )
    if auto is not None and silences_task(terms):
        raise DistillError(
            f"{auto}: weight='auto' compares with the host's own loss, of which another term leaves nothing; set weight to a number"
        )
