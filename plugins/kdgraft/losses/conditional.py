"""Conditional adversarial distillation: a critic of class scores also predicts the true class, which both sides are to show.

Xu, Hsu, Huang, "Training Shallow and Thin Networks for Acceleration via Knowledge Distillation with Conditional Adversarial
Networks", 2017, arXiv 1709.00513, section 3.3; the auxiliary classifier is that of AC-GAN (Odena et al. 2016, arXiv 1610.09585).
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ..errors import DistillError
from .reduction import Reduction, reduce_loss, same_shape, upcast


def conditional_critic_loss(real: Tensor, fake: Tensor, labels: Tensor, *, reduction: Reduction = "mean") -> Tensor:
    r"""Critic's loss of conditional adversarial distillation: real or fake, and the class of both (Xu et al. 2017).

    .. math:: -\log P(\text{real} \mid t) - \log P(\text{fake} \mid s) - \log P(y \mid t) - \log P(y \mid s)

    Args:
        real, fake: the critic's outputs ``(N, C + 2)`` for the teacher's and the student's scores: the logits of C classes, then
            those of "real" and "fake", with a softmax over each group.
        labels: the true classes ``(N,)``.
        reduction: over items.
    """
    same_shape(fake, real, "conditional_critic_loss")
    items = _verdict(real, 0) + _verdict(fake, 1) + _class(real, labels) + _class(fake, labels)
    return reduce_loss(items, None, reduction)


def conditional_adversarial(fake: Tensor, labels: Tensor, *, reduction: Reduction = "mean") -> Tensor:
    r"""Student's loss of conditional adversarial distillation, in the form that does not saturate.

    .. math:: -\log P(\text{real} \mid s) - \log P(y \mid s)

    Args:
        fake: the critic's outputs ``(N, C + 2)`` for the student's scores, with their graph.
        labels: the true classes ``(N,)``.
        reduction: over items.
    """
    return reduce_loss(_verdict(fake, 0) + _class(fake, labels), None, reduction)


def _verdict(outputs: Tensor, side: int) -> Tensor:
    """Return the cross-entropy ``(N,)`` of the verdict "real" (0) or "fake" (1)."""
    return -F.log_softmax(upcast(outputs)[:, -2:], 1)[:, side]


def _class(outputs: Tensor, labels: Tensor) -> Tensor:
    """Return the cross-entropy ``(N,)`` of the true class."""
    if labels.shape != outputs.shape[:1]:
        raise DistillError(
            f"labels {tuple(labels.shape)} must be one for each item of the outputs {tuple(outputs.shape)}"
        )
    return F.cross_entropy(upcast(outputs)[:, :-2], labels, reduction="none")
