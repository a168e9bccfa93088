"""What all trainings of ``kdgraft experiments`` share: their parts, optimizer and schedule."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from kdgraft.plain import Task

BATCH = 64
PARTS = 4
"""A training has so many epochs, of equal numbers of steps, after each of which it is evaluated and its state is saved."""
ADAMW = partial(torch.optim.AdamW, weight_decay=0.01)


def parts_of(steps: int) -> tuple[int, int]:
    """Return the number of parts of a training, and the steps of each."""
    parts = min(PARTS, steps)
    return parts, steps // parts


def training(
    model: nn.Module,
    batches: Iterable[Any],
    loss: Callable[[Any, Any], torch.Tensor],
    steps: int,
    rate: float,
    evaluate: Callable[[nn.Module], Mapping[str, float]],
    optimizer: Callable[..., torch.optim.Optimizer] = ADAMW,
    tested: Iterable[Any] | None = None,
    **settings: Any,
) -> Task:
    """Return a training with a cosine after a warm-up over a tenth of the steps, and gradients clipped to a norm of 1.

    Args:
        model: the model.
        batches: one part of the training, of :func:`parts_of`.
        loss: the loss of (output, targets).
        steps: the steps of all parts.
        rate: the highest learning rate.
        evaluate: the metrics of the model.
        optimizer: builds the optimizer.
        tested: batches of pictures and labels on which the benchmark looks at predictions.
        settings: further settings of the task.
    """
    told = dict(lr=rate, schedule="cosine", warmup=steps // 10, clip=1.0)
    told |= settings
    return Task(model, batches, loss, parts_of(steps)[0], optimizer, evaluate, settings=told, tested=tested)
