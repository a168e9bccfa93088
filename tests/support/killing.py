"""Benchmarks, and stores that are filled, in processes of their own, which are killed."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time

from kdgraft.store import Store


def started(folder, *arguments):
    """Start ``kdgraft bench`` in a folder, in a session of its own."""
    command = [sys.executable, "-m", "kdgraft", "bench", *arguments]
    return subprocess.Popen(
        command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def ended(process, timeout=600):
    """Wait for a process that must succeed, and return what it said."""
    said, _ = process.communicate(timeout=timeout)
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


SLOW_STORE = """
import sys, time
from kdgraft import store
write = store.Store.write
def slowly(self, part, columns):
    time.sleep(0.15)
    write(self, part, columns)
    time.sleep(0.15)
store.Store.write = slowly
"""
"""The beginning of a script that fills a store slowly."""


def filling(script, folder, out):
    """Start a script, whose argument is the store's folder, after :data:`SLOW_STORE`."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", SLOW_STORE + script, out],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def assert_kills_change_nothing(script, folder, *, kills=10):
    """A store that was filled over so many SIGKILLs is the store of an uninterrupted call, byte for byte."""
    assert filling(script, folder, "whole").wait() == 0
    chance, files = random.Random(0), folder / "killed"
    for _ in range(kills):
        before = len(list(files.glob("*.sha256")))
        process = filling(script, folder, "killed")
        while len(list(files.glob("*.sha256"))) == before:
            assert process.poll() is None
            time.sleep(0.02)
        time.sleep(
            chance.uniform(0.0, 0.3)
        )  # in the middle of a part, before its file, or between the file and its checksum
        assert process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert filling(script, folder, "killed").wait() == 0
    names = sorted(path.name for path in (folder / "whole").glob("[!.]*"))
    assert len(names) > 2 * kills and names == sorted(path.name for path in files.glob("[!.]*"))
    for name in names:
        assert (folder / "whole" / name).read_bytes() == (files / name).read_bytes()
    Store(files).check()
