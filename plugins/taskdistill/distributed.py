"""The little that the core needs of several processes: their number and a sum over them.

Works with any launcher that sets up ``torch.distributed``: accelerate, torchrun, mmengine.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Number of processes that train together; 1 without ``torch.distributed``."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


@torch.no_grad()
def sum_over_ranks(values: Tensor) -> Tensor:
    """The sum of ``values`` over all processes, without gradient; every process must call it in the same order."""
    if world_size() == 1:
        return values
    values = values.detach().clone()
    dist.all_reduce(values)
    return values
