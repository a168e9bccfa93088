"""Processes that run the blocks of campaigns side by side; one that dies or hangs costs its block, which counts as a failure."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from campaigns.results import Key
from campaigns.runner import Campaign, Counts, Failure

SPARE = 60.0
"""Seconds that a block may take beside its cases, for imports and for making the smallest of what failed."""
_SPAWN = multiprocessing.get_context("spawn")


class _Worker:
    """A process that runs one block after the other, each in a folder of its own, until its campaign ends."""

    def __init__(self, log: Path) -> None:
        self.ours, theirs = _SPAWN.Pipe()
        self.process = _SPAWN.Process(target=_work, args=(theirs, str(log)), daemon=False)
        self.process.start()
        theirs.close()
        self.key: Key | None = None
        self.deadline = 0.0

    def give(self, key: Key, seconds: float) -> None:
        self.key, self.deadline = key, time.monotonic() + seconds
        self.ours.send(key)

    def end(self) -> int | None:
        """End the process and return its exit code if it had ended by itself."""
        self.process.join(1.0)
        code = self.process.exitcode
        self.process.kill()
        self.process.join()
        self.ours.close()
        return code


def run_blocks(
    campaigns: Mapping[str, Campaign],
    keys: Sequence[Key],
    ended: Callable[[Key, Counts], None],
    *,
    processes: int,
    log: Path,
) -> None:
    """Run blocks in several processes; ``ended`` is called for each one as it ends.

    Args:
        campaigns: by name.
        keys: the blocks.
        ended: takes a block and its counts.
        processes: how many run at a time.
        log: the file for all that the processes print.
    """
    left = list(reversed(keys))
    workers: list[_Worker] = []
    try:
        while left or workers:
            while left and len(workers) < processes:
                workers.append(_started(left.pop(), campaigns, log))
            ready = wait([worker.ours for worker in workers], timeout=1.0)
            for worker in list(workers):
                counts = _counts(worker, campaigns) if worker.ours in ready else _late(worker)
                if counts is None:
                    continue
                assert worker.key is not None
                key, worker.key = worker.key, None
                ended(key, counts)
                if worker.process.is_alive() and left and left[-1][0] == key[0]:
                    following = left.pop()
                    worker.give(following, _limit(campaigns, following))
                else:  # the next campaign has a process of its own, with its own framework
                    worker.end()
                    workers.remove(worker)
    finally:
        for worker in workers:
            worker.end()


def _started(key: Key, campaigns: Mapping[str, Campaign], log: Path) -> _Worker:
    worker = _Worker(log)
    worker.give(key, _limit(campaigns, key))
    return worker


def _limit(campaigns: Mapping[str, Campaign], key: Key) -> float:
    return SPARE + 2 * key[2] * campaigns[key[0]].seconds


def _counts(worker: _Worker, campaigns: Mapping[str, Campaign]) -> Counts:
    """What a worker answers; of one that died, its block as a failure."""
    assert worker.key is not None
    with suppress(EOFError, ConnectionResetError):
        return worker.ours.recv()
    name, number, size = worker.key
    return _lost(worker, f"the process ended with code {worker.end()}", [name, number, size])


def _late(worker: _Worker) -> Counts | None:
    if time.monotonic() < worker.deadline:
        return None
    worker.process.kill()
    return _lost(worker, "the process did not answer", list(worker.key or ()))


def _lost(worker: _Worker, said: str, block: list[Any]) -> Counts:
    """All cases of a block count as tried, and one as failed: which one cannot be told."""
    return Counts(block[2], [Failure("process", said, block)])


def _work(pipe: Connection, log: str) -> None:
    """Runs the blocks that come, in a folder of its own, with all that is printed in a file."""
    from campaigns import CAMPAIGNS

    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(file, stream)
    with tempfile.TemporaryDirectory(prefix="campaign") as folder:
        os.chdir(folder)
        with suppress(EOFError, KeyboardInterrupt):
            while True:
                name, number, size = pipe.recv()
                pipe.send(CAMPAIGNS[name].run(number, size))
