"""Benchmarks of every host that are killed at random moments and started again, with the results of one that was left alone."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from kdgraft.plans.run import RECORD
from kdgraft_bench.records import read_rows
from support.bench import write_masks, write_scenes, write_texts
from support.killing import ended, killed_at_random, started
from support.tensors import assert_same

KILLS = 10
SETS = {"det": write_scenes, "seg": write_masks, "nlp": write_texts}
METHODS = {"det": "ld", "seg": "skd", "nlp": "mobilebert", "core": "hint"}
ITERATIONS = {"det": 100, "seg": 100, "nlp": 200, "core": 1000}


def without_times(out):
    return {key: dict(row.metrics) for key, row in read_rows(out).items()}


def weights(out):
    """The weights of every run by their names, in one dict."""
    found = {}
    for key, row in read_rows(out).items():
        path = out.parent / json.loads((out / row.folder / RECORD).read_text())["model"]["weights"]
        for file in sorted(path.glob("*.safetensors")) if path.is_dir() else [path]:
            read = load_file(file) if file.suffix == ".safetensors" else torch.load(file)
            found |= {f"{key} {name}": value for name, value in read.get("state_dict", read).items()}
    return found


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", list(METHODS))
def test_killed_and_started_again_a_benchmark_has_the_same_results(tmp_path, name):
    data = []
    if name in SETS:
        (tmp_path / "data").mkdir()
        data = ["--data", str(SETS[name](tmp_path / "data"))]
    told = ["bench", name, *data, "--methods", METHODS[name], "--seeds", "0", "--iterations", str(ITERATIONS[name])]
    ended(started(tmp_path, *told, "--out", "alone"))
    killed_at_random(tmp_path, [*told, "--out", "killed"], kills=KILLS, seed=0, longest=30.0)
    expected = without_times(tmp_path / "alone")
    assert len(expected) >= 3
    assert_same(weights(tmp_path / "killed"), weights(tmp_path / "alone"))
    assert without_times(tmp_path / "killed") == expected
