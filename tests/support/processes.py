"""Processes that run side by side: a module of this package on two ranks, and what launchers start."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from support.forking import Program, environment, side_by_side

WORLD = 2
launchers = pytest.mark.parametrize(
    "launcher",
    [
        pytest.param(["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"], id="accelerate"),
        pytest.param(["torch.distributed.run", "--nproc_per_node", "2"], id="torchrun"),
    ],
)


def free_port() -> str:
    """A port that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def found_by_two(module: str, folder: Path, *arguments: str, host: str = "torch") -> list[Any]:
    """The results of ``python -m support.MODULE``, which calls :func:`as_rank`, on each of two gloo processes."""
    return found_by(WORLD, f"support.{module}", folder, *arguments, host=host)


def found_by(world: int, module: str, folder: Path, *arguments: str, host: str = "torch") -> list[Any]:
    """The results of ``python -m MODULE``, which calls :func:`as_rank`, on each of so many gloo processes."""
    outs = [folder / f"rank{rank}.pt" for rank in range(world)]
    command = ["-W", "ignore", "-m", module, str(folder / "store")]
    ranks = [
        Program([*command, str(out), *arguments], environment=one)
        for out, one in zip(outs, environments(world), strict=True)
    ]
    done = side_by_side(*ranks, host=host)
    assert [one.returncode for one in done] == [0] * world, [one.stdout[-3000:] + one.stderr[-3000:] for one in done]
    return [torch.load(out, weights_only=False) for out in outs]


def environments(world: int) -> list[dict[str, str]]:
    """What launchers tell each of so many processes."""
    shared = dict(WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port())  # as accelerate wants them
    return [{"RANK": str(rank), "LOCAL_RANK": str(rank), **shared} for rank in range(world)]


def as_rank(work: Callable[..., Any]) -> None:
    """Saves ``work(rank, *arguments)``, called as one of the processes of :func:`found_by`."""
    store, out, *arguments = sys.argv[1:]
    torch.set_num_threads(1)
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=timedelta(seconds=90)
    )
    torch.save(work(rank, *arguments), out)
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    # All is written. torch 2.13's gloo aborts some orderly exits: "terminate called without an active exception".
    os._exit(0)


def launched(launcher: list[str], config: Path, work_dir: Path) -> None:
    """Trains a config on two CPU processes that a launcher starts."""
    port = ["--main_process_port" if "accelerate" in launcher[0] else "--master_port", free_port()]
    train = ["-m", "kdgraft", "train", str(config), "--work-dir", str(work_dir)]
    done = subprocess.run(
        [sys.executable, "-m", *launcher, *port, *train],
        env=environment(CUDA_VISIBLE_DEVICES=""),
        cwd=config.parent,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
