"""Correlation congruence (CC): a kernel of the batch's samples follows the teacher's.

Peng, Jin, Liu, Zhou, Wu, Liu, Li, Zhang, "Correlation Congruence for Knowledge Distillation", ICCV 2019, arXiv 1904.01802.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor

from ..errors import check_number
from .reduction import Reduction
from .relations import between_samples, kernel, relations, squared_difference


def correlation_congruence(
    student: Tensor,
    teacher: Tensor,
    *,
    gamma: float = 0.4,
    order: int = 2,
    valid: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Correlation congruence (CC): squared difference of a Gaussian kernel's Taylor series (Peng et al. 2019).

    .. math:: \frac{1}{N^2} \sum_{i,j} (k^s_{ij} - k^t_{ij})^2, \qquad
              k_{ij} = e^{-2\gamma} \sum_{p=0}^{P} \frac{(2\gamma)^p}{p!} (x_i^\top x_j)^p, \quad \|x_i\|_2 = 1

    The lengths of the vectors do not matter.

    Args:
        student: ``(B, C_s)``, one vector per sample.
        teacher: ``(B, C_t)``; the widths may differ.
        gamma: γ > 0 of the kernel.
        order: P >= 1, the order of the series.
        valid: ``(B,)``, > 0 for the samples to include; all by default.
        reduction: over rows; ``"none"`` gives ``(B,)``, each row's sum over N.

    Raises:
        DistillError: the two do not hold the same samples, or the kernel is not defined.
    """
    check_kernel(gamma, order)
    similarity = partial(kernel, gamma=gamma, order=order)

    def compute(s: Tensor, t: Tensor) -> Tensor:
        return relations(s, t, similarity, squared_difference) / len(s)

    return between_samples("correlation_congruence", student, teacher, compute, valid, reduction)


def check_kernel(gamma: float, order: int) -> None:
    """Raise a :class:`DistillError` unless ``gamma`` is a number > 0 and ``order`` a whole number >= 1."""
    check_number("correlation_congruence", "gamma", gamma, above=True)
    check_number("correlation_congruence", "order", order, 1, whole=True)
