"""Recipe files: what they may say, what their data may hold, and that every mistake is told in one line, all at once."""

from __future__ import annotations

import csv
import json

import datasets
import pytest
import torch

from kdgraft import DistillError
from kdgraft.cli import main
from kdgraft_nlp import DistillTrainer
from kdgraft_nlp.run import build, evaluate, train_recipe
from kdgraft_nlp.scores import number_scores
from kdgraft_nlp.settings import check_settings, load
from support import nlp as support

BERT = dict(model_type="bert", hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)


def written(folder, rows):
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return str(folder / "a.jsonl")


def recipe(folder, rows, task="classification", **entries):
    """A recipe on rows: a file's name, or samples."""
    train = rows if isinstance(rows, str) else written(folder, rows)
    training = dict(use_cpu=True, max_steps=2, save_strategy="no", disable_tqdm=True, **entries.pop("training", {}))
    data = dict(train=train, length=16, **entries.pop("data", {}))
    plain = dict(task=task, data=data, tokenizer=dict(vocab_size=60), student=BERT, training=training)
    return {**plain, "output": str(folder / "out"), **entries}


def labelled(*labels):
    return [{"text": f"word {i}", "label": label} for i, label in enumerate(labels)]


# --- labels


@pytest.mark.parametrize("labels", [(0.5, 1.25, 0.5, 3.0), (1.0, 2.0, 2.5, 4.0)])
def test_numbers_as_labels_are_no_classes(labels, tmp_path):
    with pytest.raises(DistillError, match=r"which is not a class; use task: regression"):
        build(recipe(tmp_path, labelled(*labels)))


def test_numbers_are_learnt_by_regression(tmp_path):
    rows = labelled(0.5, 1.25, 3, 4.5, 2.0, 1.0, 0.25, 4.0)
    trainer = build(recipe(tmp_path, rows, "regression", data=dict(eval=written(tmp_path, rows))))
    config = trainer.model.config
    assert (config.num_labels, config.problem_type) == (1, "regression")
    assert trainer.train_dataset["labels"] == [row["label"] for row in rows]
    trainer.train()
    found = trainer.evaluate()
    batch = trainer._prepare_inputs(next(iter(trainer.get_eval_dataloader())))
    with torch.no_grad():
        predicted = trainer.model.eval()(**{k: v for k, v in batch.items() if k != "labels"}).logits[:, 0]
    assert found["eval_mse"] == pytest.approx(((predicted - batch["labels"]) ** 2).mean().item(), rel=1e-4)
    assert found["eval_loss"] == pytest.approx(found["eval_mse"], rel=1e-4)
    correlation = torch.corrcoef(torch.stack([predicted, batch["labels"]]))[0, 1].item()
    assert found["eval_pearson"] == pytest.approx(correlation, abs=1e-3)


def test_scores_of_constants():
    predicted, truth = torch.tensor([[1.0], [1.0]]).numpy(), torch.tensor([0.0, 3.0]).numpy()
    assert number_scores(predicted, truth) == {"mse": 2.5, "pearson": 0.0, "spearman": 0.0}
    same = torch.full((7, 1), 0.1).numpy()
    assert number_scores(same, torch.arange(7.0).numpy())["pearson"] == 0


@pytest.mark.parametrize("labels", [("a", "b"), (True, False), (None, 1.0), (float("nan"), 1.0)])
def test_regression_takes_numbers_alone(labels, tmp_path):
    with pytest.raises(DistillError, match=r"task regression needs numbers, and sample \d of column 'label' has"):
        build(recipe(tmp_path, labelled(*labels), "regression"))


def test_whole_numbers_are_the_same_classes_however_they_are_stored(tmp_path):
    for labels in ((0, 1, 10, 1), (0.0, 1.0, 10.0, 1.0), ("0", "1", "10", "1")):
        trainer = build(recipe(tmp_path, labelled(*labels)))
        assert trainer.model.config.id2label == {0: "0", 1: "1", 2: "10"}
        assert trainer.train_dataset["labels"] == [0, 1, 2, 1]


def test_a_declared_class_keeps_its_name_and_its_number(tmp_path):
    features = datasets.Features(
        text=datasets.Value("string"), label=datasets.ClassLabel(names=["no", "maybe", "at last"])
    )
    for labels in ([0, 2, 0, 2], [0, 2, -1, 2]):
        texts = [f"word {i}" for i in range(4)]
        datasets.Dataset.from_dict({"text": texts, "label": labels}, features=features).save_to_disk(tmp_path / "set")
        config = recipe(tmp_path, str(tmp_path / "set"))
        if -1 in labels:
            with pytest.raises(DistillError, match=r"sample 2 of column 'label' has no label \(-1\)"):
                build(config)
        else:
            trainer = build(config)
            assert trainer.model.config.id2label == {0: "no", 1: "maybe", 2: "at last"}
            assert trainer.train_dataset["labels"] == labels


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        ((["a"], ["b"]), "must be one class, a text or a whole number"),
        (({"a": 1}, {"a": 2}), "must be one class"),
        ((None, "a"), "sample 0 of column 'label' has no label"),
        (("a", "a"), "holds only one class, a"),
    ],
)
def test_what_is_no_class_is_said(labels, said, tmp_path):
    with pytest.raises(DistillError, match=said):
        build(recipe(tmp_path, labelled(*labels)))


def test_a_csv_with_a_gap_in_its_labels(tmp_path):
    with (tmp_path / "a.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["text", "label"], ["red", 0], ["blue", 1], ["grey", ""]])
    with pytest.raises(DistillError, match="sample 2 of column 'label' has no label; leave such samples out"):
        build(recipe(tmp_path, str(tmp_path / "a.csv")))


@pytest.mark.parametrize(
    ("task", "row", "said"),
    [
        ("classification", {"text": 5, "label": "a"}, "column 'text' must hold a text per sample; sample 0 has 5"),
        ("classification", {"text": None, "label": "a"}, "column 'text' must hold a text"),
        ("causal", {"text": ["a"]}, "column 'text' must hold a text"),
        ("tokens", {"tokens": "red cat", "tags": ["O", "B"]}, "column 'tokens' must hold a list of words"),
        ("tokens", {"tokens": ["red"], "tags": "O"}, "column 'tags' must be a list of tags"),
        ("tokens", {"tokens": ["red", "cat"], "tags": ["O", 0.5]}, ""),
    ],
)
def test_what_is_no_text_is_said(task, row, said, tmp_path):
    with pytest.raises(DistillError, match=said):
        build(recipe(tmp_path, [row], task))


# --- pairs


def test_two_columns_are_pairs(tmp_path):
    rows = [{"first": "red cat", "second": f"dog {i % 2}", "label": i % 2} for i in range(6)]
    trainer = build(recipe(tmp_path, rows, data=dict(text=["first", "second"])))
    tokens = trainer.processing_class.convert_ids_to_tokens(trainer.train_dataset[1]["input_ids"])
    assert tokens == [
        "[CLS]",
        "Ġred",
        "Ġcat",
        "[SEP]",
        "Ġdog",
        "Ġ1",
        "[SEP]",
    ]  # words of both columns are in the vocabulary
    assert trainer.train_dataset[1]["token_type_ids"] == [0, 0, 0, 0, 1, 1, 1]
    trainer.train()
    with pytest.raises(DistillError, match="the student one; set student"):
        build(recipe(tmp_path, rows, data=dict(text=["first", "second"]), student=dict(BERT, type_vocab_size=1)))


@pytest.mark.parametrize(
    ("text", "task", "said"),
    [
        (
            ["a", "b"],
            "causal",
            "data.text names two columns, which only classification, multi_label, regression take; name one for task causal",
        ),
        (["a"], "classification", "data.text must name a column, or two for pairs of texts"),
        (["a", "b", "c"], "classification", "data.text must name a column, or two"),
        (["text", "missing"], "classification", "no column 'missing' but text, label; name it with data.text"),
    ],
)
def test_columns_that_are_no_pairs(text, task, said, tmp_path):
    with pytest.raises(DistillError, match=said):
        build(recipe(tmp_path, labelled("a", "b"), task, data=dict(text=text)))


# --- settings


@pytest.mark.parametrize(
    ("student", "said"),
    [
        (dict(BERT, num_hidden_layer=2), "no entry 'num_hidden_layer'; did you mean 'num_hidden_layers'"),
        (dict(model_type="gpt2", n_embd=16, hidden_siz=16), "no entry 'hidden_siz'; did you mean 'hidden_size'"),
        (dict(BERT, hidden_size="wide"), "student: .*expected int, got str"),
        (dict(BERT, hidden_size=15), "student: .*15"),
        (
            dict(model_type="t5gemma", encoder=dict(hiddn_size=3)),
            "student.encoder: a config of type .* no entry 'hiddn_size'",
        ),
        ({"model": 5, "model_type": None}, "student is a folder, or a config such as"),
    ],
)
def test_a_students_config_is_looked_into(student, said, tmp_path):
    with pytest.raises(DistillError, match=said) as caught:
        build(recipe(tmp_path, labelled("a", "b"), student=student))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("student", "taken"),
    [
        (dict(BERT, attn_implementation="eager"), lambda config: config._attn_implementation == "eager"),
        (dict(BERT, model_type="llama", rope_theta=500.0), lambda config: config.rope_parameters["rope_theta"] == 500),
    ],
)
def test_what_configs_take_besides_is_no_mistake(student, taken, tmp_path):
    settings = recipe(tmp_path, labelled("a", "b"), student=student)
    check_settings(settings)
    assert taken(build(settings).model.config)


def test_all_mistakes_are_told_at_once_before_models_and_data(tmp_path, monkeypatch):
    monkeypatch.setattr("kdgraft_nlp.run.read_data", lambda data: pytest.fail("data were read"))
    config = recipe(
        tmp_path, str(tmp_path / "nowhere.jsonl"), student=dict(BERT, num_hidden_layer=2), teacher="elsewhere"
    )
    config.update(
        recipe="tinyber",
        terms=["SoftTarget", dict(type="FeatureImitation", tap="encoder..x!"), dict(type="SoftTargets", temprature=2)],
    )
    config["training"]["learning_rat"] = 1
    config["data"]["txt"] = "a"
    with pytest.raises(DistillError, match=r"^9 mistakes: \(1\) ") as caught:
        build(config)
    for said in ("'txt'; did you mean 'text'", "no data at", "'learning_rat'; did you mean 'learning_rate'", "no teacher at elsewhere",
                 "'num_hidden_layer'; did", "'tinyber'; did you mean 'tinybert'", "'SoftTarget'; did you mean 'SoftTargets'",
                 "cannot read tap 'encoder..x!'", "no argument 'temprature'"):  # fmt: skip
        assert said in str(caught.value)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["data=5"], "data is a mapping, such as"),
        (["training=5"], "training is a mapping of TrainingArguments"),
        (["data=[unclosed"], "cannot read the option 'data=[unclosed'"),
        (["student=[a]"], "student is a folder, or a config"),
        (["terms=SoftTargets"], "terms is a list of names"),
        (["terms=[5]"], "a term is a name"),
        (["recipe={type: [1]}"], "recipe must be a name"),
        (["terms=[{type: SoftTargets, schedule: {type: Ramp, end: 3, start: a}}]"], "term SoftTargets: "),
        (["tokenizer={vocab_sise: 9}"], "takes no argument 'vocab_sise'"),
        (["tokenizer={vocab_size: many}"], "tokenizer: "),
        (["output=[1]"], "output is a folder"),
        (["chunked=often"], "chunked is true, false, or a number of tokens"),
        (["data.length=0"], "length must be a whole number >= 2"),
        (["data.length=2"], "data.length is 2, and special tokens take 2 of it"),
        (["data.length=600"], "the longest sample has 600 tokens, and the student has 512 positions; lower data.length"),
        (["student.vocab_size=8"], "entries, and the student has 8 embeddings; raise vocab_size"),
        (["training.seed=-5"], "training.seed must be >= 0"),
        (["training.learning_rate=fast"], "training.learning_rate must be float, got 'fast'"),
        (["training.learning_rate=.nan"], "training.learning_rate must be finite"),
        (["training.max_steps=0"], "training.num_train_epochs must be greater than 0"),
        (["training.max_steps=1.5"], "training.max_steps must be int, got 1.5"),
        (["training.per_device_train_batch_size=0"], "training.per_device_train_batch_size must be >= 1"),
        (["training.optim=nope"], "training: "),
        (["training.output_dir=x"], "write output: FOLDER"),
        (["training.eval_strategy=epoch"], "add data.eval"),
        (["training.metric_for_best_model=f2"], "metric_for_best_model is one of loss, accuracy, f1, macro_f1, matthews_correlation; got 'f2'"),
        (["student.num_labels=5"], "student.num_labels is set by the task and the data"),
        (["student.hidden_dropout_prob=.nan"], "student.hidden_dropout_prob must be finite"),
        (["5=x"], "a recipe has no entry"),
        (["task=[a]"], "task is a name; got ['a']"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_and_exit_code_2(options, said, tmp_path, capsys):
    import yaml

    rows = [{"text": "word " * 700 + str(i), "label": i % 2} for i in range(4)]
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(recipe(tmp_path, rows)))
    support.refused(capsys, ["check", str(path), "--cfg-options", *options], said)


@pytest.mark.parametrize("seed", ["-5", str(2**32)])
def test_seeds_that_are_none(seed, tmp_path, capsys):
    assert main(["train", "nowhere.yaml", "--seed", seed]) == 2
    assert f"--seed must be a whole number from 0 to {2**32 - 1}, got {seed}" in capsys.readouterr().err


def test_numbers_with_an_exponent_are_numbers(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("training: {learning_rate: 2e-3, weight_decay: 1E2, max_steps: 5, run_name: e3}")
    found = load(path, ["training.adam_epsilon=1e-6"])["training"]
    assert found == {
        "learning_rate": 0.002,
        "weight_decay": 100.0,
        "max_steps": 5,
        "run_name": "e3",
        "adam_epsilon": 1e-6,
    }


@pytest.mark.parametrize("option", ["training.adam_beta1=2.0", "training.lr_scheduler_kwargs=x", "training.optim=lomo"])
def test_what_the_host_finds_before_the_first_step_is_one_line_too(option, tmp_path, capsys):
    path = tmp_path / "r.json.yaml"
    path.write_text(json.dumps(recipe(tmp_path, labelled("a", "b"))))
    support.refused(capsys, ["train", str(path), "--cfg-options", option], "training: ")


def test_an_error_in_the_middle_of_a_training_is_no_mistake_of_the_recipe(tmp_path, monkeypatch):
    path = tmp_path / "r.yaml"
    path.write_text(json.dumps(recipe(tmp_path, labelled("a", "b"))))
    plain = DistillTrainer.compute_loss

    def fails(self, *args, **settings):
        if self.state.global_step == 1:
            raise ZeroDivisionError("a bug")
        return plain(self, *args, **settings)

    monkeypatch.setattr(DistillTrainer, "compute_loss", fails)
    with pytest.raises(ZeroDivisionError):
        main(["train", str(path)])


def test_hidden_states_in_the_output_are_no_predictions(tmp_path):
    rows = labelled("a", "b", "a", "b")
    student = dict(BERT, output_hidden_states=True)
    trainer = build(recipe(tmp_path, rows, student=student, data=dict(eval=written(tmp_path, rows))))
    assert 0 <= trainer.evaluate()["eval_accuracy"] <= 1


# --- another Trainer

OTHERS = """
import transformers


class Doubled(transformers.Trainer):
    factor = 1.0

    def compute_loss(self, model, *args, **settings):
        loss = super().compute_loss(model, *args, **settings)
        return self.factor * loss if model.training else loss


def doubled(factor, **parts):
    trainer = Doubled(**parts)
    trainer.factor = factor
    return trainer


def nothing(**parts):
    return None
"""


@pytest.fixture
def other(tmp_path):
    (tmp_path / "others.py").write_text(OTHERS)
    rows = labelled("a", "b") * 4
    told = recipe(tmp_path, rows, data=dict(eval=written(tmp_path, rows)))

    def with_trainer(name, **told_to_it):
        return {**told, "trainer": {"type": f"{tmp_path / 'others.py'}:{name}", **told_to_it}}

    return with_trainer


def test_another_trainer_trains_a_recipe_and_its_student_is_evaluated_plainly(other, tmp_path, capsys):
    told = other("doubled", factor=0.0)
    (tmp_path / "told.yaml").write_text(json.dumps(told))
    before = build(told).model.state_dict()
    assert main(["check", str(tmp_path / "told.yaml")]) == 0
    assert "loss" + " " * 37 + "0.00000" in capsys.readouterr().out
    trainer, _ = train_recipe({**told, "training": {**told["training"], "weight_decay": 0.0}})
    assert type(trainer).__name__ == "Doubled"
    for key, value in trainer.model.state_dict().items():
        torch.testing.assert_close(value, before[key], rtol=0, atol=0)  # nothing was learnt from no loss
    found = evaluate(tmp_path / "told.yaml", told["output"])
    assert found["loss"] == pytest.approx(0.69, abs=0.05)  # ln 2: the labels' own loss of an untrained model


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ({"trainer": {"factor": 2}}, "trainer needs type: a function, file.py:function"),
        ({"trainer": {"type": "nowhere.py:doubled"}}, "nowhere.py"),
        ({"trainer": "others.py"}, "trainer is another Trainer's function with its arguments"),
        ({"terms": ["SoftTargets"], "teacher": "large"}, "trainer teaches in its own way; leave out teacher"),
    ],
)
def test_what_another_trainer_cannot_mean_is_refused(other, entries, said):
    with pytest.raises(DistillError, match=said):
        build({**other("doubled", factor=1.0), **entries})


def test_a_trainers_function_must_be_there_and_return_one(other):
    for name, said in (
        ("redoubled", "no function 'redoubled'"),
        ("nothing", "returned a NoneType"),
        ("doubled", "factor"),
    ):
        with pytest.raises(DistillError, match=said):
            build(other(name))
