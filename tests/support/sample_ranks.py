"""Terms on the relations between samples, on a share of the samples, as one of two processes."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from kdgraft.distributed import gather_over_ranks, gather_rows
from support.processes import as_rank
from support.samples import EVERY, steps

SHARES = (slice(0, 3), slice(3, 4))


def all_steps(rank: int) -> dict[str, Any]:
    """The steps of this process's share for every term, and rows that were gathered, with the gradient that came back."""
    found: dict[str, Any] = {name: steps(name, SHARES[rank], DistributedDataParallel) for name in EVERY}
    found["flat"] = steps("SimilarityPreserving", SHARES[rank], DistributedDataParallel, pool="flat")
    rows = torch.full((2 - 2 * rank, 2), 1.0 + rank, requires_grad=True)  # the second process has none
    gathered = gather_over_ranks(rows)
    (gathered * torch.tensor([[1.0], [10.0]]) * (1 + rank)).sum().backward()
    return found | {"rows": (gathered.detach(), rows.grad, gather_rows(torch.arange(1 + rank)))}


if __name__ == "__main__":
    as_rank(all_steps)
