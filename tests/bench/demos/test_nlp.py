"""The demo runs end to end: tiny, but with the real Trainer, recipes, pictures and files; on docstrings and on a set of one's own."""

from __future__ import annotations

import csv
import json
from dataclasses import replace

import pytest
from PIL import Image
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import support.nlp  # noqa: F401  quiet, one thread
from kdgraft.cli import main
from kdgraft.errors import DistillError
from kdgraft_bench.comparison import Training, run
from kdgraft_bench.demos import nlp as demo


def shrink(patch):
    """Models and data as small as can be."""
    patch.setattr(demo, "DATA", dict(train=140, val=14, test=28))
    for name, models in (("SENTENCES", demo.bert), ("TAGS", demo.bert), ("LANGUAGE", demo.llama)):
        whole = getattr(demo, name)
        sizes = dict(
            teacher=models(32, 2), student=models(16, 1), vocabulary=300, batch_size=4, evaluations=2, rounds=2
        )
        patch.setattr(demo, name, replace(whole, told=dict(whole.told, length=16), **sizes))
    sizes |= dict(vocabulary=80, student_vocabulary=50)
    patch.setattr(demo, "TOKENIZERS", replace(demo.TOKENIZERS, told=dict(length=16, joined=False), **sizes))


@pytest.fixture
def small(monkeypatch):
    shrink(monkeypatch)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        shrink(patch)
        return out, demo.main(recipes="tinybert,gkd", out=out, iterations=4)


def rows(folder):
    with (folder / "results.csv").open() as file:
        return list(csv.DictReader(file))


def test_demo_writes_every_figure_it_prints(finished):
    out, results = finished
    found, language = rows(out), rows(out / "language_model")
    assert list(found[0]) == ["task", "dataset", "model", "method", "seed", "metric", "value"]
    assert {row["method"] for row in found} == {"teacher", "plain", "tinybert"}
    assert {row["metric"] for row in found} == {"accuracy", "macro_f1", "parameters (k)", "step (ms)"}
    assert {row["method"] for row in language} == {"teacher", "plain", "gkd"}
    assert {row["metric"] for row in language} == {"perplexity", "parameters (k)", "step (ms)"}
    assert len(found) + len(language) == len(results)
    size = {row["method"]: float(row["value"]) for row in found if row["metric"] == "parameters (k)"}
    assert size["teacher"] > 2 * size["plain"]
    assert size["tinybert"] == size["plain"]  # a distilled student costs what a plain one does
    for folder in (out, out / "language_model"):
        width, height = Image.open(folder / "attention.png").size
        assert height > 0.6 * width  # three rows of four heads
        assert Image.open(folder / "curves.png").size[0] > 1000
        assert "| plain |" in (folder / "table.md").read_text()


def test_demo_evaluates_what_it_saves(finished):
    out, results = finished
    told = {r.method: r.value for r in results if r.metric == "accuracy"}
    lines = [json.loads(line) for line in (out / "data" / "test.jsonl").read_text().splitlines()]
    for method in ("plain", "tinybert"):
        folder = out / "seed0" / method
        model, info = AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        tokenizer = AutoTokenizer.from_pretrained(folder)
        right = 0
        for line in lines:
            encoded = tokenizer(line["text"], truncation=True, max_length=16, return_tensors="pt")
            right += model.config.id2label[int(model.eval()(**encoded).logits.argmax())] == line["label"]
        assert right / len(lines) == pytest.approx(told[method])


@pytest.mark.slow
def test_finished_trainings_are_taken_as_they_are(small, finished, monkeypatch, capsys):
    out, results = finished

    def refuse(comparison, training):
        raise AssertionError(f"{training.method} was trained")

    monkeypatch.setattr(demo.TrainerComparison, "train", refuse)
    same = demo.main(recipes="tinybert,gkd", out=out, iterations=4)
    assert [r for r in same if r.metric != "step (ms)"] == [r for r in results if r.metric != "step (ms)"]
    assert capsys.readouterr().out.count("taken from") == 6
    sentences = demo.SENTENCES
    monkeypatch.setattr(demo, "SENTENCES", replace(sentences, recipes={"tinybert": dict(recipe="tinybert")}))
    with pytest.raises(AssertionError, match="tinybert was trained"):
        demo.main(recipes="tinybert", out=out, iterations=4)
    monkeypatch.setattr(demo, "SENTENCES", replace(sentences, rates=(5e-4, 1e-3)))
    with pytest.raises(AssertionError, match="plain was trained"):
        demo.main(recipes="none", out=out, iterations=4)


def test_students_with_another_tokenizer(small, tmp_path, capsys):
    data = tmp_path / "data"
    data.mkdir()
    for split, count in (("train", 24), ("val", 4), ("test", 6)):
        texts = [f"returns the {('sum', 'mean')[i % 2]} of a given array in turn {i}" for i in range(count)]
        (data / f"{split}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    for recipes in ("default", "none"):  # it runs where one of its recipes is named
        assert run([demo.TOKENIZERS], lambda _: data, tmp_path, recipes=recipes) == []
    results = run([demo.TOKENIZERS], lambda _: data, tmp_path, recipes="gold", iterations=2)
    said = capsys.readouterr().out
    assert "to be compared among the students" in said and "of the gap" not in said
    folder = tmp_path / "other_tokenizer"
    assert {row["method"] for row in rows(folder)} == {"teacher", "plain", "gold"}
    assert len(rows(folder)) == len(results) == 3 * 3
    assert Image.open(folder / "attention.png").size[0] > 0
    entries = {}
    for method in ("teacher", "plain", "gold"):
        saved = folder / "seed0" / method
        tokenizer, model = AutoTokenizer.from_pretrained(saved), AutoModelForCausalLM.from_pretrained(saved)
        entries[method] = len(tokenizer)
        assert model.get_input_embeddings().num_embeddings == len(tokenizer)
    assert entries["teacher"] > entries["plain"] == entries["gold"] == 50
    # A plain student and a distilled one are trained and tested on the same tokens.
    trainings = [Training(name, 0, 1, "test", "cpu", data, folder) for name in ("plain", "gold")]
    plain, gold = map(demo.TOKENIZERS.restore, trainings)
    assert plain.train_dataset["input_ids"] == gold.train_dataset["input_ids"]
    batches = demo.TOKENIZERS.batches([plain, gold])
    assert ["teacher_inputs" in batch for batch in batches] == [False, True]


@pytest.fixture
def real(tmp_path):
    """A set in the layout of ``--data``: words, tags and labels."""
    root = tmp_path / "own"
    root.mkdir()
    for split, count in (("train", 40), ("val", 8)):
        made = [
            {"tokens": ["play", ["a", "the"][i % 2], "song"], "tags": ["O", "O", "B-what"], "label": i % 2}
            for i in range(count)
        ]
        (root / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
    return root


@pytest.mark.slow
def test_demo_takes_a_real_set(small, tmp_path, real):
    results = demo.main(recipes="none", out=tmp_path / "out", iterations=2, data=str(real), fraction=0.5)
    assert {(r.dataset, r.metric) for r in results} >= {("own", "accuracy"), ("own, tags", "span_f1")}
    assert {r.method for r in results} == {"teacher", "plain"}
    assert {row["dataset"] for row in rows(tmp_path / "out" / "tags")} == {"own, tags"}


def test_a_fraction_is_drawn_by_the_seed(small, tmp_path, real):
    comparison, _ = demo.own_set(real, 0.5)
    outcomes = [comparison.train(Training("teacher", seed, 1, "test", "cpu", real, tmp_path)) for seed in (0, 1)]
    drawn = [outcome.run.train_dataset["input_ids"] for outcome in outcomes]
    assert [len(each) for each in drawn] == [20, 20]
    assert list(drawn[0]) != list(drawn[1])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"label": 1}, "need a column 'text', or 'tokens'"),
        ({"text": "a"}, "need a column 'label', or 'tokens' and 'tags'"),
    ],
)
def test_a_set_without_its_columns_is_one_line(tmp_path, line, message):
    for split in ("train", "val"):
        (tmp_path / f"{split}.jsonl").write_text(json.dumps(line) + "\n")
    with pytest.raises(DistillError, match=message):
        demo.main(out=tmp_path / "out", data=str(tmp_path))
    (tmp_path / "val.jsonl").unlink()
    with pytest.raises(DistillError, match=r"no val\.jsonl"):
        demo.main(out=tmp_path / "out", data=str(tmp_path))


def test_words_without_their_tags_are_one_line(small, tmp_path):
    for split in ("train", "val"):
        (tmp_path / f"{split}.jsonl").write_text(json.dumps({"tokens": ["a", "b"], "tags": ["O"]}) + "\n")
    with pytest.raises(DistillError, match="sample 0 has 2 tokens and 1 tags"):
        demo.main(out=tmp_path / "out", data=str(tmp_path), recipes="none", iterations=2)


def test_options_that_mean_nothing_are_one_line(capsys):
    assert main(["demo", "nlp", "--fraction", "0.5"]) == 2
    assert "kdgraft demo nlp --data DIR --fraction 0.1" in capsys.readouterr().err
    assert main(["demo", "nlp", "--recipes", "nothing"]) == 2
    assert "no recipe 'nothing'; known: tinybert" in (said := capsys.readouterr().err)
    assert {*demo.LANGUAGE_MODELS, *demo.TWO_TOKENIZERS} < set(said.replace(",", "").split())
