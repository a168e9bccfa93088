"""``kdgraft experiments`` end to end: a few steps, but real plans, trainings, tables and pictures."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
from PIL import Image

from kdgraft import TERMS, DistillError
from kdgraft.plans import carry_out
from kdgraft.registry import RECIPES, expand_recipe
from kdgraft_bench.core import literature
from kdgraft_bench.core.data import pictures_of
from kdgraft_bench.core.experiments import EXPERIMENTS
from kdgraft_bench.core.experiments.convolutional import STUDENT, TEACHER
from kdgraft_bench.core.nets import conv
from kdgraft_bench.core.pictures import PICTURES
from kdgraft_bench.core.runs import Runs
from kdgraft_bench.core.tasks import task
from support.commands import refused
from support.pages import ROOT


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("core")
    return out, literature.main(["share", "netaug"], out=out, steps=2, seeds=2)


def test_it_writes_every_figure(finished):
    out, results = finished
    with (out / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["task", "dataset", "model", "method", "seed", "metric", "value"]
    assert len(rows) == len(results) == 2 * (3 + 4)
    assert {row["method"] for row in rows} >= {"share: 3 %, soft", "netaug: tiny, NetAug"}
    assert all(0 <= float(row["value"]) <= 1 for row in rows)
    table = (out / "table.md").read_text()
    assert "2 seeds" in table and "| NetAug helps a tiny net | 51.7 → 53.3 |" in table
    assert Image.open(out / "examples.png").size[0] > 800


def test_finished_runs_are_not_repeated_and_experiments_share_runs(finished, capsys):
    out, _ = finished
    before = {path: path.stat().st_mtime_ns for path in out.rglob("student.pth")}
    again = literature.main(["hard_soft", "share"], out=out, steps=2, seeds=2)
    after = {path: path.stat().st_mtime_ns for path in out.rglob("student.pth")}
    assert {path: after[path] for path in before} == before
    assert len(after) - len(before) == 2  # the soft student, with each seed
    assert len(again) == 2 * (3 + 3)
    assert "soft targets beat hard ones on 3 %" in capsys.readouterr().out


def test_saved_students_are_plain(finished):
    out, _ = finished
    (place,) = (out / "runs").iterdir()
    plain, augmented = (
        torch.load(place / name / "seed0/student.pth", weights_only=True) for name in ("conv2", "netaug2")
    )
    assert plain.keys() == augmented.keys()
    assert all(plain[key].shape == augmented[key].shape for key in plain)


def test_all_experiments_are_one_plan(tmp_path: Path):
    runs = Runs(600)
    for experiment in EXPERIMENTS.values():
        experiment.plan(runs)
    lines: list[str] = []
    carry_out(runs.plan(tmp_path, 0), dry_run=True, tell=lines.append)
    assert len(lines) == len(runs.planned)
    known = set()
    for name, run in runs.planned.items():
        assert set(run.needs) <= known, name
        known.add(name)
    with pytest.raises(DistillError, match="two experiments have different runs that are called 'conv6'"):
        runs.train("conv6", "conv", 5)


def test_the_page_has_the_sizes_of_sets_nets_and_comparisons():
    page = (ROOT / "docs/results/core.md").read_text(encoding="utf-8")
    train, val, test = (len(pictures_of(split, "").labels) for split in ("train", "val", "test"))
    assert f"{train} training pictures (2 of each digit), {val} for validation (2) and {test} for the test (8)" in page
    student, teacher = (sum(p.numel() for p in conv(width).parameters()) for width in (STUDENT, TEACHER))
    assert f"{student / 1000:.1f} k weights; their teacher has width {TEACHER} and {teacher / 1000:.0f} k" in page
    methods = EXPERIMENTS["every"].plan(Runs(600)).keys() - {"teacher", "none"}
    assert (
        f"compares {len(methods)} methods" in page and f"**Training:** {literature.STEPS} steps of 64 pictures" in page
    )


@pytest.mark.parametrize("wrong", [dict(special="mutal"), dict(peers=3), dict(special="netaug", average=True)])
def test_a_task_that_cannot_be_meant_is_refused(wrong: dict):
    with pytest.raises(DistillError, match="special is 'mutual', which takes peers and average, or 'netaug', got "):
        task("conv", 2, steps=4, **wrong)


def test_lengths_are_whole_parts():
    assert [Runs(600).count(length) for length in (1, 0.5, 0.01, 0.751)] == [600, 300, 4, 448]
    assert Runs(2).count(3) == 4 and Runs(2).count(0.1) == 1


def test_every_method_is_compared_if_it_is_named():
    usual = {name for name in EXPERIMENTS if name not in literature.NAMED}
    assert set(EXPERIMENTS) - usual == {"every", "weights"}
    runs = Runs(600)
    assert len(EXPERIMENTS["every"].plan(runs)) == 41
    given = [[*run.terms, *expand_recipe(run.recipe, RECIPES)] for run in runs.planned.values()]
    taught = {term if isinstance(term, str) else term["type"] for terms in given for term in terms}
    known = {name for name in TERMS if TERMS.get(name).__module__.startswith("kdgraft.")}
    others = {
        "AdversarialImages",
        "BoundedRegression",
        "FocalGlobal",
        "MarginMSE",
        "Reconstruction",
    }  # not for classifiers
    equal = {"ForwardKL", "TaskShare"}  # KD at T = 1; no method by itself
    assert known - taught == others | equal | {"BoundarySamples"}  # which `methods` has


@pytest.mark.slow
def test_every_experiment_runs_and_is_drawn(tmp_path: Path):
    results = literature.main(["all"], out=tmp_path, steps=5)
    assert {result.method.partition(":")[0] for result in results} == set(EXPERIMENTS)
    for name in PICTURES:
        assert Image.open(tmp_path / f"{name}.png").size[0] > 600


def test_what_cannot_be_meant_is_one_line(capsys):
    refused(capsys, ["experiments", "nothing"], "no experiment is called 'nothing'; known: 'hard_soft', ")
    refused(capsys, ["experiments", "methods", "--data", "nowhere"], "must have ten folders")
    real = ["experiments", "methods", "generators", "--data", "nowhere"]
    refused(capsys, real, "generators: only for the embedded digits; leave it out, or leave out --data")
    refused(capsys, ["experiments", "all", "--data", "nowhere"], "must have ten folders")
    refused(capsys, ["experiments", "--steps", "1"], "--steps must be a whole number >= 2")
