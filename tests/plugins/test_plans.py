"""Plans in plain PyTorch: what they say, that a run taught by another is, and that nothing finished is repeated."""

from __future__ import annotations

import json
import random
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from kdgraft import Distiller, DistillError, Ensemble, SoftTargets
from kdgraft.cli import main
from kdgraft.fit import fit
from kdgraft.isolation import isolated_rng
from kdgraft.plain import TRAINER, _task
from kdgraft.plans import read_plan
from support.commands import refused
from support.forking import python
from support.plans import TASKS, said, weights
from support.plans import plan as written

PLAN = """
[runs.student]
config = "tasks.py:small"
teacher = "assistant"
terms = [{ type = "SoftTargets", temperature = 2 }]

[runs.assistant]
config = "tasks.py:middle"
teacher = "teacher"
terms = [{ type = "SoftTargets", temperature = 2 }]

[runs.teacher]
config = "tasks.py:large"
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "tasks.py").write_text(TASKS)
    return tmp_path


def plan(folder: Path, text: str = PLAN, name: str = "plan", out: str = "out") -> Path:
    return written(folder, text, name, out)


def test_teacher_assistant_student(folder: Path):
    lines, found = said(plan(folder))
    assert [line.split(" ")[0] for line in lines[::2]] == ["teacher", "assistant", "student"]
    assert "after teacher" in lines[2] and "after assistant" in lines[4]
    assert all("accuracy" in line for line in lines[1::2])
    # The student by hand, from the assistant's weights.
    torch.manual_seed(0)
    task = _task(f"{folder}/tasks.py:small", {})
    assistant = _task(f"{folder}/tasks.py:middle", {}).model
    assistant.load_state_dict(weights(found["assistant", 0]))
    torch.manual_seed(0)
    task = _task(f"{folder}/tasks.py:small", {})
    distiller = Distiller(task.model, assistant, terms=[SoftTargets(2)], example=torch.zeros(1, 4))
    fit(distiller, task.loader, F.cross_entropy, epochs=3)
    ours = weights(found["student", 0])
    assert ours.keys() == task.model.state_dict().keys()
    assert all(torch.equal(ours[key], value) for key, value in task.model.state_dict().items())


def test_what_is_finished_is_not_repeated(folder: Path):
    path = plan(folder)
    _, first = said(path)
    steps = (folder / "steps").read_text()
    lines, again = said(path)
    assert all("finished" in line for line in lines) and len(lines) == 3
    assert again == first and (folder / "steps").read_text() == steps
    # One run's record is lost: that run alone is made again, to the same weights.
    before = weights(first["assistant", 0])
    (folder / "out/assistant/seed0/finished.json").unlink()
    lines, again = said(path)
    assert [line.split(": ")[1].split(",")[0].split(" ")[0] for line in lines] == [
        "finished",
        "goes",
        "done",
        "finished",
    ]
    assert all(torch.equal(value, before[key]) for key, value in weights(again["assistant", 0]).items())


def test_damaged_weights_teach_nobody(folder: Path):
    path = plan(folder)
    _, found = said(path)
    (folder / "out/student/seed0/finished.json").unlink()
    teacher = Path(found["assistant", 0].weights)
    saved = weights(found["assistant", 0])
    saved["0.bias"][0] += 1  # a file that can be read
    torch.save(saved, teacher)
    with pytest.raises(DistillError, match=r"assistant/seed0 is finished, but its weights .* are damaged or others"):
        said(path)


@pytest.mark.parametrize("record", ["{}", '{"model": 5}', '{"model": {"wieght": "a.pth"}}'])
def test_a_damaged_record_is_said(folder: Path, record: str):
    path = plan(folder)
    said(path)
    file = folder / "out/teacher/seed0/finished.json"
    told = json.loads(file.read_text())
    file.write_text(json.dumps({"settings": told["settings"], **json.loads(record)}))
    with pytest.raises(DistillError, match=r"finished\.json is damaged; remove it"):
        said(path)


ALL_KINDS = """
[runs.teacher]
config = "tasks.py:large"
[runs.assistant]
config = "tasks.py:small"
teacher = "teacher"
terms = [{ type = "SoftTargets", temperature = 2 }]
each = { width = [8, 16] }
choose = "accuracy"
[runs.student]
config = "tasks.py:small"
teacher = "assistant"
terms = [{ type = "SoftTargets", temperature = 2 }]
generations = 2
[runs.together]
config = "tasks.py:small"
ensemble = ["student-*"]
"""
COUNTED = """
import os, signal, sys
from kdgraft.cli import main

calls, last = 0, int(sys.argv[2])


def count(frame, event, argument):
    global calls
    calls += 1
    if calls == last:
        os.kill(os.getpid(), signal.SIGKILL)


sys.setprofile(count)
code = main(["plan", sys.argv[1]])
sys.setprofile(None)
print(calls)
sys.exit(code)
"""
"""Carries out a plan, and dies at a call or a return of a function, the last-th."""


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> tuple[dict, int]:
    """What a plan makes that nobody kills, and its number of calls and returns."""
    place = tmp_path_factory.mktemp("whole")
    (place / "tasks.py").write_text(TASKS)
    path = plan(place, ALL_KINDS)
    # Here and there one thread: sums depend on their number.
    done = python("-c", COUNTED, str(path), "0")
    assert done.returncode == 0, done.stderr
    return said(path)[1], int(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("number", [pytest.param(n, marks=[] if n == 4 else pytest.mark.slow) for n in range(10)])
def test_a_plan_that_was_killed_goes_on_to_the_same_results(folder: Path, uninterrupted, number: int):
    expected, calls = uninterrupted
    path = plan(folder, ALL_KINDS)
    killed = python("-c", COUNTED, str(path), str(random.Random(number).randrange(int(calls * 0.98))))
    assert killed.returncode == -signal.SIGKILL
    _, found = said(path)
    assert found.keys() == expected.keys()
    for key, model in expected.items():
        assert found[key].metrics == model.metrics
        assert Path(found[key].weights).relative_to(folder) == Path(model.weights).relative_to(path_of(model))
        if key[0] != "together":
            ours, theirs = weights(found[key]), weights(model)
            assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


def path_of(model) -> Path:
    """The folder in which a plan was carried out, from a model in out/run/seed0."""
    return next(parent.parent for parent in Path(model.weights).parents if parent.name == "out")


GIVEN = """
[runs.teacher]
config = "tasks.py:large"
checkpoint = "large.pth"

[runs.student]
config = "tasks.py:small"
teacher = "teacher"
terms = [{ type = "SoftTargets", temperature = 2 }]
"""


def test_a_teacher_that_is_trained_already_is_taken_as_it_is(folder: Path, capsys):
    said(plan(folder, GIVEN.replace('checkpoint = "large.pth"', ""), "trained"))
    made = folder / "trained"
    record = json.loads((folder / "out/teacher/seed0/finished.json").read_text())
    shutil.copy(record["model"]["weights"], folder / "large.pth")
    whole = weights(said(plan(folder, GIVEN.replace('checkpoint = "large.pth"', ""), "trained"))[1]["student", 0])
    steps = (folder / "steps").read_text()
    lines, found = said(plan(folder, GIVEN, "given", "other"))
    assert lines[0].startswith("teacher (seed 0, torch): takes ") and "large.pth" in lines[0]
    assert len((folder / "steps").read_text()) - len(steps) == len(steps) // 2  # the student's alone
    assert all(torch.equal(value, whole[key]) for key, value in weights(found["student", 0]).items())
    lines, _ = said(plan(folder, GIVEN, "given", "other"))
    assert all("finished" in line for line in lines)
    # Other weights in the file are another teacher.
    other = torch.load(folder / "large.pth", weights_only=True)
    torch.save({key: value + 1 for key, value in other.items()}, folder / "large.pth")
    refused(capsys, ["plan", str(folder / "given.toml")], "holds a run with other settings")
    # Those of another model do not fit.
    shutil.copy(found["student", 0].weights, folder / "large.pth")
    refused(capsys, ["plan", str(plan(folder, GIVEN, "misfit", "third"))], "large.pth")
    assert not made.exists()


def test_a_dry_run_does_nothing(folder: Path):
    lines, found = said(plan(folder), dry_run=True)
    assert [line.split(": ")[1].split(" ")[0].rstrip(",") for line in lines] == ["trains"] * 3
    assert found == {} and not (folder / "out").exists()


def test_seeds_start_and_options(folder: Path):
    text = """
seeds = [1, 2]
[runs.first]
config = "tasks.py:small"
options = { width = 6 }
[runs.second]
config = "tasks.py:small"
options = { width = 6 }
start = "first"
"""
    _, found = said(plan(folder, text))
    assert set(found) == {(run, seed) for run in ("first", "second") for seed in (1, 2)}
    assert weights(found["first", 1])["0.weight"].shape == (6, 4)
    assert not torch.equal(weights(found["first", 1])["0.weight"], weights(found["first", 2])["0.weight"])
    # The second goes on from the first: another training of three epochs from its weights.
    task = _task(f"{folder}/tasks.py:small", {"width": 6})
    torch.manual_seed(1)
    task = _task(f"{folder}/tasks.py:small", {"width": 6})
    task.model.load_state_dict(weights(found["first", 1]))
    fit(task.model, task.loader, F.cross_entropy, epochs=3)
    assert torch.equal(task.model[0].weight, weights(found["second", 1])["0.weight"])


def test_a_task_with_an_argument_start_is_given_the_weights_of_that_run(folder: Path):
    tasks = folder / "tasks.py"
    tasks.write_text(
        TASKS
        + """
def grown(start=None):
    found = task(6)
    if start is not None:  # twice as many units: the old ones, and new ones of weight 0
        old = torch.load(start, weights_only=True)
        for name, own in found.model.state_dict().items():
            own.zero_()[tuple(slice(0, size) for size in old[name].shape)] = old[name]
    return found
"""
    )
    text = """
[runs.first]
config = "tasks.py:small"
options = { width = 3 }
[runs.second]
config = "tasks.py:grown"
start = "first"
[runs.student]
config = "tasks.py:small"
teacher = "second"
terms = ["SoftTargets"]
"""
    _, found = said(plan(folder, text))
    assert weights(found["second", 0])["0.weight"].shape == (6, 4)
    torch.manual_seed(0)
    task = _task(f"{folder}/tasks.py:grown", {"start": found["first", 0].weights})
    assert torch.equal(task.model[0].weight[:3], weights(found["first", 0])["0.weight"])
    fit(task.model, task.loader, F.cross_entropy, epochs=3)
    assert torch.equal(task.model[0].weight, weights(found["second", 0])["0.weight"])
    twice = text.replace('config = "tasks.py:grown"', 'config = "tasks.py:grown"\noptions = { start = "x.pth" }')
    shutil.rmtree(folder / "out")
    with pytest.raises(DistillError, match="gets start from the run's own entry; leave it out of the options"):
        said(plan(folder, twice))


@pytest.mark.parametrize("finished", [True, False])
def test_a_teacher_is_built_with_its_options(folder: Path, finished: bool):
    first = '[runs.teacher]\nconfig = "tasks.py:small"\noptions = { width = 12 }\n'
    said(plan(folder, first))
    file = f'{{ config = "{folder}/tasks.py:small", options = {{ width = 12 }}, checkpoint = "{folder}/out/teacher/seed0/student.pth" }}'
    told = '"teacher"' if finished else file
    student = f'[runs.student]\nconfig = "tasks.py:small"\nteacher = {told}\nterms = ["SoftTargets"]\n'
    _, found = said(plan(folder, first + student))
    assert weights(found["teacher", 0])["0.weight"].shape == (12, 4)
    assert weights(found["student", 0])["0.weight"].shape == (4, 4)


def test_two_teachers_and_their_ensemble(folder: Path):
    text = """
[runs.a]
config = "tasks.py:large"
[runs.b]
config = "tasks.py:middle"
[runs.student]
config = "tasks.py:small"
teachers = { a = "a", b = "b", teacher = { type = "Ensemble", members = ["a", "b"] } }
terms = ["SoftTargets"]
"""
    _, found = said(plan(folder, text))
    torch.manual_seed(0)
    task = _task(f"{folder}/tasks.py:small", {})
    with isolated_rng():
        both = {name: _task(f"{folder}/tasks.py:{kind}", {}).model for name, kind in (("a", "large"), ("b", "middle"))}
        for name, model in both.items():
            model.load_state_dict(weights(found[name, 0]))
    distiller = Distiller(
        task.model, teachers={**both, "teacher": Ensemble(["a", "b"])}, terms=["SoftTargets"], example=torch.zeros(1, 4)
    )
    fit(distiller, task.loader, F.cross_entropy, epochs=3)
    ours = weights(found["student", 0])
    assert all(torch.equal(ours[key], value) for key, value in task.model.state_dict().items())


def test_other_settings_in_a_folder_are_refused(folder: Path):
    path = plan(folder)
    said(path)
    changed = plan(folder, PLAN.replace("temperature = 2", "temperature = 3"))
    with pytest.raises(
        DistillError, match=r"assistant/seed0 holds a run with other settings.*remove it, or give the plan another out"
    ):
        said(changed)
    record = json.loads((folder / "out/teacher/seed0/finished.json").read_text())
    Path(record["model"]["weights"]).unlink()
    with pytest.raises(DistillError, match=r"weights .* are gone"):
        said(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no runs"),
        ("[runs.a]\n", "run 'a' needs config"),
        ("[runs.a]\nconfig = 3\n", "run 'a': config must be a text, got 3"),
        ("[runs.a]\nconfig = 'x.py:f'\nteachr = 'b'\n", "run 'a' has no entry 'teachr'; did you mean 'teacher'"),
        ("sed = [1]\n[runs.a]\nconfig = 'x.py:f'\n", "has no entry 'sed'; did you mean 'seeds'"),
        ("seeds = []\n[runs.a]\nconfig = 'x.py:f'\n", "seeds must be a list of different whole numbers"),
        ("seeds = [1, 1]\n[runs.a]\nconfig = 'x.py:f'\n", "seeds must be a list of different whole numbers"),
        ("seeds = [-1]\n[runs.a]\nconfig = 'x.py:f'\n", "a seed must be a whole number >= 0, got -1"),
        (f"seeds = [{2**32}]\n[runs.a]\nconfig = 'x.py:f'\n", "a seed must be below 2**32, got 4294967296"),
        ("[runs.a]\nconfig = 'x.py:f'\nteacher = 'b'\nterms = ['SoftTargets']\n", "a needs 'b', which is not a run"),
        (
            "[runs.a]\nconfig = 'x.py:f'\nteacher = 'b'\n[runs.b]\nconfig = 'x.py:f'\n",
            "a teacher needs terms or a recipe",
        ),
        ("[runs.a]\nconfig = 'x.py:f'\nterms = ['SoftTargets']\n", "terms need a teacher"),
        (
            "[runs.a]\nconfig = 'x.py:f'\nstart = 'b'\n[runs.b]\nconfig = 'x.py:f'\nstart = 'a'\n",
            "these runs wait for each other: ",
        ),
        ("[runs.a]\nconfig = 'x.py:f'\nteacher = 1\nterms = ['SoftTargets']\n", "must be a run's name or a table"),
        ("[runs.'a b']\nconfig = 'x.py:f'\n", "a run's name must be letters"),
        ("runs = 3", "has no runs"),
        ("[runs.a]\nconfig = 'x.py:f'\ncheckpoint = 'absent.pth'\n", "run 'a': there is no checkpoint absent.pth"),
        (
            "[runs.a]\nconfig = 'x.py:f'\ncheckpoint = 'plan.toml'\nstart = 'b'\nstop = 1\n",
            "run 'a': a checkpoint is taken as it is and not trained; leave out start, stop",
        ),
        ("[runs", "cannot read plan"),
    ],
)
def test_a_plan_that_is_wrong_is_one_line(tmp_path: Path, capsys, text: str, message: str):
    path = tmp_path / "plan.toml"
    path.write_text(text)
    refused(capsys, ["plan", str(path)], message)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("absent.py:f", "config not found: "),
        ("tasks.py:smal", "tasks.py has no function 'smal'; did you mean 'small'"),
        ("tasks.py:nothing", "returned a NoneType, not a kdgraft.plain.Task"),
        ("tasks.txt", "no host trains"),
    ],
)
def test_a_config_that_is_none_is_one_line(folder: Path, capsys, config: str, message: str):
    path = plan(folder, f"[runs.a]\nconfig = '{config}'\n")
    refused(capsys, ["plan", str(path)], message)


def test_a_task_is_for_plans_alone(folder: Path, capsys):
    assert main(["train", f"{folder}/tasks.py:small"]) == 2
    assert "kdgraft plan" in capsys.readouterr().err
    assert TRAINER.reads("a.py:b") and not TRAINER.reads("a.py") and not TRAINER.reads("mmdet::a.py")


def test_the_plan_of_the_pages_runs_as_printed(tmp_path: Path, monkeypatch, capsys):
    page = (Path(__file__).parents[2] / "docs" / "plans.md").read_text(encoding="utf-8")
    text, tasks = (re.search(rf'title="{name}"\n(.*?)```', page, re.DOTALL)[1] for name in ("chain.toml", "tasks.py"))
    assert len(text.splitlines()) <= 15
    (tmp_path / "tasks.py").write_text(tasks)
    (tmp_path / "chain.toml").write_text(text)
    monkeypatch.chdir(tmp_path)
    found = read_plan("chain.toml")
    assert [run.name for run in found.runs] == ["teacher", "assistant", "student"]
    assert [run.needs for run in found.runs] == [[], ["teacher"], ["assistant"]]
    assert (found.out, found.seeds) == (Path("runs/chain"), (0, 1))
    assert main(["plan", "chain.toml", "--dry-run"]) == 0
    assert not (tmp_path / "runs").exists() and capsys.readouterr().out.count("trains") == 6
    assert main(["plan", "chain.toml"]) == 0
    assert (tmp_path / "runs/chain/student/seed1/student.pth").is_file()
    capsys.readouterr()
    assert main(["plan", "chain.toml"]) == 0
    assert capsys.readouterr().out.count("finished") == 6


def test_a_tiny_net_that_trained_inside_wider_ones_teaches_starts_and_is_averaged_as_itself(folder: Path, capsys):
    with (folder / "tasks.py").open("a") as file:
        file.write("""
from dataclasses import replace
from kdgraft import NetAug


def inside(width=4):
    net = NetAug(lambda w: small(round(width * w)).model, widths=(1, 2), example=X[:1])
    return replace(small(), model=net)
""")
    config, net = "tasks.py:inside", 'config = "tasks.py:small"\n'
    text = f"""
[runs.tiny]
config = "{config}"
[runs.again]
config = "{config}"
start = "tiny"
[runs.student]
{net}teacher = "tiny"
terms = ["SoftTargets"]
[runs.together]
{net}ensemble = ["tiny", "again"]
"""
    _, found = said(plan(folder, text))
    tiny, task = weights(found["tiny", 0]), _task(f"{folder}/tasks.py:small", {})
    task.model.load_state_dict(tiny)
    accuracy = float(task.evaluate(task.model.eval())["accuracy"])
    assert found["tiny", 0].metrics["accuracy"] == pytest.approx(accuracy)
    # The teacher of the student is the tiny net alone.
    torch.manual_seed(0)
    student = _task(f"{folder}/tasks.py:small", {})
    distiller = Distiller(student.model, task.model, ["SoftTargets"], torch.zeros(1, 4))
    fit(distiller, student.loader, F.cross_entropy, epochs=3)
    for name, value in student.model.state_dict().items():
        assert torch.equal(value, weights(found["student", 0])[name]), name
    text = f'[runs.a]\n{net}[runs.b]\nconfig = "{config}"\nteacher = "a"\nterms = ["SoftTargets"]\n'
    refused(capsys, ["plan", str(plan(folder, text, out="new"))], "trains a NetAug, which takes no teacher in a plan")
