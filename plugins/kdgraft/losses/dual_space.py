"""Dual-space knowledge distillation (DSKD): both models' hidden states pass through the same output layer, in each model's space.

Zhang et al., "Dual-Space Knowledge Distillation for Large Language Models", EMNLP 2024, arXiv 2406.17328.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import DistillError
from .divergences import generalized_jsd, reverse_kl, skewed_kl
from .reduction import Reduction, reduce_loss, same_shape, upcast
from .soft_targets import check_temperature, soft_targets


def _forward_kl(student: Tensor, teacher: Tensor, temperature: float, **settings: Any) -> Tensor:
    return soft_targets(student, teacher, temperature, **settings) / temperature**2


DIVERGENCES: dict[str, Callable[..., Tensor]] = {
    "forward_kl": _forward_kl,
    "reverse_kl": reverse_kl,
    "jsd": lambda student, teacher, t, **settings: generalized_jsd(student, teacher, 0.5, t, **settings),
    "skewed_kl": lambda student, teacher, t, **settings: skewed_kl(student, teacher, 0.1, t, **settings),
    "skewed_reverse_kl": lambda student, teacher, t, **settings: skewed_kl(
        student, teacher, 0.1, t, reverse=True, **settings
    ),
}
"""The divergences of the paper by name, of (student, teacher, temperature), without the factor T²."""


def dual_space(
    student_logits: Tensor,
    projected_logits: Tensor,
    targets: Tensor,
    temperature: float = 2.0,
    *,
    divergence: str = "forward_kl",
    correct_only: bool = False,
    weight: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""DSKD in the student's space: the projection learns to predict the text, and the student learns from it (2024).

    .. math:: D\big(\mathrm{sg}(p^{t \to s}), q\big) - \log p^{t \to s}(x^*)

    The divergence reaches the student's logits only, and the cross-entropy, of temperature 1, the projection only. The loss in
    the teacher's space is the forward KL of the teacher's own logits and those of the student's projected states.

    Args:
        student_logits: ``(…, V)``: the student's own.
        projected_logits: ``(…, V)``: those of the teacher's states, projected, through the student's output layer.
        targets: ``(…,)``: the correct entries.
        temperature: T > 0 of the divergence, without the factor T².
        divergence: one of :data:`DIVERGENCES`.
        correct_only: leave out the divergence where the projection predicts a wrong token, as the authors do between different
            tokenizers.
        weight: item weights that broadcast to the shape without the last dimension.
        reduction: over items.
    """
    same_shape(student_logits, projected_logits, "dual_space")
    check_temperature(temperature)
    if divergence not in DIVERGENCES:
        raise DistillError(f"divergence must be one of {', '.join(DIVERGENCES)}, got {divergence!r}")
    projected = upcast(projected_logits)
    hard = F.cross_entropy(projected.flatten(0, -2), targets.flatten(), reduction="none").view(targets.shape)
    soft = DIVERGENCES[divergence](student_logits, projected.detach(), temperature, reduction="none")
    if correct_only:
        soft = soft * (projected.argmax(-1) == targets)
    return reduce_loss(hard + soft, weight, reduction)


def cross_model_attention(query: Tensor, key: Tensor, query_valid: Tensor, key_valid: Tensor) -> tuple[Tensor, Tensor]:
    r"""Attention between the tokens of two models (DSKD 2024, section 3.3), in both directions.

    Args:
        query: ``(B, L_s, 2C)``: the student's projected embeddings of each token and the one after it.
        key: ``(B, L_t, 2C)``: the teacher's.
        query_valid, key_valid: ``(B, L_s)`` and ``(B, L_t)``, true for tokens that count.

    Returns:
        Weights ``(B, L_s, L_t)`` of the teacher's tokens for each of the student's, and ``(B, L_t, L_s)`` of the student's for
        each of the teacher's. The weights of tokens that do not count are 0, and so are all weights of a token that has none to
        attend to.
    """
    query, key = upcast(query), upcast(key)
    with torch.autocast(query.device.type, enabled=False):
        scores = query @ key.transpose(-1, -2) / math.sqrt(key.shape[-1])
    valid = query_valid[..., :, None] & key_valid[..., None, :]
    low = torch.finfo(scores.dtype).min
    scores = scores.masked_fill(~valid, low)
    of_student = scores.softmax(-1).masked_fill(~valid, 0)
    of_teacher = scores.transpose(-1, -2).softmax(-1).masked_fill(~valid.transpose(-1, -2), 0)
    return of_student, of_teacher
