"""Plans of recipe files: teacher, assistant and student; nothing finished is repeated, and what was killed goes on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForSequenceClassification

from kdgraft.cli import main
from kdgraft_bench.plans import SCHEMES, measure
from kdgraft_bench.results import read_results
from kdgraft_nlp import DistillTrainer
from kdgraft_nlp.run import train_recipe
from support import nlp as support
from support.forking import python

PLAN = """
[runs.student]
config = "small.yaml"
teacher = "assistant"
terms = [{ type = "SoftTargets", temperature = 2 }, "HiddenStates"]

[runs.assistant]
config = "middle.yaml"
teacher = "teacher"
recipe = "pkd"

[runs.teacher]
config = "large.yaml"
"""
KILLED = """
import os, sys
from kdgraft.cli import main
from kdgraft_bench.plans import SCHEMES, measure
from kdgraft_bench.results import read_results
from kdgraft_nlp import DistillTrainer

plain, done = DistillTrainer.training_step, []

def step(self, *args, **settings):
    done.append(1)
    if len(done) == int(sys.argv[2]):
        os._exit(9)
    return plain(self, *args, **settings)

DistillTrainer.training_step = step
main(["plan", sys.argv[1]])
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return recipes(tmp_path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """Where a plan has run without a stop."""
    folder = recipes(tmp_path_factory.mktemp("whole"))
    assert main(["plan", str(plan(folder))]) == 0
    return folder


def recipes(tmp_path: Path) -> Path:
    """Three recipes of one size each, 5 steps of 3 an epoch, with a checkpoint every 2; dropout is on."""
    rows = [{"text": f"word {i % 5} and {i * i % 7}", "label": "abc"[i % 3]} for i in range(12)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for name, width, layers in (("large", 32, 4), ("middle", 32, 3), ("small", 16, 2)):
        recipe = dict(
            task="classification",
            data=dict(train=str(tmp_path / "a.jsonl"), eval=str(tmp_path / "a.jsonl"), length=16),
            tokenizer=dict(vocab_size=60),
            student=dict(
                model_type="bert",
                hidden_size=width,
                num_hidden_layers=layers,
                num_attention_heads=4,
                intermediate_size=32,
            ),
            training=dict(
                use_cpu=True,
                max_steps=5,
                per_device_train_batch_size=4,
                learning_rate=0.01,
                save_strategy="steps",
                save_steps=2,
                disable_tqdm=True,
            ),
        )
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
    return tmp_path


@pytest.fixture
def steps(monkeypatch) -> list:
    """Grows by the folder of the run with every training step."""
    plain, done = DistillTrainer.training_step, []

    def step(self, *args, **settings):
        done.append(Path(self.args.output_dir).parent.name)
        return plain(self, *args, **settings)

    monkeypatch.setattr(DistillTrainer, "training_step", step)
    return done


def plan(folder: Path, text: str = PLAN, out: str = "out") -> Path:
    path = folder / f"{out}.toml"
    path.write_text(f'out = "{folder / out}"\n{text}')
    return path


def told(capsys, path: Path) -> list[str]:
    """The lines on the runs that carrying out a plan says."""
    capsys.readouterr()
    assert main(["plan", str(path)]) == 0
    return [line for line in capsys.readouterr().out.splitlines() if " (seed " in line]


def student(folder: Path, run: str, out: str = "out", seed: int = 0):
    return AutoModelForSequenceClassification.from_pretrained(folder / out / run / f"seed{seed}").state_dict()


def same(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_teacher_assistant_student(folder: Path, capsys, steps):
    path = plan(folder)
    lines = told(capsys, path)
    assert [line.split(" ")[0] for line in lines] == [
        name for name in ("teacher", "assistant", "student") for _ in range(2)
    ]
    assert "trains after teacher" in lines[2] and "trains after assistant" in lines[4]
    assert all("accuracy" in line for line in lines[1::2])
    assert steps == ["teacher"] * 5 + ["assistant"] * 5 + ["student"] * 5
    made = {name: student(folder, name) for name in ("teacher", "assistant", "student")}
    assert [made[name]["classifier.weight"].shape[1] for name in made] == [32, 32, 16]
    # By hand: the student's recipe with the assistant's folder as its teacher.
    recipe = yaml.safe_load((folder / "small.yaml").read_text())
    recipe |= dict(
        teacher=str(folder / "out/assistant/seed0"),
        terms=[dict(type="SoftTargets", temperature=2), "HiddenStates"],
        output=str(folder / "by_hand"),
    )
    recipe["training"]["seed"] = 0
    _, metrics = train_recipe(recipe)
    same(AutoModelForSequenceClassification.from_pretrained(folder / "by_hand").state_dict(), made["student"])
    record = json.loads((folder / "out/student/seed0/finished.json").read_text())
    assert record["model"]["metrics"] == metrics
    # Another teacher would have made another student.
    recipe |= dict(teacher=str(folder / "out/teacher/seed0"), output=str(folder / "other"))
    train_recipe(recipe)
    other = AutoModelForSequenceClassification.from_pretrained(folder / "other").state_dict()
    assert not torch.equal(other["classifier.weight"], made["student"]["classifier.weight"])
    # The same student, by a plan that is given the assistant's folder.
    given = PLAN[PLAN.index("[runs.student]") :].split("[runs.", 2)[1]
    folder_of = folder / "out/assistant/seed0"
    text = f'[runs.assistant]\nconfig = "middle.yaml"\ncheckpoint = "{folder_of}"\n\n[runs.{given}'
    lines = told(capsys, plan(folder, text, "given"))
    assert lines[0].startswith(f"assistant (seed 0, nlp): takes {folder_of}")
    same(student(folder, "student", "given"), made["student"])
    # Again: nothing is repeated.
    steps.clear()
    lines = told(capsys, path)
    assert len(lines) == 3 and all("finished" in line for line in lines) and not steps
    # The record of one run is lost: it goes on from its last checkpoint, to the same weights; the others stay.
    (folder / "out/assistant/seed0/finished.json").unlink()
    lines = told(capsys, path)
    assert [line.split(": ")[1].split(" ")[0].rstrip(",") for line in lines] == ["finished", "goes", "done", "finished"]
    for name, state in made.items():
        same(student(folder, name), state)
    assert not steps  # the last checkpoint is of the last step


@pytest.mark.parametrize("at", [8, *(pytest.param(at, marks=pytest.mark.slow) for at in (2, 15))])
def test_a_plan_that_was_killed_goes_on_to_the_same_weights(folder: Path, whole: Path, capsys, steps, at: int):
    path = plan(folder)
    # Here and there one thread: sums depend on their number.
    killed = python("-c", KILLED, str(path), str(at), host="transformers")
    assert killed.returncode == 9, killed.stderr[-2000:]
    assert not (folder / "out/student/seed0/finished.json").exists()
    steps.clear()
    lines = told(capsys, path)
    assert sum("goes on" in line for line in lines) == 1
    assert len(steps) == 15 - at + 1 + (at - 1) % 5 % 2  # from the last checkpoint on
    for name in ("teacher", "assistant", "student"):
        same(student(folder, name), student(whole, name))
        records = [json.loads((one / "out" / name / "seed0/finished.json").read_text()) for one in (folder, whole)]
        assert records[0]["model"]["metrics"] == records[1]["model"]["metrics"]


def test_a_checkpoint_that_is_half_written_is_passed_over(folder: Path, capsys, steps):
    path = plan(folder, '[runs.teacher]\nconfig = "large.yaml"\n')
    told(capsys, path)
    whole, run = student(folder, "teacher"), folder / "out/teacher/seed0"
    for checkpoints, expected in (
        (("checkpoint-5", "checkpoint-4"), 3),
        (("checkpoint-5", "checkpoint-4", "checkpoint-2"), 5),
    ):
        for name in checkpoints:
            (run / name / "optimizer.pt").unlink(missing_ok=True)
        (run / "finished.json").unlink()
        steps.clear()
        assert "goes on" in told(capsys, path)[0]
        assert len(steps) == expected
        same(student(folder, "teacher"), whole)


def test_seeds_starts_options_and_several_teachers(folder: Path, capsys):
    text = """
seeds = [1, 2]
[runs.a]
config = "large.yaml"
[runs.b]
config = "middle.yaml"
options = { "training.max_steps" = 2 }
[runs.student]
config = "small.yaml"
teachers = { a = "a", b = "b", both = { type = "Ensemble", members = ["a", "b"] } }
terms = [{ type = "SoftTargets", source = "both" }]
[runs.again]
config = "small.yaml"
start = "student"
teacher = { type = "Itself", momentum = 0.5 }
terms = ["SoftTargets"]
"""
    told(capsys, plan(folder, text))
    first, second = (student(folder, "student", seed=seed) for seed in (1, 2))
    assert not torch.equal(first["classifier.weight"], second["classifier.weight"])
    assert not (folder / "out/b/seed1/checkpoint-4").exists() and (folder / "out/a/seed1/checkpoint-4").exists()
    recipe = yaml.safe_load((folder / "small.yaml").read_text())
    recipe["training"]["seed"] = 2
    teachers = {name: str(folder / "out" / name / "seed2") for name in "ab"}
    both = dict(type="Ensemble", members=["a", "b"])
    recipe |= dict(teachers={**teachers, "both": both}, terms=[dict(type="SoftTargets", source="both")])
    train_recipe({**recipe, "output": str(folder / "by_hand")})
    same(AutoModelForSequenceClassification.from_pretrained(folder / "by_hand").state_dict(), second)
    # The last run begins where the student's ended.
    recipe |= dict(teachers=None, teacher=dict(type="Itself", momentum=0.5), terms=["SoftTargets"])
    train_recipe({**recipe, "student": str(folder / "out/student/seed2"), "output": str(folder / "from")})
    again = AutoModelForSequenceClassification.from_pretrained(folder / "from").state_dict()
    same(again, student(folder, "again", seed=2))


def test_a_plan_says_who_teaches(folder: Path, capsys):
    """The teachers and terms of the recipe itself do not count; a teacher may be a folder that is there already."""
    told(capsys, plan(folder, '[runs.teacher]\nconfig = "large.yaml"\n'))
    known = folder / "out/teacher/seed0"
    recipe = yaml.safe_load((folder / "small.yaml").read_text())
    recipe |= dict(teachers={"a": "nowhere"}, terms=[dict(type="SoftTargets", source="a")], host_weight=0.5)
    (folder / "own.yaml").write_text(yaml.safe_dump(recipe))
    text = f"""
[runs.alone]
config = "own.yaml"
[runs.plain]
config = "small.yaml"
[runs.taught]
config = "own.yaml"
teacher = {{ checkpoint = "{known}" }}
terms = ["SoftTargets"]
"""
    told(capsys, plan(folder, text, out="two"))
    same(student(folder, "alone", "two"), student(folder, "plain", "two"))
    recipe |= dict(teachers=None, teacher=str(known), terms=["SoftTargets"], output=str(folder / "by_hand"))
    recipe["training"]["seed"] = 0
    train_recipe(recipe)
    same(
        AutoModelForSequenceClassification.from_pretrained(folder / "by_hand").state_dict(),
        student(folder, "taught", "two"),
    )


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ("teacher = { folder = 'x' }\nterms = ['SoftTargets']", "a teacher takes no argument 'folder'; known: "),
        (
            "teacher = { checkpoint = 3 }\nterms = ['SoftTargets']",
            "a teacher needs checkpoint: the folder that save_pret",
        ),
        ("teacher = { checkpoint = 'nowhere' }\nterms = ['SoftTargets']", "no teacher at nowhere"),
        (
            "teacher = { type = 'Ensemble', members = ['a'] }\nterms = ['SoftTargets']",
            "these runs wait for each other: a → a",
        ),
        ("options = { 'training.max_step' = 3 }", "training takes no argument 'max_step'; did you mean 'max_steps'"),
        ("options = { tusk = 'x' }", "a recipe has no entry 'tusk'; did you mean 'task'"),
    ],
)
def test_a_plan_that_is_wrong_is_one_line(folder: Path, capsys, entries: str, said: str):
    path = plan(folder, f'[runs.a]\nconfig = "small.yaml"\n{entries}\n')
    support.refused(capsys, ["plan", str(path)], said)


def by_hand(folder: Path, name: str, taught_by: str | None, **entries) -> dict[str, torch.Tensor]:
    """The student that a recipe trains from the folder of a plan's teacher."""
    found = yaml.safe_load((folder / "small.yaml").read_text())
    teacher = dict(teacher=str(folder / taught_by)) if taught_by else {}
    found |= dict(terms=["SoftTargets"], output=str(folder / name)) | teacher | entries
    found["training"]["seed"] = 0
    train_recipe(found)
    return AutoModelForSequenceClassification.from_pretrained(folder / name).state_dict()


TAKD = """
[runs.teacher]
config = "large.yaml"
[runs.assistant]
config = "middle.yaml"
teacher = "teacher"
terms = ["SoftTargets"]
each = { "student.hidden_size" = [24, 16] }
[runs.student]
config = "small.yaml"
teacher = "assistant"
terms = ["SoftTargets"]
choose = "-loss"
"""


def test_the_assistant_of_the_best_student_is_chosen(folder: Path, capsys, steps):
    path = plan(folder, TAKD)
    lines = told(capsys, path)
    names = ["teacher", "assistant-24", "assistant-16", "student-24", "student-16"]
    assert steps == [name for name in names for _ in range(5)]
    chosen = json.loads((folder / "out/student/seed0/finished.json").read_text())
    assert set(chosen["values"]) == {"student-24", "student-16"}
    assert chosen["chosen"] == min(chosen["values"], key=chosen["values"].get)
    assert f"{chosen['chosen']} is chosen" in lines[-1]
    assert student(folder, "assistant-24")["classifier.weight"].shape[1] == 24
    same(by_hand(folder, "by_hand", "out/assistant-16/seed0"), student(folder, "student-16"))
    steps.clear()
    assert all("finished" in line for line in told(capsys, path)) and not steps


BORN_AGAIN = """
[runs.teacher]
config = "small.yaml"
stop = 2
[runs.ban]
config = "small.yaml"
teacher = "teacher"
terms = ["SoftTargets"]
generations = 2
[runs.student]
config = "small.yaml"
teacher = ["ban-*"]
terms = ["SoftTargets"]
"""


def test_generations_and_their_ensemble(folder: Path, capsys, steps):
    told(capsys, plan(folder, BORN_AGAIN))
    assert steps == ["teacher"] * 2 + [name for name in ("ban-1", "ban-2", "student") for _ in range(5)]
    # The teacher that was stopped early is the checkpoint of that step of the whole training.
    by_hand(folder, "whole", None, terms=None)
    early = AutoModelForSequenceClassification.from_pretrained(folder / "whole/checkpoint-2").state_dict()
    same(early, student(folder, "teacher"))
    same(by_hand(folder, "second", "out/ban-1/seed0"), student(folder, "ban-2"))
    both = {f"teacher_{i}": str(folder / f"out/ban-{i + 1}/seed0") for i in range(2)}
    both["teacher"] = dict(type="Ensemble", members=["teacher_0", "teacher_1"])
    same(by_hand(folder, "both", None, teachers=both), student(folder, "student"))
    text = BORN_AGAIN + '[runs.together]\nconfig = "small.yaml"\nensemble = ["ban-*"]\n'
    support.refused(
        capsys, ["plan", str(plan(folder, text))], "together: ensemble means nothing in the host nlp: a recipe"
    )
    support.refused(
        capsys,
        ["plan", str(plan(folder, "[runs.a]\nconfig = 'small.yaml'\nstop = 6\n", "b"))],
        "stop must be at most training.max_steps=5, got 6",
    )


@pytest.mark.parametrize("labelled", [False, True])
def test_unlabelled_texts_teach_by_the_predictions_alone(folder: Path, capsys, labelled: bool):
    texts = [f"other {i % 4} or {i * i % 5}" for i in range(16)]
    wrong = [{"text": text, "label": "cab"[i % 3]} for i, text in enumerate(texts)]
    (folder / "wrong.jsonl").write_text("\n".join(map(json.dumps, wrong)))
    rows = wrong if labelled else [{"text": text} for text in texts]
    (folder / "texts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    text = """
[runs.teacher]
config = "large.yaml"
[runs.student]
config = "small.yaml"
teacher = "teacher"
terms = ["SoftTargets"]
data = { set = "texts.jsonl", share = 0.5, labels = false }
"""
    told(capsys, plan(folder, text))
    data = dict(train=str(folder / "wrong.jsonl"), eval=str(folder / "a.jsonl"), length=16, fraction=0.5)
    same(by_hand(folder, "by_hand", "out/teacher/seed0", data=data, host_weight=0), student(folder, "student"))


def test_unlabelled_texts_need_labels_to_evaluate_on(folder: Path, capsys):
    recipe = yaml.safe_load((folder / "small.yaml").read_text())
    recipe["data"].pop("eval")
    (folder / "blind.yaml").write_text(yaml.safe_dump(recipe))
    text = '[runs.teacher]\nconfig = "large.yaml"\n[runs.a]\nconfig = "blind.yaml"\nteacher = "teacher"\nterms = ["SoftTargets"]\n'
    path = plan(folder, text + "data = { labels = false }\n")
    support.refused(
        capsys, ["plan", str(path)], "data.labels is false, so that data.eval must name the classes; add it"
    )


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_plan_that_ships_says_what_it_will_do(tmp_path, monkeypatch, capsys, scheme: str):
    monkeypatch.chdir(tmp_path)
    assert measure(scheme, "nlp", dry_run=True) == []
    said = [line for line in capsys.readouterr().out.splitlines() if " (seed 0" in line]
    assert len(said) == dict(takd=10, born_again=5)[scheme] and not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_plan_that_ships_is_measured(tmp_path, monkeypatch, capsys, scheme: str):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("kdgraft_bench.hosts.nlp_setup.DATA", dict(train=140, val=70, test=70))
    found = measure(scheme, "nlp", iterations=2)
    runs = dict(takd=10, born_again=5)[scheme]
    assert len(found) == 2 * runs and read_results(f"runs/plans/{scheme}_nlp/results.csv") == found
    assert all(0 <= result.value <= 1 for result in found)
    table = capsys.readouterr().out.partition(f"{scheme} in nlp: ")[2]
    assert [line.split()[0] for line in table.splitlines()[1:] if line] == ["run", *(r.model for r in found[::2])]
