"""One vector per sample: features pooled over the positions that count."""

from __future__ import annotations

import torch
from torch import Tensor


def mean_of_each(features: Tensor, weight: Tensor | None, texts: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the weighted mean over each sample's positions, in float32 or better.

    Args:
        features: states ``(B, L, C)`` or maps ``(B, C, H, W)``.
        weight: weights ``(B, L)`` or ``(B, H, W)`` of the positions; ``None`` for equal ones. Positions with weight 0 are excluded,
            even if they are infinite.
        texts: ``(B, L)``: the number of each token's text, for rows that hold several texts; ``None`` where each row is a sample.

    Returns:
        The vectors ``(N, C)`` of N samples, 0 for samples without a position, and ``(N,)``, true for samples with one.
    """
    kind = torch.promote_types(features.dtype, torch.float32)
    rows = features.flatten(2).transpose(1, 2) if features.ndim == 4 else features
    if weight is None and texts is None:
        return rows.mean(1, dtype=kind), torch.ones_like(rows[:, 0, 0], dtype=torch.bool)
    weight = torch.ones_like(rows[..., 0]) if weight is None else weight.flatten(1)
    weight = weight.to(kind)
    rows = rows.masked_fill((weight == 0)[..., None], 0).to(kind) * weight[..., None]
    if texts is None:
        sums, count = rows.sum(1), weight.sum(1)
    else:
        numbers, size = texts.flatten(), int(texts[-1, -1]) + 1
        sums = rows.new_zeros(size, rows.shape[-1]).index_add(0, numbers, rows.flatten(0, 1))
        count = weight.new_zeros(size).index_add(0, numbers, weight.flatten())
    return sums / count.masked_fill(count == 0, 1)[:, None], count > 0


def first_of_each(states: Tensor, real: Tensor | None, texts: Tensor | None) -> Tensor:
    """Select the state of each text's first token that is not padding; padding may be on the left.

    Args:
        states: ``(B, L, C)``.
        real: ``(B, L)``, true for tokens that are not padding; ``None`` for all.
        texts: ``(B, L)``: the number of each token's text, for rows that hold several; ``None`` where each row is one text.

    Returns:
        ``(N, C)`` of N texts.
    """
    if real is None:
        return states[:, 0]
    if texts is None:
        return states[torch.arange(len(states), device=states.device), real.to(torch.int8).argmax(1)]
    places = real.flatten().nonzero().flatten()
    numbers = texts.flatten()[places]
    first = torch.ones_like(numbers, dtype=torch.bool)
    first[1:] = numbers[1:] != numbers[:-1]
    return states.flatten(0, 1)[places[first]]


def last_of_each(states: Tensor, real: Tensor | None, texts: Tensor | None) -> Tensor:
    """Select the state of each text's last token that is not padding; see :func:`first_of_each`."""
    mirrored = (None if x is None else x.flip(0, 1) for x in (real, texts))
    return first_of_each(states.flip(0, 1), *mirrored).flip(0)
