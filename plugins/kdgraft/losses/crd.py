"""Contrastive representation distillation (CRD): a sample's two embeddings are told from those of other samples.

Tian, Krishnan, Isola, "Contrastive Representation Distillation", ICLR 2020, arXiv 1910.10699, equations 9, 18 and 19.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import DistillError
from .reduction import Reduction, reduce_loss, upcast
from .relations import cosine
from .scale import unit
from .soft_targets import check_temperature


def crd(
    student: Tensor,
    teacher: Tensor,
    negatives: Tensor,
    *,
    temperature: float = 0.07,
    mean: float | None = None,
    others: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Contrastive representation distillation (CRD): noise-contrastive loss of embeddings (Tian et al. 2020, eq. 9 and 18).

    .. math:: -\log h(s_i, t_i) - \sum_{k=1}^{K} \log\big(1 - h(s_i, n_k)\big), \qquad
              h(a, b) = \frac{e^{\cos(a, b) / \tau}}{e^{\cos(a, b) / \tau} + K \mu}

    The symmetric loss is ``crd(student, teacher, …) + crd(teacher, student, …)``, each with negatives of the second model.

    Args:
        student: the anchors ``(N, C)``.
        teacher: the other model's embeddings of the same samples ``(N, C)``.
        negatives: embeddings ``(M, C)`` of other samples by the second model.
        temperature: τ > 0.
        mean: μ, the mean of exp(cos / τ) over noise. The authors' code takes that of the first batch to random vectors, Z / n;
            ``None`` is its expectation, exp(1 / (2 C τ²)).
        others: ``(N, M)``, false for negatives to leave out, such as those of the same sample; K counts the others.
        weight: weights ``(N,)`` of the samples.
        reduction: over samples; a sample without negatives costs 0.

    Raises:
        DistillError: the embeddings do not have the same width, or the temperature is not positive.
    """
    check_temperature(temperature)
    if student.ndim != 2 or student.shape != teacher.shape or negatives.shape[1:] != student.shape[1:]:
        raise DistillError(
            f"crd: student {tuple(student.shape)} and teacher {tuple(teacher.shape)} must have the same shape (N, C), and negatives "
            f"{tuple(negatives.shape)} that width"
        )
    if mean is None:
        mean = math.exp(1 / (2 * student.shape[1] * temperature**2))
    with torch.autocast(student.device.type, enabled=False):
        own = (unit(upcast(student), 1) * unit(upcast(teacher), 1)).sum(1) / temperature
        other = cosine(student, negatives).to(own.dtype) / temperature
        known = torch.ones_like(other, dtype=torch.bool) if others is None else others.bool()
        count = known.sum(1)
        noise = count.clamp(min=1).to(own.dtype).log() + math.log(mean)
        apart = -F.logsigmoid(noise[:, None] - other).masked_fill(~known, 0).sum(1)
        items = apart - F.logsigmoid(own - noise)
        items = items.masked_fill((count == 0) & items.isfinite(), 0)  # masked, NaN would still be its gradient
    return reduce_loss(items, weight, reduction)
