"""Losses that sum over processes, on a share of their samples, as one of two processes."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from kdgraft.distributed import total_over_ranks
from support.losses import BY_NAME, Declared
from support.processes import as_rank

SHARED = {name: declared for name, declared in BY_NAME.items() if declared.takes("total")}


def figures(declared: Declared, share: slice, **settings: Any) -> tuple[Tensor, Tensor]:
    """The value of the loss on a share of its samples, weighted, and the gradient of the student's."""
    student, teacher = declared.inputs()
    return declared.figures(student[share], teacher[share], weight=declared.places()[share], **settings)


def all_figures(rank: int) -> dict[str, tuple[Tensor, Tensor]]:
    """The figures of this process's share: the first sample, or all others."""
    share = slice(0, 1) if rank == 0 else slice(1, None)
    return {name: figures(declared, share, total=total_over_ranks) for name, declared in SHARED.items()}


if __name__ == "__main__":
    as_rank(all_figures)
