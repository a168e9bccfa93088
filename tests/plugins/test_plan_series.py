"""Plans whose entries become several runs: chains, generations, stages, one run for each value, choices, ensembles."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Subset, TensorDataset

from kdgraft import Distiller, DistillError, Ensemble, SoftTargets
from kdgraft.cli import main
from kdgraft.ensembles import EnsembleModel
from kdgraft.fit import fit
from kdgraft.isolation import isolated_rng
from kdgraft.plain import _task
from kdgraft.plans import Choice, PlannedRun, read_plan
from support.commands import refused
from support.plans import TASKS, plan, said, weights

NET = 'config = "tasks.py:small"\n'
SOFT = 'terms = [{ type = "SoftTargets", temperature = 2 }]\n'
ASSISTANTS = f"""
[runs.teacher]
config = "tasks.py:large"
[runs.assistant]
{NET}teacher = "teacher"
{SOFT}each = {{ width = [8, 16] }}
[runs.student]
{NET}teacher = "assistant"
{SOFT}choose = "accuracy"
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "tasks.py").write_text(TASKS)
    return tmp_path


def runs(folder: Path, text: str) -> dict:
    return {run.name: run for run in read_plan(plan(folder, text)).runs}


# --- what an entry becomes


def test_a_chain_is_taught_link_by_link(folder: Path):
    made = runs(folder, f'[runs.net]\n{NET}{SOFT}chain = {{ width = [32, 16, 4] }}\n[runs.after]\n{NET}start = "net"\n')
    assert [(run.name, run.options, dict(run.teachers)) for run in made.values()] == [
        ("net-32", {"width": 32}, {}),
        ("net-16", {"width": 16}, {"teacher": "net-32"}),
        ("net-4", {"width": 4}, {"teacher": "net-16"}),
        ("after", {}, {}),
    ]
    assert made["net-32"].terms == () and made["net-16"].terms == made["net-4"].terms != ()
    assert made["after"].start == "net-4"


def test_a_chain_through_several_configs_and_options(folder: Path):
    text = f'[runs.net]\n{NET}{SOFT}chain = {{ config = ["tasks.py:large", "x.py:f"], "a.b" = [[1, 2], [3]] }}\n'
    made = runs(folder, text)
    assert [(run.name, run.config, run.options) for run in made.values()] == [
        ("net-large", f"{folder}/tasks.py:large", {"a.b": [1, 2]}),
        ("net-f", "x.py:f", {"a.b": [3]}),
    ]


def test_generation_k_teaches_generation_k_plus_1(folder: Path):
    text = f"""
[runs.teacher]
config = "tasks.py:large"
[runs.ban]
{NET}teacher = "teacher"
{SOFT}generations = 3
[runs.next]
{NET}teacher = ["ban-*", "teacher"]
{SOFT}
[runs.both]
{NET}ensemble = {{ members = ["ban", "ban-1"], mean = "geometric", weights = [3, 1] }}
"""
    made = runs(folder, text)
    assert [run.teachers for name, run in made.items() if name.startswith("ban")] == [
        {"teacher": "teacher"},
        {"teacher": "ban-1"},
        {"teacher": "ban-2"},
    ]
    members = [f"teacher_{i}" for i in range(4)]
    four = dict(zip(members, ("ban-1", "ban-2", "ban-3", "teacher"), strict=True))
    assert made["next"].teachers == {**four, "teacher": {"type": "Ensemble", "members": members}}
    assert made["both"].teachers == {
        "teacher_0": "ban-3",
        "teacher_1": "ban-1",
        "teacher": {"type": "Ensemble", "members": members[:2], "mean": "geometric", "weights": [3, 1]},
    }
    assert made["both"].ensemble == "softmax" and made["both"].terms == ()


def test_stages_start_from_one_another(folder: Path):
    text = f"""
[runs.teacher]
config = "tasks.py:large"
[runs.net]
{NET}options = {{ width = 6 }}
teacher = "teacher"
stages = [{{ terms = ["Hint", "TaskShare"], options = {{ a = 1 }}, stop = 2 }}, {{ start = "x" }}]
"""
    with pytest.raises(DistillError, match=r"run 'net': a stage has no entry 'start'; known: 'config', "):
        read_plan(plan(folder, text))
    made = runs(folder, text.replace('start = "x"', ""))
    first, second = made["net-1"], made["net-2"]
    assert (first.terms, first.options, first.stop, first.start) == (
        ("Hint", "TaskShare"),
        {"width": 6, "a": 1},
        2,
        None,
    )
    assert (second.terms, second.options, second.stop, second.start) == ((), {"width": 6}, None, "net-1")
    assert first.teachers == {"teacher": "teacher"} and second.teachers == {}


def test_a_student_for_each_assistant_and_the_choice(folder: Path):
    made = runs(folder, ASSISTANTS + f'[runs.last]\n{NET}teacher = "student"\n{SOFT}')
    assert list(made) == ["teacher", "assistant-8", "assistant-16", "student-8", "student-16", "student", "last"]
    assert made["student-16"].teachers == {"teacher": "assistant-16"} and made["student-16"].options == {}
    assert made["student"] == Choice("student", ("student-8", "student-16"), "accuracy")
    assert made["last"].teachers == {"teacher": "student"} and made["last"].needs == ["student"]


def test_each_goes_through_generations_and_what_follows(folder: Path):
    text = f"""
[runs.net]
{NET}{SOFT}generations = 2
each = {{ width = [8, 16] }}
[runs.after]
{NET}start = "net"
"""
    made = runs(folder, text)
    assert [(run.name, run.options, run.start) for run in made.values()] == [
        ("net-8-1", {"width": 8}, None),
        ("net-8-2", {"width": 8}, None),
        ("net-16-1", {"width": 16}, None),
        ("net-16-2", {"width": 16}, None),
        ("after-8", {}, "net-8-2"),
        ("after-16", {}, "net-16-2"),
    ]


@pytest.mark.parametrize(
    ("by", "midway", "chosen"),
    [
        ("accuracy", (), "b"),  # the first of equals
        ("-accuracy", (), "a"),
        ("accuracy", ("t", "s"), "c"),  # (1.0 + 0.2) / 2 = 0.6: 0.65 is nearer than 0.3 and 0.8
        ("accuracy", ("s", "a"), "a"),  # 0.25
    ],
)
def test_the_choice_by_hand(by: str, midway: tuple, chosen: str):
    values = dict(a=0.3, b=0.8, c=0.65, d=0.8, t=1.0, s=0.2)
    metrics = {name: {"accuracy": value} for name, value in values.items()}
    assert Choice("x", ("a", "b", "c", "d"), by, midway).pick(metrics) == chosen


def test_a_choice_by_what_was_not_measured_is_refused():
    with pytest.raises(DistillError, match="x chooses by 'acuracy', which a has not measured; did you mean 'accuracy'"):
        Choice("x", ("a",), "-acuracy").pick({"a": {"accuracy": 1.0}})
    with pytest.raises(DistillError, match="x cannot choose: accuracy of a is not a number"):
        Choice("x", ("a",), "accuracy").pick({"a": {"accuracy": float("nan")}})


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ("generations = 0\n" + SOFT, "run 'a': generations must be a whole number >= 1, got 0"),
        ("generations = 2", "run 'a': generations needs terms or a recipe, by which each run teaches the next"),
        ("generations = 2\nchain = { width = [1] }\n" + SOFT, "chain and generations exclude each other"),
        ("generations = 2\nteachers = { x = 'b' }\n" + SOFT, "generations needs one teacher = '…'"),
        ("chain = { width = 3 }\n" + SOFT, "chain.width must be a list of values, got 3"),
        (
            "each = { width = [1, 2], depth = [1] }",
            "each needs equally many values of each option, got 2 of width, 1 of depth",
        ),
        ("chain = [3]\n" + SOFT, "chain must be a table, got [3]"),
        ("each = {}", "each is empty; leave it out"),
        ("stages = []", "stages is empty; leave it out"),
        ("each = { config = [3, 4] }", "each.config must be a list of configs, got [3, 4]"),
        ("each = { width = [3, 3] }", "each gives the same values twice; leave one of them out"),
        ("chain = { width = [1, 2] }\neach = { width = [3] }\n" + SOFT, "each and chain both change width"),
        (
            "stages = [{}, { options = { width = 2 } }]\neach = { width = [3] }",
            "each and stages both change width; change it in one of them",
        ),
        (
            "generations = 2\nchoose = 'accuracy'\n" + SOFT,
            "or a teacher that has it; runs of which each follows the one before are no choice",
        ),
        ("each = { width = [1, 2] }\nchoose = { by = 'x', midway = ['b', 'b'] }", "midway must be two different runs"),
        ("ensemble = ['b-*']\neach = { width = [1] }", "an ensemble is evaluated and not trained; leave out each"),
        ("ensemble = ['b-*']\nstages = [{}]", "an ensemble is evaluated and not trained; leave out stages"),
        ("stages = [3]", "a stage must be a table such as { terms = […] }, got 3"),
        ("stages = [{ terms = ['Hint'] }]", "terms need a teacher"),
        ("each = { width = [1, 2] }\nchoose = 3", "choose must be a metric or a table such as"),
        ("each = { width = [1, 2] }\nchoose = { bye = 'x' }", "choose has no entry 'bye'; did you mean 'by'"),
        ("each = { width = [1, 2] }\nchoose = { by = '-' }", "choose needs by = 'metric', or '-metric' for the lowest"),
        ("each = { width = [1, 2] }\nchoose = { by = 'x', midway = ['b'] }", "midway must be two different runs"),
        ("each = { width = [1, 2] }\nchoose = { by = '-x', midway = ['b', 'b'] }", "write by = 'x'"),
        ("each = { width = [1, 2] }\nchoose = { by = 'x', midway = ['b', 'c'] }", "a needs 'c', which is not a run"),
        ("choose = 'accuracy'", "a: choose needs several runs: each = { option = [value, …] }"),
        ("teacher = 'b-2'\n" + SOFT, "a needs 'b-2', which is not a run; did you mean 'b-8', 'b-7'"),
        ("teacher = ['b-7']\n" + SOFT, "a: an ensemble needs two or more different runs, got b-7"),
        ("teacher = ['b-*', 'b-8']\n" + SOFT, "an ensemble needs two or more different runs, got b-7, b-8, b-8"),
        (
            "each = { width = [1] }\nchoose = { by = 'x', midway = ['b', 'b-7'] }",
            "a: midway needs single runs, and b is several",
        ),
        ("teacher = 'b'\neach = { width = [1, 2] }\n" + SOFT, "each, and a teacher with each, make too many runs"),
        ("teacher = 'b'\nstart = 'd'\n" + SOFT, "a needs b and d, which are several runs each; choose one of either"),
        ("teacher = [3]\n" + SOFT, "the members of teacher must be a list of names, got [3]"),
        ("teacher = 'e'\n" + SOFT, "e is an ensemble, which has no weights of its own; list its members"),
        ("ensemble = ['b-*']\n" + SOFT, "an ensemble is evaluated and not trained; leave out terms"),
        ("ensemble = 'b'", "ensemble must be a list of runs, or { members = [run, …], mean = '…' }, got 'b'"),
        (
            "ensemble = { members = ['b-7', 'b-8'], kind = 'x' }",
            "ensemble.kind must be 'softmax', 'sigmoid' or 'value'",
        ),
        ("ensemble = ['b-*']\nteacher = 'b'", "give one of teacher and ensemble, but not both"),
        ("stop = 0", "run 'a': stop must be a whole number >= 1, got 0"),
        ("data = {}", "data needs set = '…', share = 0.03 or labels = false"),
        ("data = { shar = 0.1 }", "data has no entry 'shar'; did you mean 'share'"),
        ("data = { share = 1.5 }", "data.share must be in (0, 1], got 1.5"),
        ("data = { share = 0 }", "share must be a number > 0, got 0"),
        ("data = { set = 3 }", "data.set must be a text, got 3"),
        ("data = { labels = 'no' }", "labels must be true or false, got 'no'"),
        ("data = { labels = false }", "data without labels needs a teacher"),
        ("teacher = 'a-2'\ngenerations = 2\n" + SOFT, "these runs wait for each other: a → a"),
        ("generations = 2\n" + SOFT + "[runs.a-2]\n" + NET, "two runs are called a-2; give one of them another name"),
    ],
)
def test_an_entry_that_is_wrong_is_one_line(folder: Path, capsys, entries: str, message: str):
    others = f"""
[runs.b]
{NET}each = {{ width = [7, 8] }}
[runs.d]
{NET}each = {{ width = [3, 4] }}
[runs.e]
{NET}ensemble = ["b-*"]
"""
    refused(capsys, ["plan", str(plan(folder, f"{others}[runs.a]\n{NET}{entries}\n"))], message)


# --- what is made of them


def by_hand(
    folder: Path, options: dict, teacher=None, terms=(), epochs: int = 3, start=None
) -> dict[str, torch.Tensor]:
    """The weights of a small net that is trained as a plan does."""
    torch.manual_seed(0)
    task = _task(f"{folder}/tasks.py:small", options)
    if start is not None:
        task.model.load_state_dict(start)
    model = task.model
    if teacher is not None:
        model = Distiller(model, teachers=teacher, terms=terms, example=torch.zeros(1, 4))
    fit(model, task.loader, F.cross_entropy, epochs=epochs)
    return task.model.state_dict()


def model_of(folder: Path, state, **options):
    model = _task(f"{folder}/tasks.py:small", options).model
    model.load_state_dict(state)
    return model


def same(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_the_best_students_assistant_is_chosen_and_stays_chosen(folder: Path, capsys):
    path = plan(folder, ASSISTANTS.replace('"tasks.py:large"', '"tasks.py:small"\noptions = { width = 32 }'))
    lines, found = said(path)
    figures = {width: found[f"student-{width}", 0].metrics["accuracy"] for width in (8, 16)}
    best = max(figures, key=figures.get)
    assert found["student", 0] == found[f"student-{best}", 0]
    assert "chooses by accuracy among student-8, student-16" in lines[-2] and f"student-{best} is chosen" in lines[-1]
    record = json.loads((folder / "out/student/seed0/finished.json").read_text())
    assert record["chosen"] == f"student-{best}"
    assert record["values"] == {f"student-{width}": value for width, value in figures.items()}
    # A student's weights by hand, from its assistant's.
    assistant = model_of(folder, weights(found["assistant-16", 0]), width=16)
    same(by_hand(folder, {}, {"teacher": assistant}, [SoftTargets(2)]), weights(found["student-16", 0]))
    # The record decides, and not what the figures would say now.
    other = f"student-{8 if best == 16 else 16}"
    record |= {"chosen": other, "model": json.loads((folder / f"out/{other}/seed0/finished.json").read_text())["model"]}
    (folder / "out/student/seed0/finished.json").write_text(json.dumps(record))
    lines, found = said(path)
    assert found["student", 0] == found[other, 0] and all("finished" in line for line in lines)


def test_generations_and_their_ensemble(folder: Path):
    text = f"""
[runs.teacher]
{NET}[runs.ban]
{NET}teacher = "teacher"
{SOFT}generations = 2
[runs.together]
{NET}ensemble = ["ban-*"]
[runs.student]
{NET}teacher = ["ban-*"]
{SOFT}
"""
    path = plan(folder, text)
    lines, found = said(path)
    assert "together (seed 0, torch): evaluates an ensemble after ban-1, ban-2" in "\n".join(lines)
    states = {name: weights(found[name, 0]) for name in ("teacher", "ban-1", "ban-2", "student")}
    models = {name: model_of(folder, state) for name, state in states.items()}
    same(by_hand(folder, {}, {"teacher": models["teacher"]}, [SoftTargets(2)]), states["ban-1"])
    same(by_hand(folder, {}, {"teacher": models["ban-1"]}, [SoftTargets(2)]), states["ban-2"])
    both = {"a": models["ban-1"], "b": models["ban-2"], "teacher": Ensemble(["a", "b"])}
    same(by_hand(folder, {}, both, [SoftTargets(2)]), states["student"])
    # The ensemble's accuracy: the mean of the probabilities.
    task = _task(f"{folder}/tasks.py:small", {})
    x, y = task.loader.dataset.tensors
    with torch.no_grad():
        mean = sum(models[name].eval()(x).softmax(-1) for name in ("ban-1", "ban-2")) / 2
    assert found["together", 0].metrics == {"accuracy": float((mean.argmax(-1) == y).float().mean())}
    # One generation more: those that are there stay.
    steps = (folder / "steps").read_text()
    lines, _ = said(plan(folder, text.partition("[runs.together]")[0].replace("generations = 2", "generations = 3")))
    assert [line.partition("): ")[2][:8] for line in lines] == ["finished"] * 3 + ["trains a", "done  lo"]
    assert len((folder / "steps").read_text()) - len(steps) == 12


@pytest.mark.parametrize(
    ("mean", "kind"),
    [("arithmetic", "softmax"), ("geometric", "softmax"), ("arithmetic", "sigmoid"), ("arithmetic", "value")],
)
def test_the_mean_of_an_ensemble_by_hand(mean: str, kind: str):
    # Weights 3 : 1 of logits (0, 2) and (1, -1).
    members = [torch.nn.Linear(1, 2), torch.nn.Linear(1, 2)]
    for member, logits in zip(members, ([0.0, 2.0], [1.0, -1.0]), strict=True):
        torch.nn.init.zeros_(member.weight)
        member.bias.data = torch.tensor(logits)
    out = EnsembleModel(members, Ensemble(["a", "b"], mean, [3, 1]), kind)(torch.ones(1, 1))[0]
    logits = torch.tensor([[0.0, 2.0], [1.0, -1.0]])
    if kind == "value" or mean == "geometric":
        torch.testing.assert_close(out, 0.75 * logits[0] + 0.25 * logits[1])
    elif kind == "sigmoid":
        torch.testing.assert_close(out.sigmoid(), 0.75 * logits[0].sigmoid() + 0.25 * logits[1].sigmoid())
    else:
        torch.testing.assert_close(out.softmax(-1), 0.75 * logits[0].softmax(-1) + 0.25 * logits[1].softmax(-1))
    with pytest.raises(DistillError, match=r"members that return tensors of one shape, got \[\(1, 2\), \(1, 3\)\]"):
        EnsembleModel([members[0], torch.nn.Linear(1, 3)], Ensemble(["a", "b"]))(torch.ones(1, 1))


def test_features_first_and_then_the_task(folder: Path):
    text = f"""
[runs.teacher]
{NET}[runs.student]
{NET}teacher = "teacher"
stages = [{{ terms = [{{ type = "Hint", tap = "1" }}, "TaskShare"] }}, {{ terms = ["SoftTargets"] }}]
"""
    _, found = said(plan(folder, text))
    teacher = {"teacher": model_of(folder, weights(found["teacher", 0]))}
    first = by_hand(folder, {}, teacher, [dict(type="Hint", tap="1"), "TaskShare"])
    same(first, weights(found["student-1", 0]))
    same(by_hand(folder, {}, teacher, ["SoftTargets"], start=first), weights(found["student-2", 0]))
    # The host's own loss is silent: the head, which features do not reach, gets no gradient but weight decay.
    torch.manual_seed(0)
    start = _task(f"{folder}/tasks.py:small", {}).model.state_dict()
    decay = (1 - 1e-3 * 1e-2) ** 12
    torch.testing.assert_close(first["3.weight"], start["3.weight"] * decay)
    assert not torch.allclose(first["0.weight"], start["0.weight"], rtol=1e-3)


# --- other data, and an end before the schedule's

DATA = """

def half():
    return DataLoader(TensorDataset(X[:32], Y[:32]), 16, shuffle=True)


def inputs():
    return DataLoader(X + 1, 16, shuffle=True)


def ordered():
    return [(X, Y)]
"""
TAUGHT = f'[runs.teacher]\nconfig = "tasks.py:large"\n[runs.net]\n{NET}teacher = "teacher"\nterms = ["SoftTargets"]\n'


def with_data(folder: Path) -> Path:
    (folder / "tasks.py").write_text(TASKS + DATA)
    return folder


def fitted(folder: Path, found, loader, terms) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    task = _task(f"{folder}/tasks.py:small", {})
    with isolated_rng():
        teacher = _task(f"{folder}/tasks.py:large", {}).model
    teacher.load_state_dict(weights(found["teacher", 0]))
    distiller = Distiller(task.model, teacher, terms=terms, example=torch.zeros(1, 4))
    fit(distiller, loader(task), F.cross_entropy, epochs=3)
    return task.model.state_dict()


def test_a_share_of_the_training_set_is_drawn_with_the_seed(folder: Path):
    _, found = said(plan(folder, TAUGHT + "data = { share = 0.25 }\n"))
    kept = sorted(torch.randperm(64, generator=torch.Generator().manual_seed(0))[:16].tolist())

    def loader(task):
        return DataLoader(Subset(task.loader.dataset, kept), 16, shuffle=True)

    same(fitted(folder, found, loader, ["SoftTargets"]), weights(found["net", 0]))


def test_another_training_set(folder: Path):
    _, found = said(plan(with_data(folder), TAUGHT + 'data = { set = "tasks.py:half" }\n'))

    def loader(task):
        x, y = task.loader.dataset.tensors
        return DataLoader(TensorDataset(x[:32], y[:32]), 16, shuffle=True)

    same(fitted(folder, found, loader, ["SoftTargets"]), weights(found["net", 0]))
    # The set belongs to the settings of the run.
    (folder / "tasks.py").write_text(TASKS + DATA.replace("32", "48"))
    with pytest.raises(DistillError, match="seed0 holds a run with other settings"):
        said(plan(folder, TAUGHT + 'data = { set = "tasks.py:half" }\n'))


def test_unlabelled_data_teaches_by_the_predictions_alone(folder: Path):
    text = TAUGHT + 'data = { set = "tasks.py:inputs", labels = false }\n'
    assert runs(with_data(folder), text)["net"].terms == ("SoftTargets", "TaskShare")
    _, found = said(plan(folder, text))

    def loader(task):  # targets that would ruin the student if they were read
        x = task.loader.dataset.tensors[0] + 1
        return DataLoader(TensorDataset(x, torch.full((64,), 3)), 16, shuffle=True)

    same(fitted(folder, found, loader, ["SoftTargets", "TaskShare"]), weights(found["net", 0]))


def test_labels_are_left_out_of_data_that_have_them(folder: Path, capsys):
    _, found = said(plan(folder, TAUGHT + "data = { labels = false }\n"))

    def loader(task):
        return DataLoader(TensorDataset(task.loader.dataset.tensors[0], torch.zeros(64).long()), 16, shuffle=True)

    same(fitted(folder, found, loader, ["SoftTargets", "TaskShare"]), weights(found["net", 0]))
    text = TAUGHT.replace('["SoftTargets"]', '["DKD"]') + "data = { labels = false }\n"
    refused(capsys, ["plan", str(plan(folder, text, out="dkd"))], "dkd needs the class of each item")


def test_a_loader_that_cannot_be_drawn_from_is_refused(folder: Path, capsys):
    text = TAUGHT + 'data = { set = "tasks.py:ordered", share = 0.5 }\n'
    refused(capsys, ["plan", str(plan(with_data(folder), text))], "data.share needs a DataLoader", "got list")


def test_a_set_that_gives_no_batches_of_inputs_and_targets_is_one_line(folder: Path, capsys):
    def line(data: str, *parts: str) -> None:
        refused(capsys, ["plan", str(plan(with_data(folder), TAUGHT + f"data = {data}\n"))], *parts)
        shutil.rmtree(folder / "out")

    line('{ set = "tasks.py:inputs" }', "the loader must yield (inputs, targets), got a Tensor")
    line('{ set = "tasks.py" }', "data.set must name a function, 'file.py:function', got", "tasks.py")
    line('{ set = "tasks.py:task" }', "cannot be called with options {}: missing a required argument: 'width'")


def test_a_teacher_that_is_stopped_early(folder: Path, capsys):
    _, found = said(plan(folder, f"[runs.early]\n{NET}stop = 2\n[runs.whole]\n{NET}"))
    same(by_hand(folder, {}, epochs=2), weights(found["early", 0]))
    assert not torch.equal(weights(found["early", 0])["0.weight"], weights(found["whole", 0])["0.weight"])
    refused(capsys, ["plan", str(plan(folder, f"[runs.a]\n{NET}stop = 9\n"))], "at most the 3 epochs of the schedule")


def test_everything_is_looked_at_before_the_first_run(folder: Path, capsys):
    text = f"[runs.a]\n{NET}[runs.b]\nconfig = 'tasks.py:smal'\n"
    refused(capsys, ["plan", str(plan(folder, text))], "has no function 'smal'; did you mean 'small'")
    assert not (folder / "out").exists()
    (folder / "x.py").write_text("model = dict(type='GFL')")
    refused(
        capsys,
        ["plan", str(plan(folder, f"[runs.a]\n{NET}data = {{ set = 'no.py:f' }}\n"))],
        "data.set not found: no.py",
    )


PAGE = (Path(__file__).parents[2] / "docs" / "plans.md").read_text(encoding="utf-8")
PRINTED = re.findall(r"^```toml\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("number", range(len(PRINTED)))
def test_a_plan_of_the_page_runs_as_printed(tmp_path: Path, monkeypatch, capsys, number: int):
    assert len(PRINTED) == 7 and len([line for line in PRINTED[number].splitlines() if line]) <= 15
    (tmp_path / "tasks.py").write_text(re.search(r'title="tasks.py"\n(.*?)```', PAGE, re.DOTALL)[1])
    (tmp_path / "printed.toml").write_text(PRINTED[number])
    monkeypatch.chdir(tmp_path)
    assert main(["plan", "printed.toml", "--dry-run"]) == 0
    told = capsys.readouterr().out
    assert not (tmp_path / "runs").exists()
    assert main(["plan", "printed.toml"]) == 0
    made = read_plan("printed.toml")
    assert told.count("\n") == len(made.runs)
    for run in made.runs:
        folder = made.folder(run.name, 0)
        assert (folder / "finished.json").is_file()
        if isinstance(run, PlannedRun) and run.ensemble is None:
            model = _task("tasks.py:net", {**run.options, "width": run.options.get("width", 4)}).model
            model.load_state_dict(torch.load(folder / "student.pth"))  # plain
