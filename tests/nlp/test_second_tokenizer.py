"""Recipe files whose teacher has another tokenizer: both models read the same texts, whatever is cut, and mistakes are one line."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
import yaml
from datasets import Dataset

from kdgraft import DistillError
from kdgraft.cli import main
from kdgraft_nlp.data import encode, train_tokenizer
from kdgraft_nlp.run import build
from kdgraft_nlp.second_tokenizer import cut
from kdgraft_nlp.settings import untaught
from support import nlp as support

TEXTS = ["a red cat sleeps on the mat", "the dog runs home", "two green birds eat", "blue whales swim in the deep sea"]
SMALL = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
CLASSES = {"causal": "LlamaForCausalLM", "classification": "BertForSequenceClassification"} | {
    "regression": "BertForSequenceClassification",
    "tokens": "BertForTokenClassification",
}


def teacher(folder, task, pairs=False, **settings):
    """A small teacher and its tokenizer of 80 entries, where the students' have 60."""
    tokenizer = train_tokenizer(TEXTS, vocab_size=80, pairs=pairs)
    kind = getattr(transformers, CLASSES[task])
    torch.manual_seed(1)
    settings = {"num_labels": 1 if task == "regression" else 2, **settings} if task != "causal" else settings
    sizes = {**SMALL, "hidden_size": 32, "vocab_size": len(tokenizer), "pad_token_id": 0, **settings}
    kind(kind.config_class(**sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def recipe(folder, task="causal", rows=None, **entries):
    """A recipe on texts that differ in length, with a teacher of its own tokenizer."""
    if rows is None:
        rows = [{"text": f"{text} {TEXTS[i % 3]}", "label": ["a", "b"][i % 2]} for i, text in enumerate(TEXTS * 4)]
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    training = dict(use_cpu=True, max_steps=2, save_strategy="no", disable_tqdm=True, per_device_train_batch_size=4)
    data = dict(train=str(folder / "a.jsonl"), eval=str(folder / "a.jsonl"), length=12, **entries.pop("data", {}))
    student = dict(SMALL, model_type="llama" if task == "causal" else "bert")
    found = dict(task=task, data=data, tokenizer=dict(vocab_size=60), student=student, output=str(folder / "out"))
    found["training"] = {**training, **entries.pop("training", {})}
    if "teacher" not in entries:
        entries["teacher"] = teacher(folder / "teacher", task)
    return {**found, "teacher_tokenizer": True, **entries}


def decoded(tokenizer, rows):
    return [tokenizer.decode(row, skip_special_tokens=True).strip() for row in rows]


@pytest.mark.parametrize(("name", "parameters"), [("uld", 0), ("gold", 0), ("dskd", 3)])
def test_a_language_model_learns_from_one_with_another_tokenizer(name, parameters, tmp_path, capsys):
    path = tmp_path / "r.yaml"
    config = recipe(tmp_path, recipe=name)
    path.write_text(yaml.safe_dump(config))
    assert main(["check", str(path)]) == 0
    assert "distill." in capsys.readouterr().out
    assert main(["train", str(path)]) == 0
    assert "perplexity" in (trained := capsys.readouterr().out)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.get_input_embeddings().num_embeddings == 60
    assert not any("distill" in key for key in model.state_dict())
    # The plain student is evaluated on the texts as it was trained on them.
    assert main(["test", str(path), str(tmp_path / "out")]) == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("perplexity"))
    assert f"perplexity {line.split()[1]}" in trained
    trainer = build(config)
    terms = [name for name, _ in trainer.model.named_parameters() if name.startswith("distiller.") and "weight" in name]
    assert len(terms) == parameters


def test_both_models_read_the_same_text(tmp_path):
    trainer = build(recipe(tmp_path, recipe="gold"))
    ours, theirs = trainer.processing_class, trainer.data_collator.teacher_tokenizer
    assert (len(ours), len(theirs)) == (60, 80)
    assert trainer.train_dataset.column_names == ["input_ids", "attention_mask", "text"]
    assert max(map(len, trainer.train_dataset["input_ids"])) == 12  # some texts are longer
    plain = build({**untaught(recipe(tmp_path)), "tokenizer": dict(vocab_size=60)})
    assert plain.train_dataset["input_ids"] == trainer.train_dataset["input_ids"]
    for batch in trainer.get_train_dataloader():
        assert batch["input_ids"].tolist() != batch["teacher_inputs"]["input_ids"].tolist()
        assert decoded(ours, batch["input_ids"]) == decoded(theirs, batch["teacher_inputs"]["input_ids"])
        assert (batch["token_pairs"] >= 0).any()


@pytest.mark.parametrize("task", ["classification", "regression", "tokens"])
def test_classes_numbers_and_tags(task, tmp_path):
    if task == "tokens":
        rows = [{"tokens": text.split(), "tags": ["O", "B-x", *["O"] * (len(text.split()) - 2)]} for text in TEXTS * 4]
        config = recipe(tmp_path, task, rows, terms=["SoftTargets"])
        columns, told = (
            ["words"],
            dict(is_split_into_words=True, truncation=True, max_length=12),
        )  # a word read in part is kept
    else:
        rows = [{"first": text, "second": TEXTS[i % 3], "label": i % 2} for i, text in enumerate(TEXTS * 4)]
        given = teacher(tmp_path / "pairs", task, pairs=True)
        terms = ["SoftTargets"] if task == "classification" else ["BoundedRegression"]
        config = recipe(tmp_path, task, rows, data=dict(text=["first", "second"]), teacher=given, terms=terms)
        columns, told = ["text", "second_text"], {}
    trainer = build(config)
    kept = trainer.train_dataset
    assert set(columns) < set(kept.column_names)
    again = trainer.processing_class(*(list(kept[name]) for name in columns), **told)
    assert again["input_ids"] == kept["input_ids"]  # each text is cut to what the student reads
    assert any(len(row) == 12 for row in kept["input_ids"])
    read = [row[name] for row in rows for name in (["tokens"] if task == "tokens" else ["first", "second"])]
    assert [value for row in kept for value in (row[name] for name in columns)] != read
    trainer.train()
    assert "teacher_inputs" in next(iter(trainer.get_train_dataloader()))


def test_resumed_equals_uninterrupted(tmp_path):
    config = recipe(tmp_path, recipe="dskd", training=dict(save_strategy="steps", save_steps=1, max_steps=3))
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(config))
    assert main(["train", str(path)]) == 0
    saved = tmp_path / "out" / "model.safetensors"
    whole = saved.read_bytes()
    assert main(["train", str(path), "--resume", str(tmp_path / "out" / "checkpoint-1")]) == 0
    assert saved.read_bytes() == whole


def test_a_plan_trains_the_student_with_and_without_its_teacher(tmp_path):
    config = recipe(tmp_path, teacher="nowhere")
    for name, entries in (("large", dict(tokenizer=dict(vocab_size=80))), ("small", {})):
        found = {**config, **entries, "output": str(tmp_path / name)}
        found |= {"teacher_tokenizer": None} if name == "large" else {}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(found))
    path = tmp_path / "plan.toml"
    runs = {"teacher": 'config = "large.yaml"', "alone": 'config = "small.yaml"'}
    runs["student"] = 'config = "small.yaml"\nteacher = "teacher"\nrecipe = "uld"'
    path.write_text(
        "\n".join([f'out = "{tmp_path / "out"}"', *(f"[runs.{name}]\n{text}" for name, text in runs.items())])
    )
    assert main(["plan", str(path)]) == 0
    records = {name: json.loads((tmp_path / f"out/{name}/seed0/finished.json").read_text()) for name in runs}
    assert all(record["model"]["metrics"]["perplexity"] > 1 for record in records.values())
    saved = [transformers.AutoTokenizer.from_pretrained(tmp_path / f"out/{name}/seed0") for name in runs]
    assert [len(tokenizer) for tokenizer in saved] == [80, 60, 60]


def test_the_same_tokenizer_twice_and_one_from_a_folder(tmp_path):
    folder = teacher(tmp_path / "teacher", "causal")
    trainer = build(recipe(tmp_path, teacher=folder, tokenizer=folder, recipe="gkd"))
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch["input_ids"].tolist() == batch["teacher_inputs"]["input_ids"].tolist()
    transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "apart")
    (tmp_path / "teacher" / "tokenizer_config.json").unlink()
    config = recipe(tmp_path, teacher=folder, recipe="uld", teacher_tokenizer=str(tmp_path / "apart"))
    assert len(build(config).data_collator.teacher_tokenizer) == 80
    with pytest.raises(DistillError, match="no teacher_tokenizer at"):
        build({**config, "teacher_tokenizer": True})


def test_texts_on_their_own(tmp_path):
    tokenizer = train_tokenizer(TEXTS, vocab_size=60)
    rows = Dataset.from_dict({"text": [*TEXTS, ""]})
    found = encode("causal", rows, tokenizer, ("text", None), None, 10, joined=False)
    assert list(found["input_ids"]) == [
        tokenizer(text, truncation=True, max_length=10)["input_ids"] for text in rows["text"]
    ]
    letters = support.by_letter()
    found = encode("causal", Dataset.from_dict({"text": ["ab", "a", "", "abc"]}), letters, ("text", None), None, 10, joined=False, kept=True)  # fmt: skip
    assert found.to_dict() == {  # a text of one token has no next one
        "input_ids": [[1, 2], [1, 2, 3]],
        "attention_mask": [[1, 1], [1, 1, 1]],
        "text": ["ab", "abc"],
    }
    with pytest.raises(DistillError, match="no text of the set has two tokens"):
        encode("causal", Dataset.from_dict({"text": ["a"]}), letters, ("text", None), None, 10, joined=False)
    letters.pad_token = None
    with pytest.raises(
        DistillError, match="the student's tokenizer has no padding token; set its pad_token or eos_token"
    ):
        encode("causal", rows, letters, ("text", None), None, 10, joined=False)


def test_texts_are_cut_after_the_last_token_by_hand():
    words, letters = support.by_word(), support.by_letter()
    # [CLS] the cat [SEP] are four tokens; letters have no special ones.
    assert cut([["the  cat sat", "a dog "]], words, 4, words=False) == [["the  cat", "a dog "]]
    assert cut([["the cat", "a"]], letters, 5, words=False) == [["the c", "a"]]
    assert cut([[["the", "cat", "sat"], ["a"]]], words, 4, words=True) == [[["the", "cat"], ["a"]]]
    assert cut([[["the", "cat"]]], letters, 4, words=True) == [[["the", "cat"]]]  # the first letter of "cat" is read
    # Pairs lose their ends in turn, the longer one first: [CLS] the cat [SEP] a [SEP].
    assert cut([["the cat sat on"], ["a"]], words, 6, words=False) == [["the cat"], ["a"]]
    words.truncation_side = "left"
    assert cut([["a dog"]], words, 4, words=False) == [["a dog"]]
    with pytest.raises(DistillError, match="cuts texts at their beginning; save it with truncation_side='right'"):
        cut([["the cat sat"]], words, 4, words=False)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["teacher=null", "recipe=null"], "teacher_tokenizer needs teacher: the folder of one model"),
        (["teacher={type: Itself}"], "teacher_tokenizer needs teacher: the folder of one model"),
        (["teacher=null", "teachers={a: here, b: there}"], "teacher_tokenizer needs teacher: the folder of one model"),
        (["teacher_tokenizer=nowhere"], "no teacher_tokenizer at nowhere: there is no tokenizer_config.json"),
        (["teacher_tokenizer=5"], "teacher_tokenizer is true (the one in the teacher's folder), or a folder; got 5"),
        (["task=masked", "student.model_type=bert"], "the same random mask cannot be drawn for two tokenizers"),
        (["data.joined=true"], "the tokens of two tokenizers are paired text by text, not in blocks"),
        (["data.joined=maybe"], "data.joined is true or false; got 'maybe'"),
        (["task=classification", "student.model_type=bert", "data.joined=false"], "data.joined is for language models"),
        (["data.text=[a, b]"], "data.text names two columns"),
        (["init_from=[0]"], "init_from copies the teacher's embeddings"),
        (["recipe=gkd"], "different tokenizers, and their tokens cannot be compared one by one; use UniversalLogits"),
        (["tokenizer=null"], "tokenizer is a folder, or {vocab_size: 4000}"),
    ],
)
def test_what_cannot_be_meant_is_one_line(options, said, tmp_path, capsys):
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(recipe(tmp_path, recipe="uld")))
    support.refused(capsys, ["check", str(path), "--cfg-options", *options], said)


def test_a_teacher_that_cannot_read_a_text_is_one_line(tmp_path):
    rows = [{"text": " ".join(TEXTS), "label": i} for i in (0, 1)]
    few = teacher(tmp_path / "few", "classification", max_position_embeddings=8)
    with pytest.raises(DistillError, match=r"has \d+ tokens, and the teacher has 8 positions; lower data.length"):
        build(recipe(tmp_path, "classification", rows, teacher=few, terms=["SoftTargets"]))
    small = teacher(tmp_path / "small", "classification", vocab_size=70)
    with pytest.raises(DistillError, match="the tokenizer has 80 entries, and the teacher has 70 embeddings"):
        build(recipe(tmp_path, "classification", rows, teacher=small, terms=["SoftTargets"]))
