"""Files that outlive a run: whole or not there, damage found, one run in a folder."""

from __future__ import annotations

import errno
import os
import platform
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch

from kdgraft.errors import DistillError
from kdgraft.files import check_intact, held, written_whole
from kdgraft.sources.teacher import read_checkpoint

PLUGINS = Path(__file__).parents[2] / "plugins"


def test_a_file_is_there_when_it_is_whole(tmp_path):
    path = tmp_path / "a.txt"
    with written_whole(path) as part:
        part.write_text("new")
        assert not path.exists() and part.parent == tmp_path
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["a.txt"]


def test_what_killed_writers_left_is_removed(tmp_path):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    here, two_hours_ago = platform.node(), time.time() - 7200
    left = [f".a.txt.{gone.pid}@{here}.part", ".a.txt.1@elsewhere.part"]
    kept = [f".a.txt.{os.getppid()}@{here}.part", ".a.txt.2@elsewhere.part", f".a.txt.b.{gone.pid}@{here}.part"]
    for name in left + kept:
        (tmp_path / name).touch()
    os.utime(tmp_path / ".a.txt.1@elsewhere.part", (two_hours_ago, two_hours_ago))
    with written_whole(tmp_path / "a.txt") as part:
        part.write_text("new")
    assert sorted(os.listdir(tmp_path)) == sorted([*kept, "a.txt"])


def test_what_cannot_be_removed_is_one_line(tmp_path, monkeypatch):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    (tmp_path / f".a.txt.{gone.pid}@{platform.node()}.part").touch()

    def refuse(path, missing_ok=False):
        if str(gone.pid) in path.name:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(DistillError, match=r"cannot write .*: Permission denied"), written_whole(tmp_path / "a.txt"):
        pass


def test_a_full_disk_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")

    def fill(part: Path) -> None:
        part.write_text("ne")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    said = r"cannot write .*a\.txt: No space left on device; nothing was changed"
    with pytest.raises(DistillError, match=said), written_whole(path) as part:
        fill(part)
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.txt"]


def test_a_really_full_device_under_torch_save(tmp_path):
    with (
        pytest.raises(DistillError, match="cannot write"),
        written_whole(tmp_path / "a.pth"),
        open("/dev/full", "wb") as f,
    ):
        torch.save({"a": torch.ones(100_000)}, f)
    assert os.listdir(tmp_path) == []


def test_an_error_that_is_not_of_the_disk_keeps_its_name(tmp_path):
    with pytest.raises(RuntimeError, match="of something else") as caught, written_whole(tmp_path / "a"):
        raise RuntimeError("of something else")
    assert not isinstance(caught.value, DistillError)


def flipped(path: Path, position: int, bit: int = 0) -> Path:
    data = bytearray(path.read_bytes())
    data[position] ^= 1 << bit
    other = path.with_name("flipped.pth")
    other.write_bytes(data)
    return other


@pytest.fixture
def checkpoint(tmp_path):
    path = tmp_path / "whole.pth"
    torch.save({"state_dict": {"weight": torch.arange(1000.0)}, "meta": {"iter": 3}}, path)
    return path


def records(path: Path) -> dict[str, tuple[int, int]]:
    """Where the content of each record of a checkpoint stands in the file."""
    found = {}
    raw = path.read_bytes()
    for entry in zipfile.ZipFile(path).infolist():
        at = entry.header_offset
        start = (
            at
            + 30
            + int.from_bytes(raw[at + 26 : at + 28], "little")
            + int.from_bytes(raw[at + 28 : at + 30], "little")
        )
        found[entry.filename.rpartition("whole/")[2]] = (start, entry.file_size)
    return found


@pytest.mark.parametrize("record", ["data/0", "data.pkl"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_a_flipped_bit_is_found(checkpoint, record, share):
    start, size = records(checkpoint)[record]
    damaged = flipped(checkpoint, start + int(size * share))
    with pytest.raises(DistillError, match=r"flipped\.pth is damaged"):
        check_intact(damaged)
    with pytest.raises(DistillError, match=r"flipped\.pth is damaged"):
        read_checkpoint(damaged)


def test_what_is_intact_or_has_no_checksums_is_read(checkpoint, tmp_path):
    check_intact(checkpoint)
    assert read_checkpoint(checkpoint)["meta"] == {"iter": 3}
    legacy = tmp_path / "legacy.pth"
    torch.save({"a": torch.ones(2)}, legacy, _use_new_zipfile_serialization=False)
    assert torch.equal(read_checkpoint(legacy)["a"], torch.ones(2))
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"a": torch.ones(2)}, tmp_path / "bare.pth")
    finally:
        torch.serialization.set_crc32_options(True)
    assert torch.equal(read_checkpoint(tmp_path / "bare.pth")["a"], torch.ones(2))


HOLD = """
import sys, time
from kdgraft.files import held
with held(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_folder_takes_one_run_while_it_lives(tmp_path):
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "work")],
        env={**os.environ, "PYTHONPATH": os.pathsep.join((str(PLUGINS), os.environ.get("PYTHONPATH", "")))},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        with (
            pytest.raises(DistillError, match=r"another run is at work in .*work; .*--work-dir"),
            held(tmp_path / "work"),
        ):
            raise AssertionError("two runs in one folder")
        other.send_signal(signal.SIGKILL)
        other.wait(10)
        with held(tmp_path / "work"):  # what a dead process left is taken over
            pass
    finally:
        other.kill()
        other.wait(10)


def test_the_first_process_holds_the_folder_for_all(tmp_path, monkeypatch):
    with held(tmp_path):
        with pytest.raises(DistillError), held(tmp_path):
            pass
        monkeypatch.setenv("RANK", "1")
        with held(tmp_path):
            pass
    monkeypatch.delenv("RANK")
    with held(tmp_path), pytest.raises(KeyError):
        raise KeyError
    with held(tmp_path):
        pass
