"""Steps of a network beside the student on a share of fixed samples, alone or as one of two processes.

:func:`train` is also what the test computes on all samples.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from kdgraft.auxiliary import Auxiliary
from support.processes import as_rank

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


def all_steps(rank: int) -> dict[str, Any]:
    """The steps of this process's share, without and with one that is infinite on the second process."""
    # With one seed a process, as many launchers do; the first one's weights count.
    return {
        "sound": train(SHARES[rank], seed=rank),
        "broken": train(SHARES[rank], seed=rank, broken=rank == 1),
    }


if __name__ == "__main__":
    as_rank(all_steps)
