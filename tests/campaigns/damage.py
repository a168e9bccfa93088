"""Damaged files: the result is that of the run that nothing befell, or one line says what is wrong and nothing runs."""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path

from campaigns.jobs import HOSTS, JOBS, LAST, assert_as_whole, command, files_of, finished, matching
from campaigns.runner import Campaign, Case, Listed
from support.forking import environment

HARMS: dict[str, Callable[[Path, random.Random], object]] = {
    "is missing": lambda path, draw: path.unlink(),
    "is empty": lambda path, draw: path.write_bytes(b""),
    "is cut off": lambda path, draw: path.write_bytes(path.read_bytes()[: draw.randrange(path.stat().st_size or 1)]),
    "is of zeros": lambda path, draw: path.write_bytes(bytes(path.stat().st_size)),
    "is noise": lambda path, draw: path.write_bytes(draw.randbytes(path.stat().st_size)),
    "is a folder": lambda path, draw: (path.unlink(), path.mkdir()),
    "leads nowhere": lambda path, draw: (path.unlink(), path.symlink_to("nowhere")),
    "has a flipped bit": lambda path, draw: _flip(path, draw),
}
"""What can befall a file."""
UNREADABLE = [harm for harm in HARMS if harm != "has a flipped bit"]
"""What can be told of any file, even of one without a checksum."""
UNTOLD = ("teacher/.kdgraft.lock", "teacher/all_results.json", "teacher/eval_results.json", "teacher/training_args.bin")
"""Files that nobody reads."""


def _flip(path: Path, draw: random.Random) -> None:
    content = bytearray(path.read_bytes())
    if content:
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        path.write_bytes(content)


def cases(name: str) -> list[Case]:
    """Every harm to every file of a job, in a random order, so that a few have all kinds."""
    own, others = files_of(name)
    pairs = [(file, harm) for file in own for harm in HARMS if not file.endswith(".lock")]
    pairs += [(file, harm) for file in others for harm in UNREADABLE if file not in UNTOLD]
    found = [dict(job=name, file=file, harm=harm, seed=place) for place, (file, harm) in enumerate(pairs)]
    random.Random(0).shuffle(found)
    return found


def check(case: Case) -> None:
    job = JOBS[case["job"]]
    with finished(case["job"]) as folder:
        HARMS[case["harm"]](folder / case["file"], random.Random(case["seed"]))
        code, said = command(*job.again)
        own = case["file"] in files_of(case["job"])[0]
        if code == 0:
            assert own or case["file"] not in _NEEDED, (
                f"{case['file']} {case['harm']}, and nobody noticed: {said[-300:]}"
            )
            assert_as_whole(case["job"], folder)


_NEEDED = ("teacher/config.json", "teacher/model.safetensors", "teacher.pth", "config.py", "recipe.yaml", "plan.toml")


# --- no room to write

NO_ROOM = {"full": "size=4k", "read-only": "size=4k,ro"}
"""Mounts on which nothing, or no more, can be written."""
SCRIPT = """
mkdir -p {at} && mount -t tmpfs -o {options} tmpfs {at} && exec {python} -m kdgraft {words}
"""
WRITERS: dict[str, tuple[str, Sequence[str]]] = {
    "train": ("transformers", ("train", "recipe.yaml", "--work-dir", "small/out")),
    "train mm": ("mmdet", ("train", "config.py", "--work-dir", "small/work")),
    "train mmseg": ("mmseg", ("train", "config.py", "--work-dir", "small/work")),
    "export": ("mmdet", ("export", "work/iter_4.pth", "small/student.pth")),
    "export of texts": ("transformers", ("export", LAST, "small/student")),
    "report": ("torch", ("report", "out", "--out", "small/report.html")),
    "cache": ("transformers", ("cache", "recipe.yaml", "--out", "small/store")),
}
"""What writes, after the framework of its job."""


@cache
def can_mount() -> bool:
    """Whether this machine lets a user mount in a namespace of their own."""
    return shutil.which("unshare") is not None and not _unshared("true").returncode


def _unshared(script: str, folder: Path = Path()) -> subprocess.CompletedProcess[str]:
    command = ["unshare", "-rm", "sh", "-c", script]
    return subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=240)


def no_room() -> list[Case]:
    writers = [dict(command=name, disk=disk) for name in WRITERS for disk in NO_ROOM]
    return writers if can_mount() else []


def check_no_room(case: Case) -> None:
    name, words = WRITERS[case["command"]]
    with finished(name) as folder:
        options = NO_ROOM[case["disk"]]
        before = matching(folder, ["**/*"])
        told = SCRIPT.format(at="small", options=options, python=sys.executable, words=" ".join(words))
        done = _unshared(told, folder)
        lines = [line for line in done.stderr.splitlines() if line.startswith("kdgraft: error: ")]
        assert (done.returncode, len(lines)) == (2, 1), f"code {done.returncode}: {done.stderr[-600:]!r}"
        assert "Traceback" not in done.stderr, f"a traceback: {done.stderr[-600:]!r}"
        assert set(before) <= set(matching(folder, ["**/*"])), "files are gone"


COUNTS = {"torch": (46, 3), "transformers": (211, 0), "mmdet": (38, 0), "mmseg": (38, 0)}
"""By job: the number of its cases, and of those in the default tests."""
DAMAGE = [
    Campaign(
        f"damage {name}",
        f"{title}: one file of a finished run, or of what it reads, is missing, empty, cut off, noise, a folder …: resuming gives the "
        "same weights, or one line says what is wrong",
        Listed(partial(cases, name)),
        check,
        count=COUNTS[name][0],
        sample=COUNTS[name][1],
        block=20,
        host=name,
    )
    for name, title in HOSTS.items()
]
NO_SPACE = Campaign(
    "no space",
    "a disk that is full or read-only while a run, a store, a student or a page is written: one line, and no file is lost",
    Listed(no_room),
    check_no_room,
    count=14,
    sample=0,
    seconds=240,
    host="mmdet",
)
