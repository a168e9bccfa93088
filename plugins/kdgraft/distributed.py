"""Helpers for training on several processes: their number, sums over them, and a common state.

They work with any launcher that sets up ``torch.distributed``: accelerate, torchrun, mmengine.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def world_size() -> int:
    """Return the number of processes that train together; 1 without ``torch.distributed``."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_sharded(model: nn.Module) -> bool:
    """Return whether FSDP2 or DeepSpeed's ZeRO-3 has spread a model's weights over processes."""
    if not dist.is_available():
        return False
    from torch.distributed.fsdp import FSDPModule

    return isinstance(model, FSDPModule) or any(map(is_partitioned, model.parameters()))


def is_partitioned(parameter: Any) -> bool:
    """Return whether ZeRO-3 keeps a parameter in parts; without its modules running, this process has one part and sees none."""
    return hasattr(parameter, "ds_id")


def kept_in_graph(parameters: Iterable[Tensor], device: torch.device | str) -> Tensor:
    """Return 0 with parameters, or other tensors, in the graph, as DDP needs; empty sums, unlike ``0 *``, are 0 for infinite parameters.

    ZeRO-3 needs no parameter in the graph, and has no room for a gradient of what it keeps in parts.
    """
    kept = [p.flatten()[:0] for p in parameters if p.requires_grad and not is_partitioned(p)]
    alive = [nothing.sum(dtype=torch.promote_types(nothing.dtype, torch.float32)) for nothing in kept]
    return torch.stack(alive).sum() if alive else torch.zeros((), device=device)


@torch.no_grad()
def sum_over_ranks(values: Tensor) -> Tensor:
    """Sum ``values`` over all processes, without gradient; every process must call it in the same order."""
    if world_size() == 1:
        return values
    values = values.detach().clone()
    dist.all_reduce(values)
    return values


@torch.no_grad()
def most_over_ranks(values: Tensor) -> Tensor:
    """Return the largest of each of ``values`` over all processes, without gradient."""
    if world_size() > 1:
        values = values.clone()
        dist.all_reduce(values, dist.ReduceOp.MAX)
    return values


def total_over_ranks(values: Tensor) -> Tensor:
    """Sum ``values`` over all processes, with gradient: a process receives the gradients of the losses of all processes."""
    if world_size() == 1:
        return values
    from torch.distributed.nn import functional

    return functional.all_reduce(values)


def gather_over_ranks(values: Tensor) -> Tensor:
    """Concatenate ``(N, …)`` of all processes in the order of ranks, with gradient; N may differ."""
    if world_size() == 1:
        return values
    from torch.distributed.nn import functional

    counts = _counts_of_ranks(values)
    most = max(counts)
    padded = (
        torch.cat([values, values.new_zeros(most - len(values), *values.shape[1:])]) if len(values) < most else values
    )
    found = functional.all_gather(padded.contiguous())
    return torch.cat([part[:count] for part, count in zip(found, counts, strict=True)])


def _counts_of_ranks(values: Tensor) -> list[int]:
    """Return the number of rows that each process holds."""
    counts = [torch.zeros(1, dtype=torch.long, device=values.device) for _ in range(world_size())]
    dist.all_gather(counts, torch.tensor([len(values)], device=values.device))
    found: list[int] = torch.cat(counts).tolist()
    return found


@torch.no_grad()
def gather_rows(rows: Tensor) -> Tensor:
    """Concatenate ``(N, …)`` of all processes in the order of ranks, without gradient; N may differ."""
    return gather_over_ranks(rows)


def gather_objects(values: list[Any]) -> list[Any]:
    """Concatenate the lists of all processes in the order of ranks."""
    if world_size() == 1:
        return values
    found: list[list[Any]] = [[] for _ in range(world_size())]
    dist.all_gather_object(found, values)
    return [value for part in found for value in part]


@torch.no_grad()
def copy_from_first_rank(module: nn.Module) -> None:
    """Copy the parameters and buffers of the first process to all others, as DDP does when it wraps a model."""
    if world_size() > 1:
        for tensor in (*module.parameters(), *module.buffers()):
            dist.broadcast(tensor, 0)


class SharedRandom:
    """Random numbers for a term, drawn without touching the host's random state; a resumed run continues the sequence.

    The seed is drawn from the random state at construction; all processes use the seed of the first one.
    """

    def __init__(self) -> None:
        self._seed = int(torch.randint(2**31, ()))
        self._generator: torch.Generator | None = None

    def of_all_ranks(self) -> torch.Generator:
        """Return a generator that draws the same numbers on every process, as long as all processes draw equally much."""
        if self._generator is None:
            seed = torch.tensor([self._seed if rank() == 0 else 0])
            nccl = world_size() > 1 and dist.get_backend() == "nccl"
            self._generator = torch.Generator().manual_seed(int(sum_over_ranks(seed.cuda() if nccl else seed)))
        return self._generator

    def of_this_rank(self) -> torch.Generator:
        """Return a generator that draws different numbers on every process; all processes must call this equally often."""
        seed = int(torch.randint(2**31, (), generator=self.of_all_ranks()))
        return torch.Generator().manual_seed(seed + rank())

    def of_rows(self, shape: Sequence[int], device: torch.device) -> Tensor:
        """Return random integers in [0, 2⁶²) for the rows of all processes; this process receives those of its own rows.

        A number depends only on the place of its row among the rows of all processes, in the order of ranks, so that two processes
        draw what one draws for all rows. All processes must call this together.

        Args:
            shape: ``(N, …)`` of this process; N may differ.
            device: the device of the result.
        """
        seed = int(torch.randint(2**62, (), generator=self.of_all_ranks()))
        counts = [shape[0]] if world_size() == 1 else _counts_of_ranks(torch.empty(shape[0], 0, device=device))
        width = math.prod(shape[1:])
        places = torch.arange(shape[0] * width, device=device) + sum(counts[: rank()]) * width
        return _mixed(places + 1, seed).view(*shape)

    def state(self) -> Tensor:
        """Return the state for a checkpoint; the first process may call this alone, as no communication takes place."""
        generator = self._generator or torch.Generator().manual_seed(self._seed)
        return generator.get_state()

    def load(self, state: Tensor) -> None:
        """Restore :meth:`state`."""
        self._generator = torch.Generator()
        self._generator.set_state(state.cpu())

    def __deepcopy__(self, memo: dict[int, object]) -> SharedRandom:
        return self


def _mixed(places: Tensor, seed: int) -> Tensor:
    """Map integers to random ones by SplitMix64 (Steele et al. 2014): a function of each integer and the seed alone."""
    mixed = places * -7046029254386353131 + seed  # 0x9E3779B97F4A7C15 as a signed number; products wrap around
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685)):
        mixed = (mixed ^ (mixed >> shift & (1 << 64 - shift) - 1)) * factor
    return (mixed ^ (mixed >> 31 & (1 << 33) - 1)) & (1 << 62) - 1


def rank() -> int:
    """Return the rank of this process; 0 without ``torch.distributed``."""
    return dist.get_rank() if world_size() > 1 else 0
