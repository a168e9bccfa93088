"""DIST: correlation rather than equality of the class probabilities, between classes and within each class.

Huang, You, Wang, Qian, Xu, "Knowledge Distillation from A Stronger Teacher", NeurIPS 2022, arXiv 2205.10536.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ..registry import LOSSES
from .correlation import Centred, correlation, correlation_over_items
from .reduction import Reduction, reduce_loss, same_shape, upcast
from .soft_targets import check_temperature


@LOSSES.register
def dist_between_classes(
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: float = 1.0,
    *,
    dim: int = -1,
    weight: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""DIST, inter-class: 1 - Pearson correlation of the class probabilities of each item (Huang et al. 2022).

    The loss is scaled by T², as for soft targets. In a dense map every *pixel* is an item.

    Args:
        student_logits, teacher_logits: ``(…, C, …)`` with the classes at ``dim``.
        temperature: T > 0.
        dim: the class dimension; 1 for maps ``(B, C, H, W)``.
        weight: item weights, of the shape without ``dim``.
        reduction: over items.
    """
    p, q = _probabilities(student_logits, teacher_logits, temperature, dim, weight)
    centred = [Centred(x - x.mean(-1, keepdim=True), x.new_tensor(1 / x.shape[-1]), x.new_ones(())) for x in (p, q)]
    items = 1 - correlation(centred[0], centred[1], -1)
    return reduce_loss(items * temperature**2, weight, reduction)


def dist_within_classes(
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: float = 1.0,
    *,
    dim: int = -1,
    weight: Tensor | None = None,
    reduction: Reduction = "mean",
    total: Callable[[Tensor], Tensor] = lambda part: part,
) -> Tensor:
    r"""DIST, intra-class: 1 - Pearson correlation over all items of each class's probability, times T².

    Args:
        student_logits, teacher_logits, temperature, dim: as for :func:`dist_between_classes`.
        weight: item weights, of the shape without ``dim``.
        reduction: over classes; ``"none"`` gives ``(C,)``. The loss is 0 if all weights are 0.
        total: sums a tensor over processes, with gradient, to correlate over the items of all processes.
    """
    p, q = (
        x.reshape(-1, x.shape[-1]) for x in _probabilities(student_logits, teacher_logits, temperature, dim, weight)
    )
    found, count = correlation_over_items(p, q, None if weight is None else weight.reshape(-1), total)
    items = (1 - found) * temperature**2 * (count > 0)
    return reduce_loss(items, None, reduction)


def _probabilities(
    student: Tensor, teacher: Tensor, temperature: float, dim: int, weight: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return both models' probabilities ``(…, C)``; items with weight 0 are uniform, so that they do not reach the gradient."""
    same_shape(student, teacher, "dist")
    check_temperature(temperature)
    s, t = (upcast(x).movedim(dim, -1) for x in (student, teacher))
    if weight is not None:
        s, t = (x.masked_fill((weight == 0)[..., None], 0) for x in (s, t))
    return (s / temperature).softmax(-1), (t / temperature).softmax(-1)
