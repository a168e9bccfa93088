"""Several processes: what a launcher really started, and how long they wait for one another."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

from .errors import DistillError

TIMEOUT = 1800
"""Seconds that a process waits for the others by default, as torch does."""


def check_launch() -> None:
    """Raises a :class:`DistillError` where ``accelerate launch`` was asked for several processes and started one.

    On CPUs (and on one GPU) it starts one whatever ``--num_processes`` says, unless ``--multi_gpu`` is given, which works on
    CPUs as well, or MPI starts them. What it leaves of the number is an address for processes that never come.
    """
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_PORT" in os.environ
    counts = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
    if launched and not any(name in os.environ for name in counts):
        raise DistillError(
            "accelerate launch was asked for several processes and started one, as it does on CPUs; write "
            "'accelerate launch --multi_gpu --num_processes N -m kdgraft …' (on CPUs too) or "
            "'torchrun --nproc_per_node N -m kdgraft …', and for one process leave --num_processes out"
        )


@contextmanager
def waiting(seconds: float) -> Iterator[None]:
    """Turns what torch raises over a process that does not answer, or is gone, into one line.

    Args:
        seconds: the time-out of the process group, for the message.

    Raises:
        DistillError: in the body a process waited in vain.
    """
    try:
        yield
    except RuntimeError as error:
        from torch.distributed import DistError  # here, as the command line starts without torch

        if not isinstance(error, DistError) and "gloo" not in str(error):
            raise
        if re.search(r"timed?[ -]?out", str(error), re.IGNORECASE):
            raise DistillError(
                f"another process did not answer within {seconds:g} s (--timeout): it hangs, or needs longer for a step"
            ) from error
        if re.search(r"connection (closed|reset) by peer", str(error), re.IGNORECASE):
            raise DistillError("another process is gone; its own output says why") from error
        raise
