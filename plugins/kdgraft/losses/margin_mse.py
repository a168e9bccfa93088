"""Margin-MSE: the student learns by how much the teacher prefers the relevant candidate of a query, at any scale of scores.

Hofstätter et al., "Improving Efficient Neural Ranking Models with Cross-Architecture Knowledge Distillation", 2020,
arXiv 2010.02666, equation 5.
"""

from __future__ import annotations

from torch import Tensor

from ..errors import DistillError
from .reduction import Reduction, reduce_loss, same_shape, upcast


def margin_mse(
    student_scores: Tensor,
    teacher_scores: Tensor,
    *,
    weight: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Margin-MSE: squared error on the differences of scores within a query (2020, equation 5).

    .. math:: \big((s^+ - s^-) - (t^+ - t^-)\big)^2

    Any constant that is added to all scores of a query, by either model, changes nothing.

    Args:
        student_scores, teacher_scores: ``(…, K)``, the same shape: the scores of the K candidates of each query. The first one is
            the relevant candidate, whose margins to the other K − 1 are compared; the paper has K = 2.
        weight: weights of the queries, which broadcast to the shape without the last dimension.
        reduction: over queries; within a query the mean over the K − 1 margins is taken.
    """
    same_shape(student_scores, teacher_scores, "margin_mse")
    if not student_scores.shape[-1] > 1:
        raise DistillError(f"margin_mse needs two candidates or more of a query, got {tuple(student_scores.shape)}")
    student, teacher = (
        scores[..., :1] - scores[..., 1:] for scores in (upcast(student_scores), upcast(teacher_scores))
    )
    return reduce_loss((student - teacher).square().mean(-1), weight, reduction)
