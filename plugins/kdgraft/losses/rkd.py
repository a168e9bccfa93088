"""Relational knowledge distillation (RKD): distances between samples, and angles that triplets of samples form.

Park, Kim, Lu, Cho, "Relational Knowledge Distillation", CVPR 2019, arXiv 1904.05068, equations 5 to 9.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .reduction import Reduction
from .relations import angle, between_samples, distance, huber, relations


def rkd_distance(
    student: Tensor, teacher: Tensor, *, valid: Tensor | None = None, reduction: Reduction = "mean"
) -> Tensor:
    r"""Distance part of RKD: Huber's loss of the distances, each model's in units of their mean (Park et al. 2019, eq. 5 to 7).

    .. math:: \frac{1}{N^2} \sum_{i,j} h\big(d^s_{ij} - d^t_{ij}\big), \qquad d_{ij} = \frac{\|x_i - x_j\|_2}{\mu},
              \quad \mu = \text{mean of the positive distances}

    As in the authors' code the mean of the loss includes the pairs i = j. No rotation, translation or scaling of a model's vectors
    changes it.

    Args:
        student: ``(B, C_s)``, one vector per sample.
        teacher: ``(B, C_t)``; the widths may differ.
        valid: ``(B,)``, > 0 for the samples to include; all by default.
        reduction: over samples i; ``"none"`` gives ``(B,)``.

    Raises:
        DistillError: the two do not hold the same samples.
    """

    def compute(s: Tensor, t: Tensor) -> Tensor:
        return relations(s, t, _in_units_of_the_mean, huber) / len(s)

    return between_samples("rkd_distance", student, teacher, compute, valid, reduction)


def rkd_angle(
    student: Tensor, teacher: Tensor, *, valid: Tensor | None = None, reduction: Reduction = "mean"
) -> Tensor:
    r"""Angle part of RKD: Huber's loss of the cosines of the angles of triplets (Park et al. 2019, eq. 8 and 9).

    .. math:: \frac{1}{N^3} \sum_{i,j,k} h\big(\cos^s_{ijk} - \cos^t_{ijk}\big), \qquad
              \cos_{ijk} = \frac{(x_i - x_j)^\top (x_k - x_j)}{\|x_i - x_j\|_2 \|x_k - x_j\|_2}

    As in the authors' code the mean includes degenerate triplets, whose cosine is 0. It needs N² · (N + C) numbers. Samples that
    coincide in the student get a bounded gradient, where the authors' is divided by 1e-12.

    Args:
        student, teacher, valid: see :func:`rkd_distance`.
        reduction: over samples j, at which the angles lie; ``"none"`` gives ``(B,)``.

    Raises:
        DistillError: the two do not hold the same samples.
    """

    def compute(s: Tensor, t: Tensor) -> Tensor:
        return relations(s, t, angle, huber) / len(s) ** 2

    return between_samples("rkd_angle", student, teacher, compute, valid, reduction)


def _in_units_of_the_mean(items: Tensor, others: Tensor) -> Tensor:
    found = distance(items, others)
    mean = found.sum() / (found > 0).sum().clamp(min=1)
    return found / torch.where(mean > 0, mean, 1)
