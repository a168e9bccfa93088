"""Steps of a network beside the student on a share of fixed samples, alone or as one of two processes.

Run as ``python -m support.auxiliary_ranks RANK STORE OUT``; :func:`train` is also what the test computes on all samples.
"""

from __future__ import annotations

import os
import sys
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kdgraft.auxiliary import Auxiliary

SAMPLES = torch.sin(torch.arange(4 * 3.0)).reshape(4, 3)
WHOLE = slice(0, 4)
SHARES = (slice(0, 3), slice(3, 4))  # three samples on the first process, one on the second
STEPS = 3


def network(seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1))


def score(model: nn.Module, samples: Tensor, step: int) -> Tensor:
    """A loss summed over samples, another one in each step."""
    return (model(samples) - 0.3 * step).square().sum() + model(samples).sum()


def train(share: slice, *, seed: int = 0, broken: bool = False, leave_out: int | None = None) -> dict[str, Any]:
    """Some steps, of which the second may be infinite here; the network in the end and what each step told."""
    auxiliary, told = Auxiliary(network(seed), lr=0.05), []
    for step in range(STEPS):
        if step == leave_out:
            continue
        with auxiliary.learning("cpu"):
            loss = score(auxiliary.network, SAMPLES[share], step)
            loss = loss * float("inf") if broken and step == 1 else loss
            told.append(auxiliary.step(loss, len(SAMPLES[share]), {"loss": loss}).get("loss"))
    return {"network": auxiliary.network.state_dict(), "figures": told, "skipped": auxiliary.skipped}


def main(rank: int, store: str, out: str) -> None:
    """One process of two."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=len(SHARES), timeout=timedelta(seconds=60)
    )
    # With one seed a process, as many launchers do; the first one's weights count.
    found = {
        "sound": train(SHARES[rank], seed=rank),
        "broken": train(SHARES[rank], seed=rank, broken=rank == 1),
    }
    torch.save(found, out)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3])
    sys.stdout.flush()
    # All is written. torch 2.13's gloo aborts some orderly exits: "terminate called without an active exception".
    os._exit(0)
