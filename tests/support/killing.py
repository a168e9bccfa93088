"""Benchmarks in processes of their own, which are killed."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time


def started(folder, *arguments):
    """Start ``kdgraft bench`` in a folder, in a session of its own."""
    command = [sys.executable, "-m", "kdgraft", "bench", *arguments]
    return subprocess.Popen(
        command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def ended(process, timeout=1200):
    """Wait for a process that must succeed, and return what it said; one that takes too long is ended with all its own."""
    try:
        said, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert process.returncode == 0, said
    return said


def killed_at_random(folder, arguments, *, kills, seed, longest):
    """Start a benchmark anew after each of so many kills, of the parent alone or of all its processes; return what the last said.

    Args:
        folder, arguments: the benchmark.
        kills: the number of SIGKILLs.
        seed: of the moments.
        longest: the seconds after which a process is killed at the latest.
    """
    chance = random.Random(seed)
    for _ in range(kills):
        process = started(folder, *arguments)
        time.sleep(chance.uniform(2.0, longest))
        os.killpg(process.pid, signal.SIGKILL) if chance.random() < 0.5 else process.kill()
        process.wait()
        process.stdout.close()
        time.sleep(1.5)  # processes of a parent that was killed end by themselves
    return ended(started(folder, *arguments))
