"""Logit standardization: the Z-scores of logits, so that their mean and range no longer count.

Sun, Ren, Li, Wang, Cao, "Logit Standardization in Knowledge Distillation", CVPR 2024, arXiv 2403.01427.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from ..errors import DistillError
from .reduction import upcast
from .scale import power_of_two

Standardize = bool | Literal["paper", "code"]


def standardized(
    logits: Tensor,
    *,
    dim: int = -1,
    present: Tensor | None = None,
    variant: Literal["paper", "code"] = "paper",
) -> Tensor:
    r"""Return the Z-scores of each item's logits over the classes (Sun et al. 2024, algorithm 1).

    .. math:: z'_c = \frac{z_c - \bar z}{\sigma(z) + 10^{-7}}

    Equal logits become 0, with the gradient of :math:`z_c - \bar z`.

    Args:
        logits: ``(…, C, …)`` with the classes at ``dim``.
        dim: the class dimension.
        present: ``(…, C, …)``, true for the classes that an item has; the others neither count nor change. All by default.
        variant: ``"paper"`` is :math:`\sigma^2 = \frac1C \sum_c (z_c - \bar z)^2`, ``"code"`` divides by :math:`C - 1`.

    Raises:
        DistillError: the variant is unknown.
    """
    if variant not in ("paper", "code"):
        raise DistillError(f"variant must be 'paper' or 'code', got {variant!r}")
    scores = upcast(logits)
    inside = torch.ones_like(scores, dtype=torch.bool) if present is None else present
    count = inside.sum(dim, keepdim=True)
    kept = scores.masked_fill(~inside, 0)
    centred = (kept - kept.sum(dim, keepdim=True) / count.clamp(min=1)).masked_fill(~inside, 0)
    divisor = count if variant == "paper" else count - 1
    # The squares of large logits would not fit in float32; the quotient does not depend on their scale.
    size = power_of_two(centred.detach().abs().amax(dim, keepdim=True)).clamp(min=1)
    variance = (centred / size).square().sum(dim, keepdim=True) / divisor.clamp(min=1)
    constant = variance == 0
    deviation = variance.masked_fill(constant, 1).sqrt()  # the root of 0 has no gradient
    found = centred / size / (deviation + (1e-7 / size).masked_fill(constant, 0))
    return found if present is None else torch.where(inside, found, scores)


def check_standardize(owner: str, value: Any) -> None:
    """Raise a :class:`DistillError` unless ``value`` is a bool, ``"paper"`` or ``"code"``."""
    if not isinstance(value, bool) and value not in ("paper", "code"):
        raise DistillError(f"{owner}: standardize must be true, false, 'paper' or 'code', got {value!r}")
