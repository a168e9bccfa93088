"""Runs that are killed: begun again, they end with the weights, the store and the results of one that nobody killed."""

from __future__ import annotations

import random
import re
import shutil
import time
from pathlib import Path
from typing import Any

from campaigns.jobs import JOBS, assert_as_whole, finished, matching
from campaigns.runner import Campaign, Case, Listed
from support.killing import ended, kill, started

PATIENCE = 60.0
"""Seconds for which a run is watched for the change that it is to be killed at."""


def cases() -> list[Case]:
    """Kills at a random moment, and at a random change of the files, which is while something is saved."""
    draw, found = random.Random(0), []
    for number in range(50):
        job = list(JOBS)[number % len(JOBS)]
        at: dict[str, Any] = (
            {"change": draw.randint(1, 14)} if number % 3 else {"seconds": round(draw.uniform(1, 9), 2)}
        )
        found.append(dict(job=job, kills=1 + number % 2, all=draw.random() < 0.5, **at))
    return found


def check(case: Case) -> None:
    name = case["job"]
    job = JOBS[name]
    with finished(name) as folder:
        shutil.rmtree(folder / job.out, ignore_errors=True)
        for _ in range(case["kills"]):
            process = started(folder, *(job.again if _began(folder / job.out) else job.begin))
            _wait(folder / job.out, process, case)
            kill(process, all_of_it=case["all"])
        process = started(folder, *job.again)
        said, _ = process.communicate(timeout=200)
        if process.returncode == 2 and re.search(r"error: (nothing to|cannot) resume", said):  # nothing was saved whole
            said = ended(started(folder, *job.begin), timeout=200)
        assert "Traceback" not in said, f"a traceback: {said[-500:]!r}"
        assert_as_whole(name, folder)


def _began(out: Path) -> bool:
    """Whether there is anything to resume: a plan, a store and a benchmark begin and go on by the same command."""
    return bool(matching(out, ["**/checkpoint-*/*", "**/*.pth"]))


def _wait(out: Path, process: Any, case: Case) -> None:
    """Wait for so many changes of the run's files, or for so many seconds, or until it ends."""
    begun, changes, seen = time.monotonic(), 0, set[tuple[str, int]]()
    while process.poll() is None and time.monotonic() - begun < case.get("seconds", PATIENCE):
        if "change" in case:
            found = {(str(path), _size(path)) for path in out.rglob("*")} if out.exists() else set()
            changes += len(found - seen)
            seen |= found
            if changes >= case["change"]:
                return
        time.sleep(0.005)  # seldom enough to leave the run its core


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:  # renamed meanwhile
        return -1


KILLS = Campaign(
    "kills",
    "runs of every host, a plan, a store and a benchmark are killed at random moments and while they save: begun again, they end "
    "like one that nobody killed",
    Listed(cases),
    check,
    count=50,
    sample=0,
    seconds=400,
    host="mmdet",
)
