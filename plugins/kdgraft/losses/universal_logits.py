"""Universal logit distillation: comparison of logits over different vocabularies.

Boizard et al., "Towards Cross-Tokenizer Distillation: the Universal Logit Distillation Loss for LLMs", 2024, arXiv 2402.12030,
equation 5.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ..errors import DistillError
from .reduction import Reduction, reduce_loss, upcast


def universal_logits(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    student_share: Tensor | None = None,
    teacher_share: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Universal logit distillation (ULD): L1 distance of the sorted probabilities, for any two vocabularies (2024).

    .. math:: \sum_i \left| p_s^{(i)} - p_t^{(i)} \right|

    Both lists of probabilities are sorted in descending order, and the shorter one is padded with zeros. This is the Wasserstein
    distance between the two under a uniform cost.

    Args:
        student_logits: ``(…, V_s)``.
        teacher_logits: ``(…, V_t)``, the same shape but for the last dimension.
        student_share, teacher_share: ``(…,)``: factors of the probabilities, such as the probability of the tokens before the
            last one of a group; see :func:`~kdgraft.losses.gold`.
        weight: item weights that broadcast to the shape without the last dimension.
        reduction: over items.
    """
    check_vocabularies(student_logits, teacher_logits, "universal_logits")
    student, teacher = (
        shared_out(upcast(logits).softmax(-1), share)
        for logits, share in ((student_logits, student_share), (teacher_logits, teacher_share))
    )
    return reduce_loss(sorted_distance(student, teacher), weight, reduction)


def check_vocabularies(student: Tensor, teacher: Tensor, loss: str) -> None:
    """Raise a :class:`DistillError` unless the shapes are equal before the last dimension."""
    if student.shape[:-1] != teacher.shape[:-1]:
        raise DistillError(
            f"{loss}: student {tuple(student.shape)} and teacher {tuple(teacher.shape)} must have the same shape before the vocabulary"
        )


def shared_out(probabilities: Tensor, share: Tensor | None) -> Tensor:
    """Multiply the probabilities ``(…, V)`` of each item by its share ``(…,)``."""
    return probabilities if share is None else probabilities * share[..., None]


def sorted_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Compute the L1 distance per item between lists of numbers, sorted in descending order and padded with zeros."""
    student, teacher = (x.sort(-1, descending=True).values for x in (student, teacher))
    missing = teacher.shape[-1] - student.shape[-1]
    student, teacher = F.pad(student, (0, max(missing, 0))), F.pad(teacher, (0, max(-missing, 0)))
    return (student - teacher).abs().sum(-1)
