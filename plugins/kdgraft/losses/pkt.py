"""Probabilistic knowledge transfer (PKT): the probabilities with which samples are each other's neighbours.

Passalis, Tefas, "Learning Deep Representations with Probabilistic Knowledge Transfer", ECCV 2018, arXiv 1803.10837, equations 2,
3 and 5.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ..errors import DistillError
from .reduction import Reduction
from .relations import between_samples, cosine, relations

EPS = 1e-7
"""Added to probabilities, of which some are 0; the authors' code adds it before the logarithm only."""


def pkt(
    student: Tensor,
    teacher: Tensor,
    *,
    variant: Literal["code", "paper"] = "code",
    valid: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Probabilistic knowledge transfer (PKT): KL(teacher ‖ student) of each sample's neighbours (Passalis & Tefas 2018, eq. 5).

    .. math:: \sum_{i,j} p_{j|i} \log\frac{p_{j|i}}{q_{j|i}}, \qquad p_{j|i} = \frac{K_{ij}}{\sum_k K_{ik}}, \quad
              K_{ij} = \tfrac12 (\cos(x_i, x_j) + 1)

    The lengths of the vectors do not matter.

    Args:
        student: ``(B, C_s)``, one vector per sample.
        teacher: ``(B, C_t)``; the widths may differ.
        variant: ``"code"`` counts each sample as its own neighbour and takes the mean over the N² pairs, as the authors' code
            does; ``"paper"`` leaves i = j out and adds up over j.
        valid: ``(B,)``, > 0 for the samples to include; all by default.
        reduction: over samples i; ``"none"`` gives ``(B,)``.

    Raises:
        DistillError: the two do not hold the same samples, or the variant is unknown.
    """
    if variant not in ("code", "paper"):
        raise DistillError(f"variant must be 'code' or 'paper', got {variant!r}")

    def similarity(items: Tensor, others: Tensor) -> Tensor:
        found = ((cosine(items, others) + 1) / 2).clamp(min=0)
        if variant == "paper":
            found = found.masked_fill(torch.eye(len(items), dtype=torch.bool, device=items.device), 0)
        return found / found.sum(-1, keepdim=True).clamp(min=EPS)

    def compute(s: Tensor, t: Tensor) -> Tensor:
        # Vectors of one sign are almost parallel, and their KL is below float32's rounding.
        found = relations(s.double(), t.double(), similarity, _divergence).to(s.dtype)
        return found / len(s) if variant == "code" else found

    return between_samples("pkt", student, teacher, compute, valid, reduction)


def _divergence(student: Tensor, teacher: Tensor, valid: Tensor | None) -> Tensor:
    student, teacher = student + EPS, teacher + EPS
    return (teacher * (teacher.log() - student.log())).sum(-1)
