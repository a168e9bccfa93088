"""Checks on launchers of several processes, and readable errors for processes that do not answer."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

from .errors import DistillError

TIMEOUT = 1800
"""Seconds that a process waits for the others by default; torch's own default."""


def check_launch() -> None:
    """Raise a :class:`DistillError` if ``accelerate launch`` was asked for several processes but started only one.

    On CPUs (and on one GPU) it ignores ``--num_processes`` unless ``--multi_gpu`` is given, which works on CPUs as well, or MPI
    starts the processes. Such a launch is recognised by a master port without a world size.
    """
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_PORT" in os.environ
    counts = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
    if launched and not any(name in os.environ for name in counts):
        raise DistillError(
            "accelerate launch was asked for several processes but started only one, as it does on CPUs; run "
            "'accelerate launch --multi_gpu --num_processes N -m kdgraft …' (on CPUs too) or "
            "'torchrun --nproc_per_node N -m kdgraft …', and for one process leave --num_processes out"
        )


@contextmanager
def waiting(seconds: float) -> Iterator[None]:
    """Turn torch's errors about a process that does not answer, or has ended, into one line.

    Args:
        seconds: the time-out of the process group, for the message.

    Raises:
        DistillError: a process waited in vain for another one in the body.
    """
    try:
        yield
    except RuntimeError as error:
        from torch.distributed import DistError  # imported here, so that the command line starts without torch

        if not isinstance(error, DistError) and "gloo" not in str(error):
            raise
        if re.search(r"timed?[ -]?out", str(error), re.IGNORECASE):
            raise DistillError(
                f"another process did not answer within {seconds:g} s (--timeout): it hangs, or its steps take longer"
            ) from error
        if re.search(r"connection (closed|reset) by peer", str(error), re.IGNORECASE):
            raise DistillError("another process is gone; its own output says why") from error
        raise
