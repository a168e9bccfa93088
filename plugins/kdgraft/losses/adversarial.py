"""Adversarial losses: a critic tells teacher from student, the student learns to pass for the teacher.

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
    r"""What the critic minimises.

    * ``"wgan-gp"``: :math:`D(s) - D(t)` (the gradient penalty is a term of its own, :func:`gradient_penalty`);
    * ``"lsgan"``: :math:`(D(t) - 1)^2 + D(s)^2`, the paper's without its ½;
    * ``"hinge"``: :math:`\max(0, 1 - D(t)) + \max(0, 1 + D(s))`.

    Args:
        real, fake: scores of teacher's and student's samples ``(B,)``.
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
    r"""What the student minimises: :math:`-D(s)`, or :math:`(D(s) - 1)^2` for ``"lsgan"``.

    Args:
        fake: scores of the student's samples ``(B,)``, with their graph.
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
        critic: maps ``(B, …)`` to scores ``(B,)``, each of its own sample alone (no batch normalisation).
        real, fake: samples ``(B, …)``; no gradient reaches them.
        mix: ``(B,)`` in [0, 1]: the share of ``real`` in each point.
        reduction: over the batch.
    """
    same_shape(fake, real, "gradient_penalty")
    real, fake = upcast(real), upcast(fake)  # 1e-12 below is 0 in half precision
    mix = mix.to(real.dtype).view(-1, *[1] * (real.ndim - 1))
    points = (mix * real.detach() + (1 - mix) * fake.detach()).requires_grad_()
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad(critic(points).sum(), points, create_graph=True)
    # The root's gradient at 0 is infinite; a critic that is flat somewhere must not turn to NaN.
    norm = (gradient.flatten(1).square().sum(1) + 1e-12).sqrt()
    return reduce_loss((norm - 1).square(), None, reduction)
