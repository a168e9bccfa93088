"""A model that averages the predictions of several, to be evaluated as one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from .errors import DistillError
from .hosts import Kind
from .readers import class_dim
from .sources import Ensemble


class EnsembleModel(nn.Module):
    """The mean of the predictions of several models, such as born-again generations (BAN, arXiv 1805.04770, section 3.4).

    Args:
        models: the members, in the order of the ensemble's.
        ensemble: the mean and the weights.
        kind: ``"softmax"`` for logits of exclusive classes, ``"sigmoid"`` for logits of independent classes, ``"value"`` for
            numbers.

    Example:
        >>> model = EnsembleModel([teacher, make_model(8)], Ensemble(["a", "b"]))
        >>> model(images).shape == teacher(images).shape
        True
    """

    def __init__(self, models: Sequence[nn.Module], ensemble: Ensemble, kind: Kind = "softmax") -> None:
        super().__init__()
        self.models, self.ensemble, self.kind = nn.ModuleList(models), ensemble, kind

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Run every member on the same input, and return the mean as logits or numbers."""
        outputs = [model(*args, **kwargs) for model in self.models]
        shapes = [tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__ for out in outputs]
        if len({*shapes}) > 1 or not isinstance(outputs[0], Tensor):
            raise DistillError(f"an ensemble needs members that return tensors of one shape, got {shapes}")
        return self.ensemble.average(outputs, self.kind, class_dim(outputs[0]))
