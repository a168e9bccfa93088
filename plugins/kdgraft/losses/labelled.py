"""Class scores of items with a label: the probability of the true class, and the distribution over the other classes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import DistillError
from .reduction import same_shape, upcast


class Labelled:
    """The logits ``(…, C)`` of items with a label, 0 at items that are left out.

    Args:
        loss: the name of the loss, for messages.
        student, teacher: ``(…, C, …)`` with the classes at ``dim``.
        labels: integers of the shape without ``dim``; items with a label outside 0 … C − 1 are left out.
        dim: the class dimension.
        present: ``(…, C, …)``, true for the classes that an item has.
        weight: item weights that broadcast to the shape of ``labels``.

    Attributes:
        both: the logits of student and teacher, in float32 or more.
        weight: the items' weights, 0 for those that are left out.
        other: ``(…, C)``, true for the classes that an item has except its own.
    """

    def __init__(
        self,
        loss: str,
        student: Tensor,
        teacher: Tensor,
        labels: Tensor,
        dim: int,
        present: Tensor | None,
        weight: Tensor | None,
    ) -> None:
        same_shape(student, teacher, loss)
        s, t = (upcast(logits).movedim(dim, -1) for logits in (student, teacher))
        if labels.shape != s.shape[:-1]:
            raise DistillError(
                f"{loss}: labels {tuple(labels.shape)} must be one for each item of the logits {tuple(student.shape)}"
            )
        counted = (labels >= 0) & (labels < s.shape[-1])
        self.weight = counted.to(s.dtype) if weight is None else weight.to(s.dtype).expand_as(labels) * counted
        outside = (self.weight == 0)[..., None]
        # What does not count must not reach the gradient, not even with an infinity (0 · inf is NaN).
        self.both = s.masked_fill(outside, 0), t.masked_fill(outside, 0)
        self._place = labels.masked_fill(~counted, 0).long()[..., None]
        self._present = None if present is None else present.movedim(dim, -1) | outside
        classes = torch.arange(s.shape[-1], device=labels.device)
        self.other = (classes != self._place) if self._present is None else (classes != self._place) & self._present

    def binary(self, logits: Tensor) -> Tensor:
        """Return the log-probabilities ``(…, 2)`` of an item's own class and of the others together."""
        own = logits.gather(-1, self._place)
        rest = _without(logits, self.other).logsumexp(-1, keepdim=True)
        return F.log_softmax(torch.cat([own, rest], -1), -1)

    def others(self, logits: Tensor) -> Tensor:
        """Return the log-probabilities ``(…, C)`` among the other classes; 0 at the item's own class."""
        return F.log_softmax(_without(logits, self.other), -1).masked_fill(~self.other, 0)


def _without(logits: Tensor, kept: Tensor) -> Tensor:
    """Replace the logits of other classes by the lowest number; unlike an infinity it leaves no NaN where no class is kept."""
    return logits.masked_fill(~kept, torch.finfo(logits.dtype).min)
