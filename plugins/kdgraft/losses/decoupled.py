"""Decoupled distillation (DKD): the probability of the true class apart from the distribution over the other classes.

Zhao, Cui, Song, Qiu, Liang, "Decoupled Knowledge Distillation", CVPR 2022, arXiv 2203.08679, equation 7.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ..errors import check_number
from .labelled import Labelled
from .reduction import Reduction, reduce_loss
from .soft_targets import check_temperature


def decoupled(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    temperature: float = 4.0,
    *,
    alpha: float = 1.0,
    beta: float = 8.0,
    dim: int = -1,
    present: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Decoupled distillation: KL of (true class, rest), and KL over the other classes (DKD; Zhao et al. 2022, equation 7).

    .. math:: T^2 \big( \alpha \, \mathrm{KL}(b_t \,\|\, b_s) + \beta \, \mathrm{KL}(\hat p_t \,\|\, \hat p_s) \big), \qquad
              b = (p_y, 1 - p_y), \; \hat p_c = \frac{p_c}{1 - p_y} \; (c \ne y)

    With :math:`\alpha = 1` and :math:`\beta = 1 - p_{t,y}` it is :func:`~kdgraft.losses.soft_targets`. The second part is 0 for two
    classes.

    Args:
        student_logits, teacher_logits: ``(…, C, …)`` with the classes at ``dim``, the same shape.
        labels: the true classes, integers of the shape without ``dim``; items with a label outside 0 … C − 1 are left out.
        temperature: T > 0.
        alpha, beta: factors of the two parts, TCKD and NCKD in the paper.
        dim: the class dimension.
        present: ``(…, C, …)``, true for the classes that an item has; all by default.
        weight: item weights that broadcast to the shape of ``labels``.
        reduction: over items.

    Raises:
        DistillError: the shapes differ, or a number is out of its range.
    """
    check_temperature(temperature)
    check_number("decoupled", "alpha", alpha)
    check_number("decoupled", "beta", beta)
    items = Labelled("decoupled", student_logits, teacher_logits, labels, dim, present, weight)
    student, teacher = ((items.binary(x / temperature), items.others(x / temperature)) for x in items.both)
    binary, others = (
        F.kl_div(ours, theirs, reduction="none", log_target=True).sum(-1)
        for ours, theirs in zip(student, teacher, strict=True)
    )
    return reduce_loss((alpha * binary + beta * others) * temperature**2, items.weight, reduction)
