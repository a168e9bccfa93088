"""Attention mimicry: the student's attention scores, or their distributions, follow the teacher's.

Jiao et al., "TinyBERT", 2020, arXiv 1909.10351, equation 7 (scores before the softmax); Sun et al., "MobileBERT", 2020,
arXiv 2004.02984, equation 2 (distributions); Wang et al., "MiniLM", 2020, arXiv 2002.10957, equation 4.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .reduction import Reduction, reduce_loss, same_shape, upcast


def attention_scores(
    student_scores: Tensor,
    teacher_scores: Tensor,
    *,
    weight: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Attention scores: squared error before the softmax, per pair of tokens (TinyBERT 2020, equation 7).

    .. math:: (A_s - A_t)^2

    The paper's code sets padded entries to zero in both models and averages over all entries, including padding, so that its loss
    shrinks with more padding; here entries with weight 0 are excluded.

    Args:
        student_scores, teacher_scores: QKᵀ/√d, ``(B, H, L, L)`` or any other common shape.
        weight: entry weights that broadcast to the scores; 0 for masked entries.
        reduction: over entries.
    """
    same_shape(student_scores, teacher_scores, "attention_scores")
    if weight is not None:  # before the square, as masked entries may be infinite
        masked = (weight == 0).expand_as(student_scores)
        student_scores, teacher_scores = student_scores.masked_fill(masked, 0), teacher_scores.masked_fill(masked, 0)
    return reduce_loss((upcast(student_scores) - upcast(teacher_scores)).square(), weight, reduction)


def attention_distributions(
    student_scores: Tensor,
    teacher_scores: Tensor,
    *,
    valid: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Attention distributions: KL over the keys, per query (MobileBERT 2020, equation 2; MiniLM 2020, equation 4).

    .. math:: \mathrm{KL}(\mathrm{softmax}(A_t) \,\|\, \mathrm{softmax}(A_s))

    Args:
        student_scores, teacher_scores: ``(…, Q, K)``, the same shape: scores before the softmax.
        valid: true for the keys that a query may attend to; broadcasts to the scores; ``None`` for all. A query without keys
            gives 0.
        weight: query weights that broadcast to ``(…, Q)``.
        reduction: over queries.
    """
    same_shape(student_scores, teacher_scores, "attention_distributions")
    log_student = masked_log_softmax(upcast(student_scores), valid)
    log_teacher = masked_log_softmax(upcast(teacher_scores), valid)
    items = log_teacher.exp() * (log_teacher - log_student)
    if valid is not None:
        items = items.masked_fill(~valid.bool(), 0)
    return reduce_loss(items.sum(-1), weight, reduction)


def masked_log_softmax(scores: Tensor, valid: Tensor | None) -> Tensor:
    """Compute the log-softmax over the valid entries of the last dimension; the result is finite everywhere."""
    if valid is None:
        return scores.log_softmax(-1)
    return scores.masked_fill(~valid.bool(), torch.finfo(scores.dtype).min).log_softmax(-1)
