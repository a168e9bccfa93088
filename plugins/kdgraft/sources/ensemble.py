"""An ensemble of teachers as one source: the mean of their predictions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import DistillError, WiringError, check_number
from ..losses.reduction import upcast
from ..registry import SOURCES
from ..taps import Recording
from .base import Source

Mean = Literal["arithmetic", "geometric"]
Kind = Literal["softmax", "sigmoid", "value"]


@SOURCES.register
class Ensemble(Source):
    """The mean of the predictions of several teachers (Hinton et al. 2015, arXiv 1503.02531, section 1).

    A term on predictions imitates that mean. Features have none, as the members' spaces differ: there the loss is the mean of the
    losses towards the members, by the same weights. The term then becomes one for each member, with adapters of its own, and is
    logged as ``distill.<term>_from_<member>.loss``.

    Args:
        members: the names of the sources to combine, two or more. Each has its own order of classes and its own view of the batch.
        mean: ``"arithmetic"``: the mean of the probabilities at temperature 1; ``"geometric"``: their normalised geometric mean,
            which is the mean of the logits. Boxes are averaged as numbers in both cases, and losses on features too.
        weights: one weight > 0 per member, normalised to a sum of 1; equal by default.

    Example:
        >>> sources = dict(a=teacher, b=make_model(16), both=Ensemble(["a", "b"], mean="geometric"))
        >>> distiller = Distiller(student, terms=[SoftTargets(source="both")], teachers=sources, example=images)
        >>> list(distiller(images).losses)
        ['distill.soft_targets.loss']
    """

    alike = "the members of an Ensemble must predict alike"
    """Advice where the shapes of the members' predictions differ from :meth:`shape_of`."""

    def __init__(
        self, members: Sequence[str], mean: Mean = "arithmetic", weights: Sequence[float] | None = None
    ) -> None:
        super().__init__()
        if not isinstance(members, (list, tuple)) or len(members) < 2 or len({*map(str, members)}) < len(members):
            raise DistillError(f"Ensemble: members must be two or more different sources, got {members!r}")
        if mean not in ("arithmetic", "geometric"):
            raise DistillError(f"Ensemble: mean must be 'arithmetic' or 'geometric', got {mean!r}")
        given = [1.0] * len(members) if weights is None else list(weights)
        for weight in given:
            check_number("Ensemble", "a weight", weight, above=True)
        if len(given) != len(members):
            raise DistillError(f"Ensemble: {len(members)} members need as many weights, got {len(given)}")
        self._members, self.mean = tuple(members), mean
        self.weights = [weight / sum(given) for weight in given]

    @property
    def members(self) -> tuple[str, ...]:
        return self._members

    def of(self, recordings: Sequence[Recording]) -> EnsembleRecording:
        """Combine the recordings of the members into the ensemble's."""
        return EnsembleRecording(self.name, recordings, self)

    @property
    def told(self) -> str:
        """Its name in the log."""
        return f"the mean of {' and '.join(self.members)}"

    def shape_of(self, member: str, first: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape that a member's predictions must have, from that of the first member's."""
        return first

    def check_features(self, term: str) -> None:
        """Raise a :class:`WiringError` where a term on features cannot hear it."""

    def check(self, term: str, reader: Any, predictions: Any) -> None:
        """Raise a :class:`WiringError` where a term that is prepared cannot hear it.

        Args:
            term: the term's name.
            reader: the host's reader of the term.
            predictions: what the term compares, a :class:`~kdgraft.Predictions`.
        """

    def average(self, values: Sequence[Tensor], kind: Kind, dim: int = -1) -> Tensor:
        """Return the mean of the members' logits or numbers, all of one shape; see :func:`combined`."""
        stacked = torch.stack([upcast(value) for value in values])
        weights = stacked.new_tensor(self.weights).view(-1, *[1] * (stacked.ndim - 1))
        if kind == "value" or self.mean == "geometric":
            return (stacked * weights).sum(0)
        if kind == "softmax":
            return (stacked.log_softmax(dim if dim < 0 else dim + 1) + weights.log()).logsumexp(0)
        yes, no = ((F.logsigmoid(side) + weights.log()).logsumexp(0) for side in (stacked, -stacked))
        return yes - no


class EnsembleRecording(Recording):
    """The recordings of an ensemble's members; read it with :func:`combined`."""

    def __init__(self, model: str, members: Sequence[Recording], ensemble: Ensemble) -> None:
        super().__init__("teacher", {}, set(), model)
        self.members, self.ensemble = list(members), ensemble

    def __getitem__(self, tap: Any) -> Any:
        raise WiringError(
            f"'{tap}': an Ensemble has predictions only, no outputs of single modules; use one of its members, "
            f"source={self.members[0].model!r}"
        )


def combined(source: Recording, read: Callable[[Recording], Tensor], kind: Kind, dim: int = -1) -> Tensor:
    """Return the predictions of a source: those of its model, or the mean over its members.

    Args:
        source: the recording of a model or of an :class:`Ensemble`.
        read: reads a member's logits or numbers in the student's order of classes; all must have the same shape.
        kind: ``"softmax"`` for logits of exclusive classes along ``dim``, ``"sigmoid"`` for logits of independent classes,
            ``"value"`` for numbers.
        dim: the axis of the classes, for ``"softmax"``.

    Returns:
        Logits or numbers of the same shape; log-probabilities for an arithmetic mean of softmaxes.
    """
    if not isinstance(source, EnsembleRecording):
        return read(source)
    return source.ensemble.average([read(member) for member in source.members], kind, dim)
