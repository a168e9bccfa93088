"""Commands, and stores that are filled, in processes of their own, which are killed."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time

from kdgraft.store import Store
from support.forking import environment


def started(folder, *arguments):
    """Start ``kdgraft`` in a folder, in a session of its own."""
    command = [sys.executable, "-m", "kdgraft", *arguments]
    return subprocess.Popen(
        command,
        cwd=folder,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
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
    """Start a command anew after each of so many kills, of the parent alone or of all its processes; return what the last said.

    Args:
        folder, arguments: the command.
        kills: the number of SIGKILLs.
        seed: of the moments.
        longest: the seconds after which a process is killed at the latest.
    """
    chance = random.Random(seed)
    for _ in range(kills):
        process = started(folder, *arguments)
        time.sleep(chance.uniform(2.0, longest))
        kill(process, all_of_it=chance.random() < 0.5)
    return ended(started(folder, *arguments))


def kill(process, *, all_of_it):
    """Kill a process, or all that it started, too."""
    if process.poll() is None:  # it may have ended by itself
        os.killpg(process.pid, signal.SIGKILL) if all_of_it else process.kill()
    process.wait()
    process.stdout.close()
    if not all_of_it:
        time.sleep(1.5)  # processes of a parent that was killed end by themselves


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
    return subprocess.Popen(
        [sys.executable, "-c", SLOW_STORE + script, out],
        cwd=folder,
        env=environment(),
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
