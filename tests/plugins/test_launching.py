"""What a launcher started, and processes that wait for others in vain."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from kdgraft.cli import main
from kdgraft.errors import DistillError
from kdgraft.launching import check_launch, waiting
from support.forking import Program, python, side_by_side


def launched(tmp_path: Path, *how: str) -> subprocess.CompletedProcess[str]:
    launch = ["-m", "accelerate.commands.launch", "--main_process_port", "0", *how]
    return python(*launch, "-m", "kdgraft", "train", "absent.txt", folder=tmp_path)


def lines(said: str) -> list[str]:
    return [line for line in said.splitlines() if "kdgraft: error" in line]


def test_one_process_where_several_were_asked_for_is_refused_with_what_to_write(tmp_path):
    done = launched(tmp_path, "--cpu", "--num_processes", "2")
    assert done.returncode
    (said,) = lines(done.stderr)
    assert "started only one" in said and "--multi_gpu --num_processes N" in said and "torchrun" in said


def test_what_it_says_to_write_starts_two_and_one_process_is_let_through(tmp_path):
    for how, processes in ((["--multi_gpu", "--num_processes", "2"], 2), (["--cpu", "--num_processes", "1"], 1)):
        found = lines(launched(tmp_path, *how).stderr)
        # torchrun ends the second process when the first has failed, which may be before it has spoken.
        assert 1 <= len(found) <= processes and not any("started only one" in line for line in found)


@pytest.mark.parametrize("count", ["WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE"])
def test_launchers_that_say_how_many_there_are_pass(monkeypatch, count):
    for name in ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MASTER_PORT", "29500")
    check_launch()  # not accelerate's
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    with pytest.raises(DistillError, match="started only one"):
        check_launch()
    monkeypatch.setenv(count, "2")
    check_launch()


RANK = """
import sys, time
from datetime import timedelta
from pathlib import Path
import torch, torch.distributed as dist
from kdgraft.errors import DistillError
from kdgraft.launching import waiting
rank, folder, how = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
store, begun, told = f"file://{folder}/store", time.monotonic(), folder / "told"
try:
    with waiting(3):
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=timedelta(seconds=3))
        dist.all_reduce(torch.ones(1))
        print("met", flush=True)
        while rank == 1 and how == "stops" and not told.exists() and time.monotonic() - begun < 60:
            time.sleep(0.1)
        if rank == 1:
            sys.exit(0)
        dist.all_reduce(torch.ones(1))
except DistillError as error:
    print(error, time.monotonic() - begun, sep="\\n", flush=True)
    told.touch()
"""


@pytest.fixture(scope="module")
def left_alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What the first of two processes says when the second stops or ends; all four run at the same time."""
    ways = ("stops", "ends")
    folders = [str(tmp_path_factory.mktemp(how)) for how in ways]
    programs = [
        Program(["-c", RANK, str(rank), folder, how])
        for how, folder in zip(ways, folders, strict=True)
        for rank in range(2)
    ]
    return dict(zip(ways, [done.stdout for done in side_by_side(*programs, timeout=100)][::2], strict=True))


@pytest.mark.parametrize(
    ("how", "said"),
    [("stops", "another process did not answer within 3 s (--timeout)"), ("ends", "another process is gone")],
)
def test_a_process_that_stops_or_ends_is_one_line_in_the_other(left_alone, how, said):
    met, told, seconds = left_alone[how].splitlines()
    assert met == "met" and told.startswith(said)
    assert float(seconds) < 50


def test_other_errors_keep_their_names():
    for text in ("DataLoader timed out after 3 seconds", "of something else"):
        with pytest.raises(RuntimeError, match=text) as caught, waiting(3):
            raise RuntimeError(text)
        assert not isinstance(caught.value, DistillError)


def test_the_time_out_is_an_option_with_its_default_stated(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert (
        "--timeout SECONDS seconds that a process waits for the others before all stop (default: the config's, or 1800)"
        in said
    )
    assert main(["train", "absent.yaml", "--timeout", "0"]) == 2
    assert "--timeout must be a number >= 1, got 0" in capsys.readouterr().err
