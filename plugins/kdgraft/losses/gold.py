"""GOLD: language models of different vocabularies, compared entry by entry where they share tokens, and by ULD elsewhere.

Patiño et al., "Unlocking On-Policy Distillation for Any Model Family" (General On-policy Logit Distillation), Hugging Face 2025;
code in ``trl.experimental.gold``, which extends ULD (arXiv 2402.12030) by the groups of tokens and by the shared entries.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import DistillError, check_share
from .divergences import jsd_of_logs
from .reduction import Reduction, reduce_loss, upcast
from .universal_logits import check_vocabularies, shared_out, sorted_distance

FLOOR = 1e-8
"""The least probability of a shared entry in the divergence, as in TRL; below it there is no gradient."""


def gold(
    student_logits: Tensor,
    teacher_logits: Tensor,
    shared: Tensor,
    *,
    student_share: Tensor | None = None,
    teacher_share: Tensor | None = None,
    beta: float = 0.5,
    shared_weight: float | None = None,
    weight: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""GOLD: generalised Jensen-Shannon divergence on the shared entries, ULD's sorted distance on the others (2025).

    .. math:: w \, \mathrm{JSD}_\beta(p_s^{shared}, p_t^{shared}) + (1 - w) \sum_i \left| p_s^{(i)} - p_t^{(i)} \right|

    The probabilities of the shared entries are not normalised anew.

    Args:
        student_logits: ``(…, V_s)``.
        teacher_logits: ``(…, V_t)``, the same shape but for the last dimension.
        shared: ``(M, 2)``: the entries (student, teacher) of the same token in both vocabularies.
        student_share, teacher_share: ``(…,)``: factors of the probabilities of items that stand for groups of tokens: the
            probability of the group's other tokens.
        beta: of :func:`~kdgraft.losses.generalized_jsd`: 0 is the forward, 1 the reverse KL.
        shared_weight: w in [0, 1]; by default the part of the teacher's vocabulary that is shared, M / V_t.
        weight: item weights that broadcast to the shape without the last dimension.
        reduction: over items.
    """
    check_vocabularies(student_logits, teacher_logits, "gold")
    check_share("gold", "beta", beta)
    if shared.ndim != 2 or shared.shape[-1] != 2:
        raise DistillError(f"gold: shared must be (M, 2), got {tuple(shared.shape)}")
    part = len(shared) / teacher_logits.shape[-1] if shared_weight is None else shared_weight
    check_share("gold", "shared_weight", part)
    student, teacher = (
        shared_out(upcast(logits).softmax(-1), share)
        for logits, share in ((student_logits, student_share), (teacher_logits, teacher_share))
    )
    common, others = [], []
    for probabilities, entries in ((student, shared[:, 0]), (teacher, shared[:, 1])):
        common.append(probabilities[..., entries].clamp(min=FLOOR).log())
        rest = torch.ones(probabilities.shape[-1], dtype=torch.bool, device=probabilities.device)
        rest[entries] = False
        others.append(probabilities[..., rest])
    items = part * jsd_of_logs(common[0], common[1], beta, -1)
    if others[0].shape[-1] and others[1].shape[-1]:
        items = items + (1 - part) * sorted_distance(others[0], others[1])
    return reduce_loss(items, weight, reduction)
