"""Similarity-preserving distillation (SP): samples that the teacher finds similar become similar to the student.

Tung, Mori, "Similarity-Preserving Knowledge Distillation", ICCV 2019, arXiv 1907.09682, equations 1 to 4.
"""

from __future__ import annotations

from torch import Tensor

from .reduction import Reduction
from .relations import between_samples, dot, relations, squared_difference
from .scale import unit


def similarity_preserving(
    student: Tensor, teacher: Tensor, *, valid: Tensor | None = None, reduction: Reduction = "mean"
) -> Tensor:
    r"""Similarity preserving (SP): squared difference of the normalised rows of the Gram matrices (Tung & Mori 2019, eq. 4).

    .. math:: \frac{1}{N^2} \|\tilde G_s - \tilde G_t\|_F^2, \qquad \tilde G_i = \frac{G_i}{\|G_i\|_2}, \quad G = X X^\top

    Neither a rotation nor a common factor of a model's vectors changes it. A row of zeros stays 0.

    Args:
        student: ``(B, C_s)``, one vector per sample; the paper takes whole maps, flattened.
        teacher: ``(B, C_t)``; the widths may differ.
        valid: ``(B,)``, > 0 for the samples to include; all by default.
        reduction: over rows; ``"none"`` gives ``(B,)``, each row's sum over N.

    Raises:
        DistillError: the two do not hold the same samples.
    """

    def compute(s: Tensor, t: Tensor) -> Tensor:
        return relations(s, t, _normalised_rows, squared_difference) / len(s)

    return between_samples("similarity_preserving", student, teacher, compute, valid, reduction)


def _normalised_rows(items: Tensor, others: Tensor) -> Tensor:
    return unit(dot(items, others), -1)
