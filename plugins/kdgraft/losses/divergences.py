"""Divergences between next-token distributions: reverse KL, generalised Jensen-Shannon, skewed KL.

Agarwal et al., "On-Policy Distillation of Language Models" (GKD), 2023, arXiv 2306.13649, section 2; Gu et al., "MiniLLM", 2023,
arXiv 2306.08543, for the reverse direction; Ko et al., "DistiLLM", 2024, arXiv 2402.03898, section 3.1, for skewed KL.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import DistillError, check_share
from ..registry import LOSSES
from .reduction import Reduction, reduce_loss, same_shape, upcast
from .soft_targets import check_temperature


@LOSSES.register
def reverse_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: float = 1.0,
    *,
    dim: int = -1,
    weight: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Reverse KL: penalises the student's mass where the teacher has none (mode seeking; MiniLLM 2023).

    .. math:: \mathrm{KL}(p_s^T \,\|\, p_t^T)

    Args:
        student_logits, teacher_logits: ``(…, C, …)`` with the classes at ``dim``, the same shape.
        temperature: T > 0, divides both logits. As in the papers on language models there is no factor T².
        dim: the class dimension.
        weight: item weights that broadcast to the shape without ``dim``.
        reduction: over items.
    """
    student, teacher = _log_probabilities(student_logits, teacher_logits, temperature, dim, "reverse_kl")
    return reduce_loss(_kl(student, teacher, dim), weight, reduction)


@LOSSES.register
def generalized_jsd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    beta: float = 0.5,
    temperature: float = 1.0,
    *,
    dim: int = -1,
    weight: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Generalised Jensen-Shannon divergence between the two distributions (GKD 2023, equation 1).

    .. math:: \beta\,\mathrm{KL}(p_t \| m) + (1-\beta)\,\mathrm{KL}(p_s \| m),\quad m = \beta p_t + (1-\beta) p_s

    It is bounded; divided by β it tends to the forward KL for β → 0, divided by 1 − β to the reverse KL for β → 1. At β = 0 and
    β = 1 it *is* that KL, as in the usual implementations (the formula gives 0 there).

    Args:
        student_logits, teacher_logits: ``(…, C, …)`` with the classes at ``dim``, the same shape.
        beta: in [0, 1].
        temperature: T > 0, divides both logits; no factor T².
        dim, weight, reduction: as in :func:`reverse_kl`.
    """
    check_share("generalized_jsd", "beta", beta)
    student, teacher = _log_probabilities(student_logits, teacher_logits, temperature, dim, "generalized_jsd")
    return reduce_loss(jsd_of_logs(student, teacher, beta, dim), weight, reduction)


def jsd_of_logs(student: Tensor, teacher: Tensor, beta: float, dim: int) -> Tensor:
    """Compute :func:`generalized_jsd` per item from log-probabilities, which need not be normalised."""
    if beta == 0:
        return _kl(teacher, student, dim)
    if beta == 1:
        return _kl(student, teacher, dim)
    mixture = torch.logaddexp(teacher + math.log(beta), student + math.log1p(-beta))
    return beta * _kl(teacher, mixture, dim) + (1 - beta) * _kl(student, mixture, dim)


@LOSSES.register
def skewed_kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    alpha: float = 0.1,
    temperature: float = 1.0,
    *,
    reverse: bool = False,
    dim: int = -1,
    weight: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Skewed KL: KL to a mixture with a small share of the first distribution, which bounds it (DistiLLM 2024).

    .. math:: \mathrm{KL}(p_t \,\|\, \alpha p_t + (1-\alpha) p_s), \quad
              \text{reverse: } \mathrm{KL}(p_s \,\|\, \alpha p_s + (1-\alpha) p_t)

    Args:
        student_logits, teacher_logits: ``(…, C, …)`` with the classes at ``dim``, the same shape.
        alpha: in [0, 1); 0 is the plain KL.
        temperature: T > 0, divides both logits; no factor T².
        reverse: take the student's distribution, rather than the teacher's, as the first one.
        dim, weight, reduction: as in :func:`reverse_kl`.
    """
    check_share("skewed_kl", "alpha", alpha)
    if alpha == 1:
        raise DistillError("skewed_kl: alpha must be below 1, where the loss would be 0 for any student")
    student, teacher = _log_probabilities(student_logits, teacher_logits, temperature, dim, "skewed_kl")
    first, second = (student, teacher) if reverse else (teacher, student)
    if alpha:
        second = torch.logaddexp(first + math.log(alpha), second + math.log1p(-alpha))
    return reduce_loss(_kl(first, second, dim), weight, reduction)


def _log_probabilities(
    student: Tensor, teacher: Tensor, temperature: float, dim: int, loss: str
) -> tuple[Tensor, Tensor]:
    same_shape(student, teacher, loss)
    check_temperature(temperature)
    # Some models give impossible tokens the logit −∞; the gradient of logaddexp(−∞, −∞) is NaN.
    logs = (F.log_softmax(upcast(logits) / temperature, dim) for logits in (student, teacher))
    found = [log.clamp(min=torch.finfo(log.dtype).min / 4) for log in logs]
    return found[0], found[1]


def _kl(first: Tensor, second: Tensor, dim: int) -> Tensor:
    """Compute KL(first ‖ second) from log-probabilities; a class with probability 0 in both adds nothing."""
    p = first.exp()
    return (p * (first - second).masked_fill(p == 0, 0)).sum(dim)
