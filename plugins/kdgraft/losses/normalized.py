"""Normalized distillation (NKD): the true class's probability, and the normalised distribution over the other classes.

Yang, Zeng, Li, Zhang, Yuan, Li, "From Knowledge Distillation to Self-Knowledge Distillation: A Unified Approach with Normalized
Loss and Customized Soft Labels", ICCV 2023, arXiv 2303.13005, equation 6.
"""

from __future__ import annotations

from torch import Tensor

from ..errors import check_number
from .labelled import Labelled
from .reduction import Reduction, reduce_loss
from .soft_targets import check_temperature


def normalized(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    temperature: float = 1.0,
    *,
    gamma: float = 1.5,
    dim: int = -1,
    present: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Normalized distillation: cross-entropies of the true class and over the other classes (NKD; Yang et al. 2023, equation 6).

    .. math:: -p_{t,y} \log p_{s,y} - \gamma T^2 \sum_{c \ne y} \hat p_{t,c}^T \log \hat p_{s,c}^T, \qquad
              \hat p_c = \frac{p_c}{1 - p_y}

    The temperature changes the second part only. As these are cross-entropies, equal logits do not give 0.

    Args:
        student_logits, teacher_logits: ``(…, C, …)`` with the classes at ``dim``, the same shape.
        labels: the true classes, integers of the shape without ``dim``; items with a label outside 0 … C − 1 are left out.
        temperature: T > 0, λ in the paper.
        gamma: factor of the second part.
        dim: the class dimension.
        present: ``(…, C, …)``, true for the classes that an item has; all by default.
        weight: item weights that broadcast to the shape of ``labels``.
        reduction: over items.

    Raises:
        DistillError: the shapes differ, or a number is out of its range.
    """
    check_temperature(temperature)
    check_number("normalized", "gamma", gamma)
    items = Labelled("normalized", student_logits, teacher_logits, labels, dim, present, weight)
    student, teacher = items.both
    target = -items.binary(teacher)[..., 0].exp() * items.binary(student)[..., 0]
    theirs = items.others(teacher / temperature).exp().masked_fill(~items.other, 0)
    others = -(theirs * items.others(student / temperature)).sum(-1)
    return reduce_loss(target + gamma * temperature**2 * others, items.weight, reduction)
