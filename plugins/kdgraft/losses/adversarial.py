"""Adversarial losses: a critic distinguishes the teacher's samples from the student's, which learn to deceive it.

WGAN-GP: Gulrajani et al. 2017, arXiv 1704.00028. LSGAN: Mao et al. 2017, arXiv 1611.04076. Hinge: Lim & Ye 2017, arXiv
1705.02894. As holistic distillation of segmentation: Liu et al. 2019, arXiv 1903.04197, section 3.3.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import DistillError
from .reduction import Reduction, reduce_loss, same_shape, upcast

Adversary = Literal["wgan-gp", "lsgan", "hinge"]
ADVERSARIES = ("wgan-gp", "lsgan", "hinge")


def critic_loss(real: Tensor, fake: Tensor, kind: Adversary = "wgan-gp", *, reduction: Reduction = "mean") -> Tensor:
    r"""Critic's loss, by the kind of adversary.

    * ``"wgan-gp"``: :math:`D(s) - D(t)` (without the gradient penalty; see :func:`gradient_penalty`);
    * ``"lsgan"``: :math:`(D(t) - 1)^2 + D(s)^2`, the paper's without its ½;
    * ``"hinge"``: :math:`\max(0, 1 - D(t)) + \max(0, 1 + D(s))`.

    Args:
        real, fake: scores of the teacher's and the student's samples ``(B,)``.
        kind: the kind of adversary.
        reduction: over the batch.
    """
    same_shape(fake, real, "critic_loss")
    real, fake = upcast(real), upcast(fake)
    if kind == "wgan-gp":
        items = fake - real
    elif kind == "lsgan":
        items = (real - 1).square() + fake.square()
    elif kind == "hinge":
        items = F.relu(1 - real) + F.relu(1 + fake)
    else:
        raise DistillError(f"an adversary is one of {', '.join(ADVERSARIES)}, got {kind!r}")
    return reduce_loss(items, None, reduction)


def adversarial(fake: Tensor, kind: Adversary = "wgan-gp", *, reduction: Reduction = "mean") -> Tensor:
    r"""Student's adversarial loss: :math:`-D(s)`, or :math:`(D(s) - 1)^2` for ``"lsgan"``.

    Args:
        fake: scores of the student's samples ``(B,)``, with their graph.
        kind: the kind of adversary.
        reduction: over the batch.
    """
    if kind not in ADVERSARIES:
        raise DistillError(f"an adversary is one of {', '.join(ADVERSARIES)}, got {kind!r}")
    fake = upcast(fake)
    return reduce_loss((fake - 1).square() if kind == "lsgan" else -fake, None, reduction)


def gradient_penalty(
    critic: Callable[[Tensor], Tensor], real: Tensor, fake: Tensor, mix: Tensor, *, reduction: Reduction = "mean"
) -> Tensor:
    r"""WGAN-GP's penalty :math:`(\|\nabla_x D(x)\|_2 - 1)^2` at points between real and fake (Gulrajani et al., equation 3).

    Args:
        critic: maps ``(B, …)`` to scores ``(B,)``, each of which depends on its own sample only (no batch normalisation).
        real, fake: samples ``(B, …)``; they receive no gradient.
        mix: ``(B,)`` in [0, 1], the share of ``real`` in each point.
        reduction: over the batch.
    """
    same_shape(fake, real, "gradient_penalty")
    real, fake = upcast(real), upcast(fake)  # in half precision the 1e-12 below would be 0
    mix = mix.to(real.dtype).view(-1, *[1] * (real.ndim - 1))
    points = (mix * real.detach() + (1 - mix) * fake.detach()).requires_grad_()
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad(critic(points).sum(), points, create_graph=True)
    # The gradient of the root is infinite at 0; a critic that is constant somewhere must not cause NaN.
    norm = (gradient.flatten(1).square().sum(1) + 1e-12).sqrt()
    return reduce_loss((norm - 1).square(), None, reduction)
