"""Dark knowledge with permuted predictions (DKPP): the teacher's probabilities of all classes but its first, in a random order.

Furlanello, Lipton, Tschannen, Itti, Anandkumar, "Born Again Neural Networks", ICML 2018, arXiv 1805.04770, section 3.2, equation 10.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import DistillError


def permuted(logits: Tensor, keys: Tensor, *, dim: int = -1, present: Tensor | None = None) -> Tensor:
    """Permute each item's logits, except the largest one, which stays at its class (DKPP; Furlanello et al. 2018, equation 10).

    Args:
        logits: the teacher's logits ``(…, C, …)`` with the classes at ``dim``.
        keys: random integers in [0, 2⁶²) of the same shape. The k-th of the other classes, in the order of the classes, receives the logit
            of the class with the k-th smallest key.
        dim: the class dimension.
        present: ``(…, C, …)``, true for the classes that an item has; the logits of others stay where they are.

    Returns:
        The permuted logits, of the same shape.

    Raises:
        DistillError: the shapes differ.
    """
    if keys.shape != logits.shape:
        raise DistillError(
            f"permuted: keys {tuple(keys.shape)} must have the shape of the logits {tuple(logits.shape)}"
        )
    if not logits.numel():
        return logits
    rows, keys = logits.movedim(dim, -1), keys.movedim(dim, -1)
    first = rows.argmax(-1, keepdim=True)
    classes = torch.arange(rows.shape[-1], device=rows.device).expand_as(rows)
    # Both orders, of the places where logits go to and come from, begin with the largest and end with absent classes.
    limits = torch.iinfo(torch.int64)
    absent = None if present is None else ~present.movedim(dim, -1).expand_as(rows)
    to, of = (
        (order if absent is None else order.where(~absent, limits.max - rows.shape[-1] + classes))
        .scatter(-1, first, limits.min)
        .argsort(-1)
        for order in (classes, keys)
    )
    return torch.empty_like(rows).scatter(-1, to, rows.gather(-1, of)).movedim(-1, dim)
