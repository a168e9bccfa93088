"""Batch normalisation whose running statistics are estimated anew."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from typing import Any

import torch
from torch import nn

from .distributed import sum_over_ranks, world_size
from .errors import DistillError
from .isolation import eval_mode
from .views import run_on

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


@torch.no_grad()
def reestimate_batchnorm(model: nn.Module, loader: Iterable[Any], batches: int | None = None) -> int:
    """Estimate the running statistics of all batch normalisations anew, as the mean of the statistics of whole batches.

    A part that was cut out of a network that shared its weights (NetAug, arXiv 2110.08890), or a mean of the weights of several
    models, has other statistics than those that were tracked in training. Weights and modes are not changed; all other modules,
    such as dropout, run in eval mode. On several processes the result is the mean over all of them.

    Args:
        model: the model.
        loader: yields batches ``(inputs, targets)``, on the device of the model; inputs are a tensor, or a tuple or dict of arguments.
        batches: number of batches to use; all of ``loader`` if omitted.

    Returns:
        Number of normalisations that were estimated.

    Raises:
        DistillError: ``loader`` yields no batch.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        >>> reestimate_batchnorm(net, [(images, labels)])
        1
    """
    tracked = [m for m in model.modules() if isinstance(m, NORMS) and m.running_mean is not None]
    if not tracked:
        return 0
    before = [(norm, norm.momentum) for norm in tracked]
    seen = 0
    with eval_mode(model):
        try:
            for norm in tracked:
                norm.train()
                norm.momentum = None  # a cumulative mean
            for inputs, _ in islice(loader, batches):
                if seen == 0:
                    for norm in tracked:
                        norm.reset_running_stats()
                run_on(model, inputs)
                seen += 1
        finally:
            for norm, momentum in before:
                norm.momentum = momentum
    if seen == 0:
        raise DistillError("reestimate_batchnorm: the loader yields no batch")
    for norm in tracked:
        for statistic in (norm.running_mean, norm.running_var):
            assert statistic is not None
            statistic.copy_(sum_over_ranks(statistic) / world_size())
    return len(tracked)
