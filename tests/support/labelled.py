"""Decoupled distillation written out with plain softmaxes, for the tests of every host."""

from __future__ import annotations

import torch
from torch import Tensor


def decoupled(
    student: Tensor, teacher: Tensor, labels: Tensor, temperature: float, alpha: float, beta: float
) -> Tensor:
    """The loss of each item, ``(N,)``, for logits ``(N, C)``."""
    p, q = ((x.double() / temperature).softmax(1) for x in (teacher, student))
    items = []
    for theirs, ours, label in zip(p, q, labels.tolist(), strict=True):
        rest = torch.arange(len(theirs)) != label
        binary = theirs[label] * (theirs[label] / ours[label]).log()
        binary = binary + (1 - theirs[label]) * ((1 - theirs[label]) / (1 - ours[label])).log()
        a, b = theirs[rest] / theirs[rest].sum(), ours[rest] / ours[rest].sum()
        items.append(temperature**2 * (alpha * binary + beta * (a * (a / b).log()).sum()))
    return torch.stack(items).float() if items else student.new_zeros(0)
