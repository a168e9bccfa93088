"""The runner itself: what fails is counted, made small and written down, and a second call completes the first."""

from __future__ import annotations

import inspect
import json
import time
from pathlib import Path

import pytest
from hypothesis import strategies as st

from campaigns import CAMPAIGNS
from campaigns import __main__ as command
from campaigns.results import PAGE, Results, fingerprint, table, with_imports
from campaigns.runner import Campaign, Counts, Drawn, Failure, Listed
from support.marked import between_marks


def no_sevens(case):
    assert 7 not in case, "a seven"
    if len(case) > 20:
        raise KeyError("too long")


SEVENS = Campaign("sevens", "lists", Drawn(lambda: st.lists(st.integers(0, 9))), no_sevens, 400, 5, block=200)


def test_failures_are_counted_and_the_smallest_is_shown():
    counts = SEVENS.run(0)
    cases = SEVENS.cases.block(0, 200)
    assert counts.tried == len(cases) and counts.held == sum(7 not in case and len(case) <= 20 for case in cases)
    assert counts.failures[0].case == [7] and "a seven" in counts.failures[0].kind
    assert SEVENS.cases.block(0, 200) == cases != SEVENS.cases.block(1, 200)


def test_a_case_that_hangs_is_a_failure():
    hangs = Campaign("hangs", "", Listed(lambda: [1, 2]), lambda case: time.sleep(case - 1), 2, 1, 2, seconds=0.2)
    (failure,) = hangs.run(0).failures
    assert failure.case == 2 and failure.kind.startswith("TimeoutError")


def test_what_ended_is_not_run_again(tmp_path: Path):
    results = Results(tmp_path / "results.jsonl", [SEVENS])
    results.add(("sevens", 0, 200), Counts(200, [Failure("kind", "said", [7])], 1.5))
    with (tmp_path / "results.jsonl").open("a") as file:
        file.write(json.dumps(dict(code="another", campaign="sevens", block=1, size=200, tried=1, failures=[])) + "\n{")
    again = Results(tmp_path / "results.jsonl", [SEVENS])
    assert again.blocks == results.blocks and again.of("sevens").held == 199
    assert (
        table([SEVENS], {"sevens": again.of("sevens")}).splitlines()[-1] == "| sevens | lists | 200 of 400 | 199 | 1 |"
    )


def test_results_are_of_the_code_that_is_attacked_and_of_the_campaign():
    names = ("kills", "damage torch", "numbers", "long runs")
    kills, damage, numbers, long = (fingerprint(CAMPAIGNS[name]) for name in names)
    assert len({kills, damage, numbers, long}) == 4 and fingerprint(CAMPAIGNS["damage mmdet"]) == damage
    own = Path(inspect.getfile(CAMPAIGNS["kills"].check))
    assert {path.name for path in with_imports(own, set())} == {"kills.py", "jobs.py", "runner.py"}


def test_the_command_runs_blocks_in_processes_and_completes_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    told = ["fuzz schedules", "--share", "0.01", "--out", str(tmp_path)]
    assert command.main(told) == 0
    assert "| fuzz schedules |" in capsys.readouterr().out
    assert command.main(told) == 0
    assert capsys.readouterr().out.startswith("0 of 1 blocks to run")
    with pytest.raises(SystemExit):
        command.main(["fuzz tap"])
    assert "did you mean 'fuzz taps'" in capsys.readouterr().err


def test_the_page_has_the_table():
    _, shown, _ = between_marks(PAGE.read_text(encoding="utf-8"), command.MARKS)
    assert shown.splitlines()[0].startswith("| campaign |")
