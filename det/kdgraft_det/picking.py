"""Predictions of dense heads at chosen priors, and levels joined to rows of priors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def pick(levels: Sequence[Tensor], chosen: Tensor, num_priors: int) -> Tensor:
    """Return the predictions at chosen priors, without a copy of all the others.

    Args:
        levels: the output of each level, ``(B, A·C, H, W)``.
        chosen: ``(B, N)`` mask over the priors of all levels, position by position.
        num_priors: A, the number of priors of a position.

    Returns:
        ``(K, C)``, level by level, and within a level in the order of ``chosen``.
    """
    rows = []
    counts = [level.shape[-2] * level.shape[-1] * num_priors for level in levels]
    for level, mask in zip(levels, chosen.split(counts, 1), strict=True):
        image, prior = mask.nonzero(as_tuple=True)
        position, width = prior // num_priors, level.shape[-1]
        by_prior = level.unflatten(1, (num_priors, -1))
        rows.append(by_prior[image, prior % num_priors, :, position // width, position % width])
    return torch.cat(rows)


def in_rows(level: Tensor, count: int) -> Tensor:
    """Reshape a level ``(B, A·C, H, W)`` to ``(B, count, C)`` in float32, in the order of its H·W·A priors."""
    return level.permute(0, 2, 3, 1).reshape(len(level), count, -1).float()


def joint_logits(classes: Tensor, objectness: Tensor) -> Tensor:
    """Return the logit of the product of two probabilities that are given as logits of broadcasting shapes."""
    a, b = torch.broadcast_tensors(classes, objectness)
    # 1 / (pq) - 1 = e^-a + e^-b + e^-(a+b)
    return -torch.logsumexp(torch.stack([-a, -b, -(a + b)]), 0)


def pick_weights(weights: Tensor, chosen: Tensor, num_per_level: Sequence[int]) -> Tensor:
    """Return the weights ``(B, N)`` at the chosen priors, ``(K,)``, in the order of :func:`pick`."""
    counts = list(num_per_level)
    return torch.cat([w[m] for w, m in zip(weights.split(counts, 1), chosen.split(counts, 1), strict=True)])


def in_order_of_pick(chosen: Tensor, num_per_level: Sequence[int], *, images: bool = False) -> Tensor:
    """Return the index (of N) of each chosen prior in the order of :func:`pick`, ``(K,)``, or with ``images`` its image's."""
    places = torch.arange(chosen.shape[0 if images else 1], device=chosen.device)
    places = (places[:, None] if images else places).expand_as(chosen)
    return pick_weights(places, chosen, num_per_level)


def edges_of(centres: Tensor, distances: Tensor) -> Tensor:
    """Return boxes ``(K, 4)``, given centres ``(K, 2)`` and the distances to the left, top, right and bottom edge ``(K, 4)``."""
    return torch.cat([centres - distances[:, :2], centres + distances[:, 2:]], 1)


def row_of(levels: Sequence[Tensor], images: int, width: int | None = None) -> Tensor:
    """Join all levels to ``(B, N)`` or ``(B, N, width)``."""
    shape = (images, -1) if width is None else (images, -1, width)
    return torch.cat([level.reshape(shape) for level in levels], 1)


def side_of(stride: Any) -> int:
    """Return the stride of a level, which hosts store as a number or as a pair."""
    return stride[0] if isinstance(stride, (tuple, list)) else stride
