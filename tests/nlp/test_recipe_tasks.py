"""Recipe files of every task: real trainings from the command line, their evaluation, and what is refused."""

from __future__ import annotations

import json
import math
import random
import shlex
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import transformers
import yaml

from kdgraft import DistillError
from kdgraft.cli import main
from kdgraft_nlp.questions import answer_scores, best_answers, normalised
from kdgraft_nlp.run import build
from kdgraft_nlp.scores import label_scores, matthews, number_scores
from support import nlp as support

BERT = dict(model_type="bert", num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
T5 = dict(model_type="t5", d_kv=8, d_ff=16, num_layers=1, num_heads=2)
COLOURS, ANIMALS = ["red", "green", "blue"], ["cat", "dog", "bird", "fish"]


def swag(i):
    right = i % 4
    endings = [f"the {animal} sleeps" for animal in ANIMALS]
    return {
        "sent1": f"here is a {ANIMALS[right]}.",
        "sent2": "then",
        **{f"ending{k}": one for k, one in enumerate(endings)},
        "label": right,
    }


def race(i):
    return {"context": f"here is a {ANIMALS[i % 4]}", "choices": [f"a {animal}" for animal in ANIMALS], "label": i % 4}


def squad(i):
    animal = ANIMALS[i % 4]
    context = f"the house is {COLOURS[i % 3]} and old. " * 3 + f"the animal in it is a {animal}."
    return {
        "question": "which animal is it?",
        "context": context,
        "answers": {"text": [animal], "answer_start": [context.index(animal)]},
    }


def squad2(i):
    empty = {"text": [], "answer_start": []}
    return {**squad(i), **({"question": "who built it?", "answers": empty} if i % 2 else {})}


def emotions(i):
    names = [COLOURS[i % 3], ANIMALS[i % 4]][: (i // 2) % 3]
    return {"text": " ".join(["now", *names]), "label": names}


def vectors(i):
    return {"text": COLOURS[i % 3], "label": [float(i % 3 == k) for k in range(3)]}


def summary(i):
    return {"document": f"a {COLOURS[i % 3]} {ANIMALS[i % 4]} sleeps", "summary": f"{ANIMALS[i % 4]}"}


CASES = {
    "multiple_choice-swag": (
        swag,
        dict(context="sent1", question="sent2", choices=[f"ending{k}" for k in range(4)]),
        {"accuracy"},
    ),
    "multiple_choice-lists": (race, {}, {"accuracy"}),
    "question_answering-squad": (squad, dict(length=24, stride=6), {"exact_match", "f1"}),
    "question_answering-squad2": (squad2, dict(length=24, stride=6), {"exact_match", "f1"}),
    "multi_label-names": (emotions, {}, {"micro_f1", "macro_f1"}),
    "multi_label-vectors": (vectors, dict(classes=COLOURS), {"micro_f1", "macro_f1"}),
    "seq2seq": (
        summary,
        dict(source="document", target="summary", prefix="summarize: ", target_length=6),
        {"perplexity"},
    ),
}
TERMS = [dict(type="SoftTargets", temperature=2.0), dict(type="HiddenStates")]


def written(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def sized(task, width):
    return dict(T5, d_model=width) if task == "seq2seq" else dict(BERT, hidden_size=width)


def recipe(folder: Path, case: str, rows=None, **entries):
    """A recipe's entries of a case, on its own rows or others."""
    task = case.partition("-")[0]
    make, data, _ = CASES[case]
    train = written(folder / "train.jsonl", rows if rows is not None else [make(i) for i in range(24)])
    held_out = written(folder / "eval.jsonl", rows if rows is not None else [make(i) for i in range(7, 19)])
    data = {"train": train, "eval": held_out, "length": 32, **data, **entries.pop("data", {})}
    training = dict(use_cpu=True, max_steps=3, save_strategy="no", disable_tqdm=True, per_device_train_batch_size=4)
    training |= entries.pop("training", {})
    return {
        "task": task,
        "data": data,
        "tokenizer": dict(vocab_size=90),
        "student": sized(task, 16),
        "training": training,
        "output": str(folder / "out"),
        **entries,
    }


def saved(folder, config, name="recipe.yaml"):
    (folder / name).write_text(yaml.safe_dump(config))
    return str(folder / name)


def shown(capsys):
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    return {row[0]: float(row[1]) for row in rows if len(row) == 2 and not row[0].startswith("distill")}


@pytest.mark.parametrize("case", CASES)
def test_a_teacher_then_a_student_from_a_recipe_file(case, tmp_path, capsys):
    task, expected = case.partition("-")[0], CASES[case][2] | {"loss"}
    config = recipe(tmp_path, case)
    teacher = saved(
        tmp_path, {**config, "student": sized(task, 32), "output": str(tmp_path / "teacher")}, "teacher.yaml"
    )
    assert main(["train", teacher]) == 0
    path = saved(tmp_path, {**config, "teacher": str(tmp_path / "teacher"), "terms": TERMS})
    assert main(["check", path]) == 0
    said = capsys.readouterr().out
    assert "distill.soft_targets.loss" in said and "distill.hidden_states.loss" in said
    assert main(["train", path]) == 0
    capsys.readouterr()
    out = json.loads((tmp_path / "out" / "eval_results.json").read_text())
    assert main(["test", path, str(tmp_path / "out")]) == 0
    found = shown(capsys)
    assert found.keys() == expected
    assert all(value == pytest.approx(out[f"eval_{name}"], abs=5e-5) for name, value in found.items())
    assert all(0 <= found[name] <= 1 for name in expected - {"loss", "perplexity"})


@pytest.mark.parametrize(
    "case",
    ["multiple_choice-lists", "question_answering-squad2", pytest.param("multi_label-vectors", marks=pytest.mark.slow)],
)
def test_an_easy_set_is_learnt(case, tmp_path):
    training = dict(max_steps=300, learning_rate=1e-2, per_device_train_batch_size=12)
    rows = [{**race(i), "choices": ["a cat"] * (i % 4) + ["a fish"] + ["a dog"] * (3 - i % 4)} for i in range(24)]
    rows = rows if case == "multiple_choice-lists" else None
    trainer = build(recipe(tmp_path, case, rows, training=training, student=sized(case, 32)))
    trainer.train()
    found = trainer.evaluate()
    assert all(found[f"eval_{name}"] > 0.9 for name in CASES[case][2])


# --- multiple choice


def test_choices_are_pairs_of_the_context_and_the_continued_question(tmp_path):
    trainer = build(recipe(tmp_path, "multiple_choice-swag"))
    batch = trainer.data_collator([trainer.train_dataset[i] for i in (1, 2)])
    assert batch["input_ids"].shape[:2] == (2, 4) and batch["labels"].tolist() == [1, 2]
    tokenizer = trainer.processing_class
    expected = tokenizer("here is a dog.", "then the bird sleeps")
    ids, kinds = (batch[name][0, 2][batch["attention_mask"][0, 2].bool()] for name in ("input_ids", "token_type_ids"))
    assert ids.tolist() == expected["input_ids"] and kinds.tolist() == expected["token_type_ids"]


@pytest.mark.parametrize(
    ("row", "data", "said"),
    [
        ({"label": 4}, {}, r"sample 1 of column 'label' must be the number of the right choice, from 0 to 3, got 4"),
        ({"label": -1}, {}, r"from 0 to 3, got -1"),
        (
            {"choices": ["a", "b"]},
            {},
            r"sample 1 of column 'choices' must have 4 choices, as the first sample has, got 2",
        ),
        ({"choices": ["a"]}, {}, r"sample 1 of column 'choices' must have two choices or more, got 1"),
        (
            {},
            dict(choices=["context"]),
            r"data.choices must be a column of lists of texts, or the names of two or more",
        ),
        ({}, dict(choices="endings"), r"no column 'endings' but context, choices, label; name it with data.choices"),
        (
            {},
            dict(text="context"),
            r"data.text is not read for task multiple_choice, which reads context, question, choices",
        ),
    ],
)
def test_choices_that_are_refused(row, data, said, tmp_path):
    rows = [race(0), {**race(1), **row}]
    with pytest.raises(DistillError, match=said) as caught:
        build(recipe(tmp_path, "multiple_choice-lists", rows, data=data))
    assert "\n" not in str(caught.value)


# --- question answering


def test_windows_overlap_and_label_the_answer_by_its_characters(tmp_path):
    trainer = build(recipe(tmp_path, "question_answering-squad"))
    tokenizer, encoded = trainer.processing_class, trainer.train_dataset
    row = squad(0)
    contexts = tokenizer(row["context"], add_special_tokens=False)["input_ids"]
    question = tokenizer(row["question"], add_special_tokens=False)["input_ids"]
    room = 24 - 3 - len(question)
    starts = range(0, max(len(contexts) - 6, 1), room - 6)  # by hand: each window begins stride tokens before the end
    windows = [contexts[start : start + room] for start in starts]
    first = encoded[: len(windows)]
    assert [ids[2 + len(question) : -1] for ids in first["input_ids"]] == windows
    assert len(encoded) > 24 and max(map(len, encoded["input_ids"])) <= 24
    places = list(zip(first["start_positions"], first["end_positions"], strict=True))
    answered = [i for i, place in enumerate(places) if place != (0, 0)]
    assert answered and len(answered) < len(places)
    for i in answered:
        start, end = places[i]
        assert tokenizer.decode(first["input_ids"][i][start : end + 1]).strip() == "cat"
    for i in set(range(len(windows))) - set(answered):
        assert "cat" not in tokenizer.decode(windows[i])


def test_the_best_span_is_taken_over_all_windows_of_a_context(tmp_path):
    trainer = build(recipe(tmp_path, "question_answering-squad2"))
    windows, contexts, answers = trainer.compute_metrics.__closure__[1].cell_contents.evaluated
    assert [one.texts for one in answers] == [tuple(squad2(i)["answers"]["text"]) for i in range(7, 19)]
    draw = np.random.default_rng(0)
    starts, ends = draw.normal(size=(2, len(windows), 24))
    starts[:, 0] += 3  # so that some questions have no answer
    for null in (False, True):
        found = best_answers(windows, starts, ends, contexts, 5, null=null)
        for sample, context in enumerate(contexts):  # all spans, one by one
            best, none = (-math.inf, ""), math.inf
            for k, window in enumerate(windows):
                if window.sample != sample:
                    continue
                none = min(none, starts[k, 0] + ends[k, 0])
                for i, (first, _) in enumerate(window.spans):
                    for j in range(i, min(i + 5, len(window.spans))):
                        score = starts[k, window.first + i] + ends[k, window.first + j]
                        best = max(best, (score, context[first : window.spans[j][1]]))
            assert found[sample] == ("" if null and none > best[0] else best[1])
        assert ("" in found) == null


def test_squads_scores_by_hand():
    assert normalised("The  Cat, and an\tapple!") == "cat and apple"
    # Exact; two of three words said, two of two true: F1 = 4 / 5; nothing where something is true; nothing where nothing is.
    found = answer_scores(["The cat.", "old red house", "", ""], [["dog", "cat"], ["red house"], ["x"], []])
    assert found == {"exact_match": pytest.approx(2 / 4), "f1": pytest.approx((1 + 0.8 + 0 + 1) / 4)}


@pytest.mark.parametrize(
    ("row", "entries", "said"),
    [
        ({"answers": {"text": ["cat"], "answer_start": [0]}}, {}, r"sample 1 of column 'answers': 'cat' is not at character 0"),
        ({"answers": "cat"}, {}, r"sample 1 of column 'answers' must be \{text: \[...\], answer_start: \[...\]\}, got 'cat'"),
        ({"answers": {"text": ["cat"], "answer_start": []}}, {}, r"sample 1 of column 'answers' must be"),
        ({}, dict(data=dict(stride=20)), r"the question of sample 0 has \d+ tokens and leaves \d+ of data.length .* data.stride, 20"),
        ({}, dict(data=dict(stride=-1)), r"stride must be a whole number >= 0, got -1"),
        ({}, dict(data=dict(answer_length=0)), r"answer_length must be a whole number >= 1"),
        ({}, dict(training=dict(train_sampling_strategy="group_by_length")), r"sorts the windows of an evaluation"),
        ({}, dict(teacher_tokenizer=True, teacher="x"), r"tokens of two tokenizers are not paired for task question_answering"),
    ],
)  # fmt: skip
def test_questions_that_are_refused(row, entries, said, tmp_path):
    rows = [squad(0), {**squad(1), **row}]
    if isinstance(row.get("answers"), str):
        rows[0] = rows[1] = {**rows[0], **row}
        said = said.replace("sample 1", "sample 0")
    with pytest.raises(DistillError, match=said) as caught:
        build(recipe(tmp_path, "question_answering-squad", rows, **entries))
    assert "\n" not in str(caught.value)


# --- several labels


def test_labels_are_a_0_or_1_for_each_class(tmp_path):
    trainer = build(recipe(tmp_path, "multi_label-names"))
    names = [trainer.model.config.id2label[i] for i in range(7)]
    assert names == sorted(COLOURS + ANIMALS) and trainer.model.config.problem_type == "multi_label_classification"
    for i, labels in enumerate(trainer.train_dataset["labels"]):
        assert labels == [float(name in emotions(i)["label"]) for name in names]
    trainer = build(recipe(tmp_path, "multi_label-vectors"))
    assert [*trainer.model.config.id2label.values()] == COLOURS
    assert trainer.train_dataset["labels"] == [vectors(i)["label"] for i in range(24)]


def test_declared_classes_of_several_labels(tmp_path):
    kind = datasets.List(datasets.ClassLabel(names=["z", "b", "a"]))
    features = datasets.Features(text=datasets.Value("string"), label=kind)
    found = datasets.Dataset.from_dict({"text": ["one", "two"] * 2, "label": [[0, 2], [1], [], [2]]}, features=features)
    found.save_to_disk(tmp_path / "set")
    config = recipe(tmp_path, "multi_label-names", data=dict(train=str(tmp_path / "set"), eval=None))
    trainer = build(config)
    assert [*trainer.model.config.id2label.values()] == ["z", "b", "a"]
    assert trainer.train_dataset["labels"] == [[1, 0, 1], [0, 1, 0], [0, 0, 0], [0, 0, 1]]


@pytest.mark.parametrize(
    ("labels", "data", "said"),
    [
        (
            [[0, 1], [0, 2]],
            {},
            r"sample 1 of column 'label' must have a 0 or 1 for each class, or the names of classes",
        ),
        ([[0, 1], [0]], {}, r"sample 1 of column 'label' has 1 numbers, and the first sample 2"),
        ([[0, 1], [1, 0]], dict(classes=["a", "b", "c"]), r"has 2 numbers a sample, and data.classes has 3 names"),
        ([["a"], ["b"]], dict(classes=["a", "c"]), r"has the class 'b', which data.classes lacks"),
        ([["a"], ["a"]], {}, r"holds only one class, a"),
        (["a", "b"], {}, r"sample 0 of column 'label' must be a list of classes, or of a 0 or 1 for each class"),
        ([["a"], ["b"]], dict(classes=["a", "a"]), r"data.classes must have two or more names, each once"),
    ],
)
def test_several_labels_that_are_refused(labels, data, said, tmp_path):
    rows = [{"text": f"word {i}", "label": one} for i, one in enumerate(labels)]
    with pytest.raises(DistillError, match=said):
        build(recipe(tmp_path, "multi_label-names", rows, data=data))


def test_a_class_that_the_training_set_lacks(tmp_path):
    config = recipe(tmp_path, "multi_label-names")
    config["data"]["eval"] = written(tmp_path / "eval.jsonl", [{"text": "a", "label": ["cat", "black"]}])
    with pytest.raises(
        DistillError, match="sample 0 of column 'label' has the class 'black', which the training set lacks"
    ):
        build(config)


def test_scores_of_several_labels():
    # By hand: class 0 has 1 right of 2 said and 1 true, F1 2/3; class 1 none said, 1 true; class 2 occurs nowhere.
    predicted = np.array([[1, 0, 0], [1, 0, 0]], bool)
    labels = np.array([[1, 1, 0], [0, 0, 0]], bool)
    assert label_scores(predicted, labels) == {"micro_f1": pytest.approx(2 / 4), "macro_f1": pytest.approx(2 / 9)}
    metrics = pytest.importorskip("sklearn.metrics")
    draw = np.random.default_rng(0)
    for shape in ((9, 2), (40, 6)):
        predicted, labels = draw.random((2, *shape)) < 0.3
        expected = {
            f"{kind}_f1": pytest.approx(metrics.f1_score(labels, predicted, average=kind, zero_division=0))
            for kind in ("micro", "macro")
        }
        assert label_scores(predicted, labels) == expected


# --- sequence to sequence


def test_sources_have_a_prefix_and_targets_labels(tmp_path):
    trainer = build(recipe(tmp_path, "seq2seq"))
    tokenizer, sample = trainer.processing_class, trainer.train_dataset[1]
    assert sample["input_ids"] == tokenizer("summarize: a green dog sleeps")["input_ids"]
    assert sample["labels"] == tokenizer("dog")["input_ids"]
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(3)])
    start = trainer.model.config.decoder_start_token_id
    assert start == tokenizer.cls_token_id and batch["decoder_input_ids"][:, 0].tolist() == [start] * 3
    assert trainer.model.config.eos_token_id == tokenizer.sep_token_id


def test_targets_that_are_refused(tmp_path):
    with pytest.raises(DistillError, match="sample 1 of column 'summary' has no text; leave such samples out"):
        build(recipe(tmp_path, "seq2seq", [summary(0), {**summary(1), "summary": " "}]))
    long = [{**summary(0), "summary": "cat " * 60}] * 2
    bart = dict(model_type="bart", d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
                decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, max_position_embeddings=40)  # fmt: skip
    with pytest.raises(DistillError, match=r"the longest sample has 6\d tokens, and the student has \d\d positions"):
        build(recipe(tmp_path, "seq2seq", long, student=bart, data=dict(target_length=100)))


# --- GLUE


def glue(name, i):
    """A sample in the columns of a GLUE task, whose label follows from its words."""
    right, one, other = i % 2, f"a {COLOURS[i % 2]} {ANIMALS[i % 4]}", f"it is {COLOURS[i % 2]}"
    columns = {
        "cola": ("sentence",),
        "sst2": ("sentence",),
        "mrpc": ("sentence1", "sentence2"),
        "qqp": ("question1", "question2"),
        "stsb": ("sentence1", "sentence2"),
        "mnli": ("premise", "hypothesis"),
        "qnli": ("question", "sentence"),
        "rte": ("sentence1", "sentence2"),
        "wnli": ("sentence1", "sentence2"),
    }[name]
    label = i % 3 if name == "mnli" else 5 * random.Random(i).random() if name == "stsb" else right
    return {**dict(zip(columns, (one, other), strict=False)), "label": label, "idx": i}


GLUE = Path(__file__).parents[2] / "nlp" / "configs" / "glue.yaml"
REPORTED = {
    "cola": {"matthews_correlation"},
    "stsb": {"pearson", "spearman"},
    "mrpc": {"accuracy", "f1"},
    "qqp": {"accuracy", "f1"},
    **{name: {"accuracy"} for name in ("sst2", "mnli", "qnli", "rte", "wnli")},
}


def overrides(name):
    """The overrides that the recipe file itself prints for a task of GLUE."""
    lines = [
        line.removeprefix("#").split(maxsplit=1) for line in GLUE.read_text().splitlines() if line.startswith("#   ")
    ]
    (found,) = [rest[0] if rest else "" for first, *rest in lines if first == name]
    return shlex.split(found)


@pytest.mark.parametrize("name", REPORTED)
def test_glue_from_the_shipped_recipe_file(name, tmp_path):
    files = [
        f"data.{split}={written(tmp_path / f'{split}.jsonl', [glue(name, i) for i in range(start, start + 16)])}"
        for split, start in (("train", 0), ("eval", 16))
    ]
    sizes = ["student.hidden_size=16", "student.num_hidden_layers=1", "student.intermediate_size=16", "data.length=24"]
    alike = [
        *files,
        *sizes,
        *overrides(name),
        "tokenizer={vocab_size: 80}",
        "training.max_steps=3",
        "training.use_cpu=true",
    ]
    teacher, out = str(tmp_path / "teacher"), tmp_path / "out"
    alone = ["teacher=null", "recipe=null", "terms=null", "student.num_hidden_layers=2"]
    assert main(["train", str(GLUE), "--work-dir", teacher, "--cfg-options", *alike, *alone]) == 0
    assert main(["train", str(GLUE), "--work-dir", str(out), "--cfg-options", *alike, f"teacher={teacher}"]) == 0
    found = json.loads((out / "eval_results.json").read_text())
    assert {f"eval_{metric}" for metric in REPORTED[name]} <= found.keys()
    model = transformers.AutoModelForSequenceClassification.from_pretrained(out)
    assert model.config.num_labels == (1 if name == "stsb" else 3 if name == "mnli" else 2)


def test_glues_metrics():
    metrics, stats = pytest.importorskip("sklearn.metrics"), pytest.importorskip("scipy.stats")
    draw = np.random.default_rng(0)
    for classes in (2, 4):
        predicted, labels = draw.integers(0, classes, (2, 50))
        assert matthews(predicted, labels) == pytest.approx(metrics.matthews_corrcoef(labels, predicted))
    assert matthews(np.ones(5), np.array([0, 1, 1, 0, 1])) == 0
    predicted, truth = draw.integers(0, 9, (2, 60)) / 7  # with ties
    found = number_scores(predicted, truth)
    assert found["spearman"] == pytest.approx(stats.spearmanr(predicted, truth).statistic)
    assert found["pearson"] == pytest.approx(stats.pearsonr(predicted, truth).statistic)


def test_the_f1_of_two_classes_is_that_of_the_second(tmp_path):
    rows = [{"text": f"word {i}", "label": name} for i, name in enumerate(["same", "other", "same", "same"])]
    config = recipe(tmp_path, "multi_label-names", rows, task="classification", data=dict(classes=["other", "same"]))
    trainer = build(config)
    assert [*trainer.model.config.id2label.values()] == ["other", "same"]
    with torch.no_grad():
        for parameter in trainer.model.classifier.parameters():
            parameter.zero_()
        trainer.model.classifier.bias[1] = 1.0  # always "same": 3 of 4 are right, F1 = 2 * 3 / (4 + 3)
    found = trainer.evaluate()
    assert found["eval_f1"] == pytest.approx(6 / 7) and found["eval_accuracy"] == 0.75
    assert found["eval_matthews_correlation"] == 0


def test_entries_that_another_task_reads(tmp_path, capsys):
    path = saved(tmp_path, recipe(tmp_path, "multi_label-names"))
    for option, said in (
        ("data.stride=3", "data.stride is not read for task multi_label, which reads text, label, classes"),
        ("data.source=text", "data.source is not read for task multi_label"),
        ("data.choices=5", "data.choices is a column of lists of texts, or the names of two or more"),
    ):
        support.refused(capsys, ["check", path, "--cfg-options", option], said)
