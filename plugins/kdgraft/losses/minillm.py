"""MiniLLM: the gradient of the reverse KL of whole texts, on texts that the student, or student and teacher, wrote.

Gu et al., "MiniLLM: Knowledge Distillation of Large Language Models", ICLR 2024, arXiv 2306.08543, section 2.2; code in
microsoft/LMOps, ``minillm``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import DistillError, check_number, check_share
from .divergences import reverse_kl
from .reduction import same_shape, upcast
from .soft_targets import check_temperature


def minillm(
    student_logits: Tensor,
    teacher_logits: Tensor,
    tokens: Tensor,
    texts: Tensor,
    mix: float = 0.0,
    temperature: float = 1.0,
    *,
    long_term: bool = True,
    length_norm: bool = True,
    clip: float | None = 0.2,
) -> Tensor:
    r"""MiniLLM per token: a loss whose *gradient* is that of the reverse KL of whole texts (2024, section 2.2).

    .. math:: w_t \left[ \mathrm{KL}(q_t \,\|\, p_t) - \frac{q_t(y_t)}{\bar q_t(y_t)} R_{t+1} \right], \quad
              w_t = \frac{q_t(y_t)}{\alpha p_t(y_t) + (1 - \alpha) q_t(y_t)}, \quad
              R_{t+1} = \frac{1}{T - t} \sum_{t' > t} \log \frac{p_{t'}(y_{t'})}{q_{t'}(y_{t'})}

    for student q, teacher p and tokens y that were drawn from α·p + (1 − α)·q. The first part, of the single step, is an exact
    expectation over the vocabulary; the second is the policy gradient by what follows the token. w, R and the denominator q̄
    have no gradient.

    Args:
        student_logits, teacher_logits: ``(n, V)``: of the tokens of several texts, one after another.
        tokens: ``(n,)``: the token that was drawn by each.
        texts: ``(n,)``: the number of each token's text, ascending.
        mix: α in [0, 1): the teacher's share in the distribution from which the tokens were drawn.
        temperature: T > 0, divides both logits: that at which the tokens were drawn.
        long_term: add the second part.
        length_norm: take the mean over the tokens that follow, as above; false: their sum. Without it the gradient favours short
            texts. The paper divides by one token less, by 0 where one token follows; the authors' code by their number, as here.
        clip: ε of PPO: the factor w·q/q̄ of the second part counts within [1 − ε, 1 + ε] only, by the pessimistic one of both
            values, as in the authors' code; ``None``: it is not clipped.

    Returns:
        The items ``(n,)``. Their values are no divergence (the second part may be negative); their gradients are what counts.
    """
    same_shape(student_logits, teacher_logits, "minillm")
    check_mix("minillm", mix)
    check_temperature(temperature)
    if tokens.shape != student_logits.shape[:-1] or texts.shape != tokens.shape:
        raise DistillError(
            f"minillm: tokens and texts must be {tuple(student_logits.shape[:-1])}, got {tuple(tokens.shape)} and {tuple(texts.shape)}"
        )
    logs = (F.log_softmax(upcast(logits) / temperature, -1) for logits in (student_logits, teacher_logits))
    # A token that one model holds impossible has a finite, if enormous, ratio.
    student, teacher = (log.gather(-1, tokens[:, None])[:, 0].clamp(min=torch.finfo(log.dtype).min / 4) for log in logs)
    with torch.no_grad():
        weight = importance(student, teacher, mix)
        reward = future_reward(teacher - student, texts, length_norm)
    items = weight * reverse_kl(student_logits, teacher_logits, temperature, reduction="none")
    return items + policy_loss(student, reward, weight, clip) if long_term else items


def check_mix(owner: str, mix: float) -> None:
    """Raise a :class:`DistillError` unless ``mix`` is a share in [0, 1)."""
    check_share(owner, "mix", mix)
    if mix == 1:
        raise DistillError(f"{owner}: mix must be below 1, where the student has no part in the texts")


def importance(student: Tensor, teacher: Tensor, mix: float) -> Tensor:
    """Return the importance weights w = q / (α·p + (1 − α)·q) of tokens, at most 1 / (1 − α).

    Args:
        student, teacher: ``(n,)``: log-probabilities of the tokens that were drawn.
        mix: α.
    """
    if not mix:
        return torch.ones_like(student)
    # In this form neither the ratio of the probabilities nor its inverse overflows.
    return torch.sigmoid(student - teacher - torch.logit(torch.tensor(float(mix)).to(student))) / (1 - mix)


def future_reward(ratios: Tensor, texts: Tensor, length_norm: bool = True) -> Tensor:
    """Return, for each token, the mean (or the sum) of the log-ratios of the tokens that follow it in its text; 0 for the last.

    Args:
        ratios: ``(n,)``: log p(y) − log q(y) of the tokens of several texts, one after another.
        texts: ``(n,)``: the number of each token's text, ascending.
        length_norm: divide by the number of tokens that follow.
    """
    if not len(ratios):
        return ratios
    # In double precision, as the sums over a text are differences of those over all texts.
    total = ratios.double().cumsum(0)
    last = torch.searchsorted(texts.contiguous(), texts.contiguous(), right=True) - 1
    count = last - torch.arange(len(ratios), device=ratios.device)
    found = total[last] - total
    return (found / count.clamp(min=1) if length_norm else found).to(ratios)


def policy_loss(logs: Tensor, reward: Tensor, weight: Tensor, clip: float | None = 0.2) -> Tensor:
    """Return PPO's loss of tokens whose texts were drawn by the present student, whose weights begin at the importance.

    Args:
        logs: ``(n,)``: the student's log-probabilities of the tokens, with gradient.
        reward: ``(n,)``: what a token brings.
        weight: ``(n,)``: the importance of each token.
        clip: ε; ``None``: the factor is not clipped.
    """
    factor = (logs - logs.detach()).exp() * weight
    if clip is None:
        return -reward * factor
    check_number("minillm", "clip", clip, above=True)
    return torch.maximum(-reward * factor, -reward * factor.clamp(1 - clip, 1 + clip))
