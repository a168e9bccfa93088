"""Options of a plan's run that mention the files of another run."""

from __future__ import annotations

import json

import pytest

from kdgraft.errors import DistillError
from kdgraft.plans import carry_out, read_plan

TASKS = """
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from kdgraft.plain import Task

X, Y = torch.arange(8.0).reshape(4, 2), torch.tensor([0, 1, 0, 1])


def net(rate=0.1, other=""):
    if other:
        assert torch.load(other, weights_only=True)["weight"].shape == (2, 2)
    return Task(nn.Linear(2, 2), DataLoader(TensorDataset(X, Y)), F.cross_entropy, 1, settings={"lr": rate})
"""


def written(folder, runs):
    (folder / "tasks.py").write_text(TASKS)
    (folder / "plan.toml").write_text(f"out = {str(folder / 'out')!r}\n{runs}")
    return read_plan(folder / "plan.toml")


PLAN = """
[runs.after]
config = "tasks.py:net"
options = { other = "{before.weights}" }

[runs.before]
config = "tasks.py:net"
"""


def test_a_run_that_mentions_another_follows_it_and_gets_its_file(tmp_path):
    plan = written(tmp_path, PLAN)
    assert [run.name for run in plan.runs] == ["before", "after"] and plan.runs[1].needs == ["before"]
    found = carry_out(plan, tell=lambda line: None)
    assert found["after", 0].options["other"] == found["before", 0].weights


def test_a_chain_is_mentioned_by_its_last_run(tmp_path):
    chain = """
[runs.after]
config = "tasks.py:net"
options = { other = "{nets.weights}" }

[runs.nets]
config = "tasks.py:net"
terms = ["SoftTargets"]
chain = { rate = [0.1, 0.2] }
"""
    plan = written(tmp_path, chain)
    (after,) = (run for run in plan.runs if run.name == "after")
    assert after.options == {"other": "{nets-0.2.weights}"} and after.needs == ["nets-0.2"]


def test_a_run_is_another_when_the_one_that_it_mentions_is(tmp_path):
    carry_out(written(tmp_path, PLAN), tell=lambda line: None)
    changed = PLAN.replace("[runs.before]", "[runs.before]\noptions = { rate = 0.3 }")
    for part in (tmp_path / "out/before/seed0").iterdir():
        part.unlink()
    with pytest.raises(DistillError, match=r"out/after/seed0 holds a run with other settings"):
        carry_out(written(tmp_path, changed), tell=lambda line: None)
    assert json.loads((tmp_path / "out/after/seed0/finished.json").read_text())


def test_what_is_mentioned_has_to_be_a_run(tmp_path):
    with pytest.raises(DistillError, match=r"after needs 'beforex', which is not a run; did you mean 'before'"):
        written(tmp_path, PLAN.replace("{before.", "{beforex."))
