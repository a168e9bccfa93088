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
        weight: item weights that broadcast to the shape without the last dimension.
        reduction: over items.
    """
    if student_logits.shape[:-1] != teacher_logits.shape[:-1]:
        raise DistillError(
            f"universal_logits: student {tuple(student_logits.shape)} and teacher {tuple(teacher_logits.shape)} must have "
            "the same shape before the vocabulary"
        )
    student, teacher = (
        upcast(logits).softmax(-1).sort(-1, descending=True).values for logits in (student_logits, teacher_logits)
    )
    missing = teacher.shape[-1] - student.shape[-1]
    student, teacher = F.pad(student, (0, max(missing, 0))), F.pad(teacher, (0, max(-missing, 0)))
    return reduce_loss((student - teacher).abs().sum(-1), weight, reduction)
