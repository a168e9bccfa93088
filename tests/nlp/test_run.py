"""Recipe files and scripts: real trainings from the command line; a user's mistake is one line and exit code 2."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoModelForSequenceClassification

from kdgraft import DistillError
from kdgraft.cli import main
from kdgraft.files import held
from kdgraft_nlp.data import read, train_tokenizer
from kdgraft_nlp.run import build, train
from kdgraft_nlp.scores import scores, spans, tag_scores
from kdgraft_nlp.settings import load
from kdgraft_nlp.trainer import DistillTrainer
from support import nlp as support
from support.forking import python

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "nlp" / "configs"
SMALL = ["student.hidden_size=16", "training.num_train_epochs=1", "data.length=12", "tokenizer.vocab_size=60"]
WORDS = ["red", "green", "blue", "one", "two", "three", "cat", "dog", "bird", "runs", "sleeps", "eats"]


@pytest.fixture
def data(tmp_path):
    """Sentences whose label is their first word's colour, with tags, as jsonl."""
    for split, count in (("train", 48), ("val", 12)):
        rows = []
        for i in range(count):
            words = [WORDS[i % 3], WORDS[3 + i % 2], WORDS[6 + i % 3], WORDS[9 + (i // 3) % 3]]
            tags = ["O", "O", "B-animal", "O"]
            rows.append(json.dumps({"text": " ".join(words), "tokens": words, "tags": tags, "label": words[0]}))
        (tmp_path / f"{split}.jsonl").write_text("\n".join(rows))
    return [f"data.train={tmp_path}/train.jsonl", f"data.eval={tmp_path}/val.jsonl"]


def teacher(recipe, data, folder, *options):
    given = [
        "train",
        str(RECIPES / recipe),
        "--work-dir",
        str(folder),
        "--cfg-options",
        *data,
        *SMALL,
        "teacher=null",
        "recipe=null",
        "terms=null",
        *options,
    ]
    assert main(given) == 0
    return str(folder)


@pytest.mark.parametrize(
    ("recipe", "terms"), [("classification.yaml", 4), ("tokens.yaml", 3), ("language_model.yaml", 1)]
)
def test_a_recipe_file_trains_a_teacher_then_a_student(recipe, terms, data, tmp_path, capsys):
    folder = teacher(recipe, data, tmp_path / "teacher", "student.hidden_size=32")
    options = [*data, *SMALL[:-1], f"teacher={folder}"]
    assert main(["check", str(RECIPES / recipe), "--cfg-options", *options]) == 0
    said = capsys.readouterr().out
    assert len([line for line in said.splitlines() if line.startswith("distill.") and ".loss" in line]) == terms
    assert ("gradient of each term over that of the model's own loss" in said) != (recipe == "language_model.yaml")
    assert (
        main(
            [
                "train",
                str(RECIPES / recipe),
                "--work-dir",
                str(tmp_path / "out"),
                "--seed",
                "3",
                "--cfg-options",
                *options,
            ]
        )
        == 0
    )
    out = tmp_path / "out"
    assert (out / "model.safetensors").is_file() and (out / "tokenizer.json").is_file()
    found = json.loads((out / "eval_results.json").read_text())
    if recipe == "classification.yaml":
        assert {"eval_accuracy", "eval_macro_f1"} <= found.keys()
        model = AutoModelForSequenceClassification.from_pretrained(out)
        assert sorted(model.config.id2label.values()) == ["blue", "green", "red"]
    elif recipe == "tokens.yaml":
        assert {"eval_accuracy", "eval_span_f1"} <= found.keys()


def test_a_masked_model_and_resume(data, tmp_path):
    sizes = "hidden_size: 16, num_hidden_layers: 2, num_attention_heads: 4, intermediate_size: 128"
    options = ["task=masked", f"student={{model_type: bert, {sizes}}}", "chunked=false"]
    folder = teacher("language_model.yaml", data, tmp_path / "teacher", *options)
    given = [
        *data,
        *SMALL[:-1],
        *options,
        f"teacher={folder}",
        "recipe=distilbert",
        "training.save_strategy=epoch",
        "training.num_train_epochs=2",
    ]
    command = [
        "train",
        str(RECIPES / "language_model.yaml"),
        "--work-dir",
        str(tmp_path / "out"),
        "--cfg-options",
        *given,
    ]
    assert main(command) == 0
    first = {p.name: p.read_bytes() for p in (tmp_path / "out").glob("model.safetensors")}
    checkpoint = min((tmp_path / "out").glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]))
    assert main([*command[:2], "--resume", str(checkpoint), *command[2:]]) == 0
    assert first == {p.name: p.read_bytes() for p in (tmp_path / "out").glob("model.safetensors")}


@pytest.mark.parametrize(("strategy", "evaluations"), [("epoch", 3), ("steps", 3), ("'no'", 1)])
def test_a_language_model_ends_with_perplexity_from_one_evaluation(
    strategy, evaluations, data, tmp_path, capsys, monkeypatch
):
    done = []
    evaluate = DistillTrainer.evaluate
    monkeypatch.setattr(DistillTrainer, "evaluate", lambda *a, **k: done.append(1) or evaluate(*a, **k))
    options = ["training.max_steps=6", "training.eval_steps=2", f"training.eval_strategy={strategy}", "chunked=false"]
    teacher("language_model.yaml", data, tmp_path / "out", "training.num_train_epochs=1", *options)
    assert len(done) == evaluations  # that at the end of the training is the last one
    found = json.loads((tmp_path / "out" / "eval_results.json").read_text())
    assert found["eval_perplexity"] == pytest.approx(math.exp(found["eval_loss"]))
    assert f"perplexity {found['eval_perplexity']:.4f}" in capsys.readouterr().out
    assert (
        main(["test", str(RECIPES / "language_model.yaml"), str(tmp_path / "out"), "--cfg-options", *data, *SMALL]) == 0
    )
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("perplexity"))
    assert float(line.split()[1]) == pytest.approx(found["eval_perplexity"], abs=1e-3)


def test_the_best_model_is_evaluated_again(data, tmp_path):
    best = [
        "training.load_best_model_at_end=true",
        "training.save_strategy=epoch",
        "training.metric_for_best_model=accuracy",
    ]
    teacher("classification.yaml", data, tmp_path / "out", *best, "training.num_train_epochs=2")
    found = json.loads((tmp_path / "out" / "eval_results.json").read_text())
    state = json.loads(
        max((tmp_path / "out").glob("checkpoint-*/trainer_state.json"), key=os.path.getmtime).read_text()
    )
    assert found["eval_accuracy"] == state["best_metric"]


def test_a_saved_student_is_evaluated(data, tmp_path, capsys):
    recipe, options = str(RECIPES / "classification.yaml"), ["--cfg-options", *data, *SMALL]
    out = teacher("classification.yaml", data, tmp_path / "out", "training.save_strategy=epoch")
    expected = json.loads((tmp_path / "out" / "eval_results.json").read_text())
    (checkpoint,) = (tmp_path / "out").glob("checkpoint-*")
    for folder in (out, str(checkpoint)):
        capsys.readouterr()
        assert main(["test", recipe, folder, *options, "teacher=nowhere"]) == 0  # no teacher has to be there
        rows = [line.split() for line in capsys.readouterr().out.splitlines()]
        found = {row[0]: float(row[1]) for row in rows if len(row) == 2}
        assert found.keys() == {"loss", "accuracy", "macro_f1", "matthews_correlation"}
        assert all(value == pytest.approx(expected[f"eval_{name}"], abs=5e-5) for name, value in found.items())
    support.refused(capsys, ["test", recipe, "nowhere", *options], "no student at nowhere")
    support.refused(capsys, ["test", "nowhere.yaml", out], "recipe file not found: nowhere.yaml")
    support.refused(
        capsys,
        ["test", recipe, out, *options, "data.eval=null"],
        "has no set to evaluate the student on; add data.eval",
    )
    support.refused(capsys, ["test", recipe, out, "--trusted", *options], "--trusted is for configs of MMDetection")


def test_toml_csv_and_a_saved_dataset(data, tmp_path):
    from datasets import load_dataset

    found = load_dataset("json", data_files=data[0].partition("=")[2], split="train")
    found.remove_columns(["tokens", "tags"]).to_csv(tmp_path / "train.csv")
    found.save_to_disk(tmp_path / "saved")
    recipe = tmp_path / "mine.toml"
    recipe.write_text(
        f"""
task = "classification"
data = {{ train = "{tmp_path}/train.csv", eval = "{tmp_path}/saved", fraction = 0.5, length = 12 }}
tokenizer = {{ vocab_size = 60 }}
student = {{ model_type = "bert", hidden_size = 16, num_hidden_layers = 1, num_attention_heads = 2, intermediate_size = 16 }}
training = {{ max_steps = 2, use_cpu = true, save_strategy = "no", disable_tqdm = true }}
output = "{tmp_path}/out"
"""
    )
    assert main(["train", str(recipe)]) == 0
    assert (tmp_path / "out" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (
            ["task=sorting"],
            (
                "task is one of classification, multi_label, regression, tokens, multiple_choice, question_answering, seq2seq, causal, masked, detection; got 'sorting'",
            ),
        ),
        (["data.train=nowhere.jsonl"], ("no data at nowhere.jsonl",)),
        (["data.text=sentence", "teacher=null", "recipe=null"], ("no column 'sentence' but", "name it with data.text")),
        (["data.txt=a"], ("data has no entry 'txt'; did you mean 'text'",)),
        (["teachr=a"], ("a recipe has no entry 'teachr'; did you mean 'teacher'",)),
        (["training.learning_rat=1"], ("training takes no argument 'learning_rat'; did you mean 'learning_rate'",)),
        (["student.model_type=brt"], ("student: ",)),
        (["student=nowhere"], ("no student at nowhere",)),
        (["tokenizer=nowhere"], ("no tokenizer at nowhere",)),
        (["tokenizer=null"], ("tokenizer is a folder, or {vocab_size: 4000}",)),
        (["teacher=nowhere"], ("no teacher at nowhere",)),
        (["teacher=null"], ("need teacher",)),
        (["recipe=null"], ("teacher is given, and nothing says what to learn",)),
        (["host_weight=-1"], ("host_weight: the host's share must be a number >= 0, got -1",)),
        (["data.fraction=2"], ("data.fraction must be in (0, 1], got 2",)),
        (["recipe=tinyber"], ("no recipe is called 'tinyber'; did you mean 'tinybert'",)),
        (["nonsense"], ("write options like training.learning_rate=0.001",)),
    ],
)
def test_one_clear_line(options, parts, data, capsys):
    support.refused(
        capsys, ["check", str(RECIPES / "classification.yaml"), "--cfg-options", *data, *SMALL, *options], *parts
    )


def test_files_that_are_no_recipes(tmp_path, capsys):
    support.refused(capsys, ["train", "nowhere.yaml"], "recipe file not found: nowhere.yaml")
    (tmp_path / "a.yaml").write_text("task: [")
    support.refused(capsys, ["train", str(tmp_path / "a.yaml")], "cannot read")
    (tmp_path / "b.yaml").write_text("just words")
    support.refused(capsys, ["train", str(tmp_path / "b.yaml")], "holds no settings")
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(DistillError, match=r"empty\.jsonl holds no samples"):
        read(str(tmp_path / "empty.jsonl"))
    (tmp_path / "broken.jsonl").write_text('{"text": "a"}\n{"text"')
    with pytest.raises(DistillError, match=r"cannot read .*broken\.jsonl: "):
        read(str(tmp_path / "broken.jsonl"))


@pytest.mark.parametrize("script", ["classification", "token_classification", "language_model"])
def test_scripts(script, data, tmp_path):
    files = [option.partition("=")[2] for option in data]
    options = [
        "--train",
        files[0],
        "--eval",
        files[1],
        "--out",
        str(tmp_path / "o"),
        "--vocabulary",
        "60",
        "--epochs",
        "1",
    ]
    done = python(str(RECIPES / f"{script}.py"), *options, host="transformers", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith(("teacher:", "plain:", "distilled:"))]
    assert len(lines) == 3, done.stdout


def test_scores_of_classes():
    # By hand: of class 0 one of two is found, F1 = 2/3; of class 1 one is right of two found, one true, F1 = 2/3; class 2 occurs in
    # the predictions alone and 3 in the labels alone, F1 = 0.
    found = scores(np.array([0, 1, 1, 2]), np.array([0, 0, 1, 3]))
    assert found == {"accuracy": 0.5, "macro_f1": pytest.approx((2 / 3 + 2 / 3) / 4)}
    metrics = pytest.importorskip("sklearn.metrics")
    draw = np.random.default_rng(0)
    for classes, count in ((2, 7), (5, 60), (40, 30)):
        predicted, labels = draw.integers(0, classes, (2, count))
        labels[0] = -100  # a class that the training set has none of
        expected = {
            "accuracy": pytest.approx(metrics.accuracy_score(labels, predicted)),
            "macro_f1": pytest.approx(metrics.f1_score(labels, predicted, average="macro", zero_division=0)),
        }
        assert scores(predicted, labels) == expected


def test_spans_and_scores_by_hand():
    assert spans(["B-a", "I-a", "O", "I-b", "B-b", "I-c"]) == {("a", 0, 2), ("b", 3, 4), ("b", 4, 5), ("c", 5, 6)}
    names = ["O", "B-a", "I-a"]
    truth = torch.tensor([[1, 2, 0, -100], [0, 1, 0, -100]]).numpy()
    predicted = torch.tensor([[1, 2, 0, 2], [1, 1, 0, 1]]).numpy()
    # Spans: 2 true; 3 found ("a" at 0-2; "a" at 0-1 and at 1-2 of the second), 2 of them right: F1 = 4 / 5.
    assert tag_scores(predicted, truth, names) == {"accuracy": 5 / 6, "span_f1": 0.8}


def test_options_override_entries(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text(yaml.safe_dump({"task": "causal", "training": {"max_steps": 1}}))
    found = load(path, ["training.max_steps=2", "training.bf16=true", "data.train=x.jsonl", "teacher=null"])
    assert found == {
        "task": "causal",
        "training": {"max_steps": 2, "bf16": True},
        "data": {"train": "x.jsonl"},
        "teacher": None,
    }


def test_tokenizer():
    tokenizer = train_tokenizer(["Red cat", "blue dog"] * 5, 40)
    ids = tokenizer("red dog")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["[CLS]", "Ġred", "Ġdog", "[SEP]"]  # Ġ begins a word
    assert tokenizer.decode(ids, skip_special_tokens=True).strip() == "red dog"


LEARN = """
import sys
from kdgraft_nlp.data import train_tokenizer
text = " ".join(a + b + c + d for a in "abcd" for b in "efgh" for c in "abcd" for d in "ij")
print(train_tokenizer([text], 90).backend_tokenizer.to_str())
"""


def test_a_tokenizer_is_learned_alike_in_every_process():
    text = " ".join(
        a + b + c + d for a in "abcd" for b in "efgh" for c in "abcd" for d in "ij"
    )  # many equally frequent merges
    learned = [train_tokenizer([text], 90) for _ in range(4)]
    known = learned[0].get_vocab()
    assert len(known) == 90 and sorted(known.values()) == list(range(90))
    assert [known[name] for name in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")] == [0, 1, 2, 3, 4]
    done = python("-c", LEARN, host="transformers")
    assert done.returncode == 0, done.stderr[-2000:]
    assert {one.backend_tokenizer.to_str() for one in learned} == {done.stdout.strip()}


def test_a_share_of_the_data_keeps_all_classes(tmp_path):
    rows = [{"text": f"word {i}", "label": "rare" if i == 0 else "common"} for i in range(20)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    student = dict(model_type="bert", hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    config = dict(
        task="classification", data=dict(train=str(tmp_path / "a.jsonl"), fraction=0.1), tokenizer=dict(vocab_size=60)
    )
    trainer = build(dict(**config, student=student, output=str(tmp_path), training=dict(use_cpu=True)))
    assert len(trainer.train_dataset) == 2
    assert trainer.model.config.num_labels == 2
    with pytest.raises(DistillError, match="training: ") as caught:
        build(
            dict(
                **config,
                student=student,
                output=str(tmp_path),
                training=dict(load_best_model_at_end=True, eval_strategy="no"),
            )
        )
    assert "\n" not in str(caught.value)


def test_nothing_to_resume(tmp_path):
    rows = [{"text": f"word {i}", "label": i % 2} for i in range(8)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"task: classification\ndata: {{train: {tmp_path}/a.jsonl}}\ntokenizer: {{vocab_size: 60}}\ntraining: {{use_cpu: true}}\n"
        "student: {model_type: bert, hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2, intermediate_size: 16}\n"
    )
    with pytest.raises(DistillError, match="nothing to resume: there is no checkpoint"):
        train(recipe, work_dir=str(tmp_path / "out"), resume="auto")
    with pytest.raises(DistillError, match="is not the folder of a checkpoint"):
        train(recipe, work_dir=str(tmp_path / "out"), resume="nowhere")


def test_one_run_at_a_time_has_an_output(data, tmp_path, capsys):
    output = tmp_path / "out"
    alone = ["teacher=null", "recipe=null", "terms=null", "training.max_steps=1"]
    given = ["train", str(RECIPES / "classification.yaml"), "--work-dir", str(output)]
    options = ["--cfg-options", *data, *SMALL, *alone]
    with held(output):
        support.refused(capsys, [*given, *options], "another run is at work in", "out", "--work-dir")
        assert not (output / "model.safetensors").exists()
    assert main([*given, "--timeout", "77", *options]) == 0
    assert torch.load(output / "training_args.bin", weights_only=False).ddp_timeout == 77
    support.refused(
        capsys, [*given, "--trusted", *options], "--trusted is for configs of MMDetection and MMSegmentation"
    )
