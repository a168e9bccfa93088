"""yapf's cache, which a process that was killed has left cut off, does not keep the suite from starting."""

from __future__ import annotations

import pickle
import signal
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest

from kdgraft import formatter
from kdgraft.errors import DistillError
from support.forking import Program, python, side_by_side

KILLED = """
import os, signal
rename = os.rename
os.rename = lambda *names: (rename(*names), "PatternGrammar" in names[1] and os.kill(os.getpid(), signal.SIGKILL))
import yapf
"""
"""A process that is killed when the smaller file has its name, and its bytes are still in a buffer."""


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of yapf's cache, with whole files."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = tmp_path / "YAPF" / version("yapf")
    assert python("-c", "import yapf").returncode == 0
    assert _is_whole(folder)
    return folder


def _is_whole(cache: Path) -> bool:
    found = [pickle.loads(file.read_bytes()) for file in cache.glob("*.pickle")]
    return len(found) == 2 and all(grammar["symbol2number"] for grammar in found)


def _changed(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def damage(cache: Path) -> None:
        for file in cache.glob("*.pickle"):
            file.write_bytes(change(file.read_bytes()))

    return damage


DAMAGE = {
    "empty": _changed(lambda whole: b""),
    "cut off": _changed(lambda whole: whole[:-1]),
    "flipped": _changed(lambda whole: b"\xff" + whole[1:]),
    "another's": _changed(lambda whole: pickle.dumps({})),
}
_empty = DAMAGE["empty"]


def _kill(cache: Path) -> None:
    for file in cache.glob("*.pickle"):
        file.unlink()
    assert python("-c", KILLED).returncode == -signal.SIGKILL


@pytest.mark.parametrize("damage", [*DAMAGE.values(), _kill], ids=[*DAMAGE, "killed"])
def test_a_damaged_cache_is_written_anew(damage: Callable[[Path], None], cache: Path):
    damage(cache)
    assert python("-c", "import yapf").returncode == 1
    done = python("-c", "import kdgraft_mm, yapf")
    assert done.returncode == 0, done.stderr
    assert _is_whole(cache)


def test_a_command_starts_beside_a_damaged_cache(cache: Path):
    _empty(cache)
    done = python("-m", "kdgraft", "train", config := "mmdet::gfl/no_such.py")
    assert (done.returncode, "Traceback" in done.stderr) == (2, False), done.stderr
    assert f"config not found: {config}" in done.stderr
    assert _is_whole(cache)


@pytest.mark.slow
@pytest.mark.parametrize(
    "start", ["import kdgraft_det", "from kdgraft_bench.hosts import bench_host; bench_host('seg')"]
)
def test_mmengine_can_be_imported_beside_a_damaged_cache(start: str, cache: Path):
    _empty(cache)
    done = python("-c", f"{start}; import mmengine.config")
    assert done.returncode == 0, done.stderr


def test_processes_that_start_side_by_side_in_a_new_environment_all_start(tmp_path: Path):
    program = Program(("-c", "import kdgraft_mm"), environment={"XDG_CACHE_HOME": str(tmp_path)})
    for done in side_by_side(*[program] * 8):
        assert done.returncode == 0, done.stderr
    assert _is_whole(tmp_path / "YAPF" / version("yapf"))


def test_a_cache_that_cannot_be_removed_is_named_in_one_line(cache: Path):
    for file in list(cache.glob("*.pickle")):
        file.unlink()
        file.mkdir()  # what a file that may not be deleted is to unlink, for root too
    done = python("-c", "import kdgraft_mm")
    assert f"delete the damaged cache {cache}" in done.stderr.splitlines()[-1]
    assert "IsADirectoryError" in done.stderr.splitlines()[-1]


def test_an_import_that_fails_for_another_reason_is_told_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setitem(sys.modules, "yapf.yapflib.yapf_api", None)
    with pytest.raises(DistillError, match="pip install --force-reinstall yapf"):
        formatter.import_yapf()


def test_without_yapf_nothing_happens(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(formatter, "find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "yapf.yapflib.yapf_api", None)
    formatter.import_yapf()
