"""A causal language model that teaches a classifier by words: its class probabilities against plain forwards of the same model."""

from __future__ import annotations

import json
import math

import pytest
import torch
import yaml
from datasets import Dataset
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DataCollatorWithPadding,
    LlamaConfig,
    LlamaForCausalLM,
)

from kdgraft import DistillError, WiringError
from kdgraft.cli import main
from kdgraft_nlp import DistillCollator, DistillTrainer, LabelWords, SoftLabels, SoftTargets, fill_store
from kdgraft_nlp.data import train_tokenizer
from kdgraft_nlp.run import build
from support import nlp as support

TEXTS = ["a fine film", "a dull and very long film of no use", "fine work", "dull"] * 4
WORDS = {"positive": [" good", " very fine"], "negative": [" bad", " very dull", " very bad"]}
TEMPLATE = "{text}.\nIt is"
NAMES = ("input_ids", "attention_mask", "token_type_ids")
STUDENT = train_tokenizer(TEXTS, vocab_size=50)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """The folder of a Llama with a tokenizer of its own, that begins texts with a token."""
    folder = tmp_path_factory.mktemp("llama")
    tokenizer = train_tokenizer([*TEXTS, "it is good bad very dull fine ."] * 3, vocab_size=120)
    tokenizer.bos_token, tokenizer.pad_token = "[CLS]", None
    tokenizer.save_pretrained(folder)
    torch.manual_seed(1)
    sizes = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **sizes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4 if parameter.ndim > 1 else 1)
    model.save_pretrained(folder)
    return folder


def by_hand(folder, prompt, words=WORDS):
    """The log-probability of each class: one plain forward for each word, without padding, token by token."""
    model = LlamaForCausalLM.from_pretrained(folder).eval()
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    scores = []
    for own in words.values():
        total = 0.0
        for word in own:
            before, after = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, word))
            before = [tokenizer.bos_token_id, *before]
            with torch.no_grad():
                logits = model(torch.tensor([before + after])).logits[0].double().log_softmax(-1)
            total += math.exp(sum(logits[len(before) - 1 + k, token].item() for k, token in enumerate(after)))
        scores.append(math.log(total))
    return scores


def bert(**settings):
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    return support.quiet(BertForSequenceClassification(BertConfig(vocab_size=len(STUDENT), **sizes, **settings)))


def trainer(folder, teacher, student=None, collator=None, **settings):
    data = Dataset.from_dict({**STUDENT(TEXTS), "text": TEXTS, "labels": [1, 0] * 8})
    return DistillTrainer(
        model=student or bert(),
        teacher=teacher,
        args=support.arguments(folder),
        train_dataset=data,
        data_collator=collator or DistillCollator(DataCollatorWithPadding(STUDENT), text="text"),
        **{"terms": [SoftTargets()], **settings},
    )


def step_of(built):
    """The term's loss on the first batch, with the batch and the student's log-probabilities on it."""
    batch = built._prepare_inputs(next(iter(built.get_train_dataloader())))
    built.state.epoch, built.current_gradient_accumulation_steps = 0.0, 1
    built.compute_loss(built.model.train(), dict(batch))
    with torch.no_grad():
        logits = built.model.plain_forward(**{k: v for k, v in batch.items() if k in NAMES}).logits
    return (
        built.model.distill_link.last.losses["distill.soft_targets.loss"].item(),
        batch,
        logits.double().log_softmax(-1),
    )


def divergence(scores, ours):
    theirs = torch.tensor(scores, dtype=torch.double).log_softmax(-1)
    return (theirs.exp() * (theirs - ours)).sum(-1).mean().item()


@pytest.mark.parametrize(
    ("words", "lengths"),
    [
        (WORDS, {1, 2}),
        ({"positive": [" good"], "negative": " bad"}, {1}),
        ({"a": [" very dull"], "b": [" fine"]}, {1, 2}),
        ({"a": [" very dull film", " very"], "b": [" good film"]}, {1, 2, 3}),  # one begins as the other does
    ],
)
def test_scores_are_those_of_plain_forwards(llama, words, lengths):
    source = LabelWords(llama, TEMPLATE, words)
    listed = {name: [own] if isinstance(own, str) else own for name, own in words.items()}
    assert {len(word) for _, word in source.scorer.words} == lengths
    labelled = source.labelled(Dataset.from_dict({"text": TEXTS[:4]}), "soft")
    for text, soft in zip(TEXTS, labelled["soft"], strict=False):
        scores = torch.tensor(by_hand(llama, f"{text}.\nIt is", listed))
        assert soft == pytest.approx(scores.softmax(-1).tolist(), abs=1e-5)
        # Each score by itself, which is the logarithm of a probability, not only their ratio.
        own = source.scorer.scores({"texts": {"text": [text]}})[0]
        assert own.tolist() == pytest.approx(scores.tolist(), abs=1e-4)


def test_padding_changes_nothing(llama):
    source = LabelWords(llama, TEMPLATE, WORDS)
    with torch.no_grad():
        together = source.scorer.scores({"texts": {"text": TEXTS[:4]}})
        alone = torch.cat([source.scorer.scores({"texts": {"text": [text]}}) for text in TEXTS[:4]])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
    assert len({len(text) for text in TEXTS[:4]}) == 4


@pytest.mark.parametrize("family", ["gpt2", "qwen"])
def test_other_families(family, tmp_path):
    """Absolute positions, and a model on a tokenizer that begins texts with nothing."""
    tokenizer = train_tokenizer([*TEXTS, "it is good bad."] * 3, vocab_size=100)
    model = support.quiet(support.model(family, vocab_size=len(tokenizer))).eval()
    source = LabelWords(model, "{text} is", {"x": [" good"], "y": [" bad"]}, tokenizer=tokenizer)
    with torch.no_grad():
        found = source.scorer.scores({"texts": {"text": TEXTS[:4]}})
        for row, text in zip(found, TEXTS, strict=False):
            ids = tokenizer(f"{text} is", add_special_tokens=False)["input_ids"]
            logits = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
            good, bad = (tokenizer(word, add_special_tokens=False)["input_ids"] for word in (" good", " bad"))
            assert (len(good), len(bad)) == (1, 1)
            assert row.tolist() == pytest.approx([logits[good[0]].item(), logits[bad[0]].item()], abs=1e-4)


def test_a_classifier_learns_from_the_words(llama, tmp_path):
    names = dict(id2label={0: "negative", 1: "positive"}, label2id={"negative": 0, "positive": 1})
    source = LabelWords(str(llama), TEMPLATE, WORDS)
    built = trainer(tmp_path, source, bert(**names))
    loss, batch, ours = step_of(built)
    scores = [by_hand(llama, f"{text}.\nIt is")[::-1] for text in batch["texts"]["text"]]  # in the student's order
    assert loss == pytest.approx(divergence(scores, ours), rel=1e-4)
    before = {key: value.clone() for key, value in source.scorer.model.state_dict().items()}
    built.train()
    assert all(torch.equal(before[key], value) for key, value in source.scorer.model.state_dict().items())
    assert "distill.soft_targets.loss" in built.state.log_history[0]
    built.save_model(str(tmp_path / "student"))
    assert {"model.safetensors", "config.json"} <= {path.name for path in (tmp_path / "student").iterdir()}
    found = BertForSequenceClassification.from_pretrained(tmp_path / "student").state_dict()
    assert not [name for name in found if "distiller" in name or "scorer" in name]


def test_the_written_column_teaches_as_the_model_does(llama, tmp_path):
    running = trainer(tmp_path, LabelWords(llama, TEMPLATE, WORDS))
    loss, batch, _ = step_of(running)
    column = LabelWords(llama, TEMPLATE, WORDS).labelled(running.train_dataset)
    stored = DistillTrainer(
        model=bert(),
        teacher=SoftLabels("soft_labels", classes=list(WORDS)),
        terms=[SoftTargets()],
        args=support.arguments(tmp_path),
        train_dataset=column.remove_columns("text"),
        data_collator=DataCollatorWithPadding(STUDENT),
    )
    other, again, _ = step_of(stored)
    assert torch.equal(batch["input_ids"], again["input_ids"])
    assert loss == pytest.approx(other, rel=1e-4)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (dict(template="It is"), "template lacks {text}, where the sample's text belongs; got 'It is'"),
        (dict(template=5), "template must be a text with {text} in it, got 5"),
        (dict(template="{text"), "cannot read template '{text': "),
        (dict(template="{} is"), "template has {}, and the texts are {text}"),
        (dict(words={"a": [" x"]}), "words must have two classes or more"),
        (dict(words=["a", "b"]), "words must have two classes or more"),
        (dict(words={"a": [], "b": [" bad"]}), "class 'a' needs a list of one word or more, got []"),
        (dict(words={"a": [""], "b": [" bad"]}), "class 'a' needs a list of one word or more, got ['']"),
        (dict(words={"a": [" bad"], "b": [" bad"]}), "the word ' bad' is given for 'a' and 'b'; give it once"),
        (dict(words={"a": [" good", " good"], "b": [" bad"]}), "the word ' good' is given twice for 'a'"),
        (
            dict(template="{text} go", words={"a": ["od"], "b": [" bad"]}),
            "the tokens of 'od' cannot be told from those of",
        ),
        (dict(model="nowhere"), "no tokenizer at nowhere"),
        (dict(model="bert"), "model must be a causal language model or its folder, got BertForSequenceClassification"),
    ],
)
def test_what_cannot_be_meant(settings, said, llama):
    given = {"model": llama, "template": TEMPLATE, "words": WORDS, **settings}
    if given["model"] == "bert":
        given.update(model=bert(), tokenizer=str(llama))
    with pytest.raises(DistillError) as caught:
        LabelWords(**given)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_what_a_trainer_refuses(llama, tmp_path):
    def source(template=TEMPLATE):
        return LabelWords(llama, template, WORDS)

    cases = [
        (dict(terms=["HiddenStates"]), "hidden_states reads more than class scores, and LabelWords has nothing else"),
        (dict(student=bert(num_labels=3)), "student and teacher have 3 and 2 classes"),
        (
            dict(student=bert(problem_type="multi_label_classification")),
            "the student has independent ones; use SoftLabels",
        ),
        (dict(student=bert(problem_type="regression", num_labels=1)), "LabelWords gives classes of whole samples"),
        (
            dict(student=bert(id2label={0: "x", 1: "positive"}, label2id={"x": 0, "positive": 1})),
            "the teacher was trained on other classes: it lacks ['x']",
        ),
    ]
    for settings, said in cases:
        with pytest.raises((DistillError, WiringError)) as caught:
            trainer(tmp_path, source(), **settings)
        assert said in str(caught.value)
    with pytest.raises(DistillError, match="the batch has no 'texts', which the teacher reads"):
        trainer(tmp_path, source(), collator=DataCollatorWithPadding(STUDENT)).train()
    with pytest.raises(DistillError, match="LabelWords reads the text 'review', and the batch has text"):
        trainer(tmp_path, source("{review} It is")).train()
    with pytest.raises(DistillError, match=r"a filled template has \d+ tokens, and the model 64 positions"):
        trainer(tmp_path, source("{text} film" + " film" * 60)).train()
    with pytest.raises(
        DistillError, match="a store is of a classifier, and LabelWords is none; write its probabilities"
    ):
        fill_store(trainer(tmp_path, source()), tmp_path / "store")


# --- in recipe files


def recipe(folder, llama, rows, template, **entries):
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    student = dict(model_type="bert", hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    student |= dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    train = str(folder / "train.jsonl")
    return {
        "task": "classification",
        "data": {"train": train, "eval": train, "length": 8, **entries.pop("data", {})},
        "tokenizer": dict(vocab_size=60),
        "student": student,
        "training": dict(use_cpu=True, max_steps=2, save_strategy="no", disable_tqdm=True),
        "teacher": dict(type="LabelWords", model=str(llama), template=template, words=WORDS)
        | entries.pop("teacher", {}),
        "terms": ["SoftTargets"],
        "output": str(folder / "out"),
        **entries,
    }


ROWS = [{"text": text, "label": ["positive", "negative"][i % 2]} for i, text in enumerate(TEXTS)]


def test_a_recipe_file(llama, tmp_path, capsys):
    config = recipe(tmp_path, llama, ROWS, TEMPLATE)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(config))
    assert main(["check", str(tmp_path / "recipe.yaml")]) == 0
    assert "distill.soft_targets.loss" in capsys.readouterr().out
    assert main(["train", str(tmp_path / "recipe.yaml")]) == 0
    assert main(["test", str(tmp_path / "recipe.yaml"), str(tmp_path / "out")]) == 0
    built = build(config)
    loss, batch, ours = step_of(built)
    read = batch["texts"]["text"]
    assert all(any(text.startswith(one) for text in TEXTS) for one in read)
    assert max(map(len, read)) < max(map(len, TEXTS))  # the teacher reads what the student reads, cut to data.length
    scores = [by_hand(llama, f"{text}.\nIt is")[::-1] for text in read]  # sorted names
    assert loss == pytest.approx(divergence(scores, ours), rel=1e-4)


def test_pairs_are_named_by_their_columns(llama, tmp_path):
    rows = [
        {"sentence1": text, "sentence2": "it is good", "label": row["label"]}
        for text, row in zip(TEXTS, ROWS, strict=True)
    ]
    data = dict(text=["sentence1", "sentence2"], length=32)
    built = build(recipe(tmp_path, llama, rows, "{sentence2}? {sentence1}.", data=data))
    loss, batch, ours = step_of(built)
    first, second = batch["texts"]["text"], batch["texts"]["second_text"]
    scores = [by_hand(llama, f"{b}? {a}.")[::-1] for a, b in zip(first, second, strict=True)]
    assert loss == pytest.approx(divergence(scores, ours), rel=1e-4)
    built.train()


def test_beside_other_teachers(llama, tmp_path):
    names = dict(id2label={0: "negative", 1: "positive"}, label2id={"negative": 0, "positive": 1})
    bert(**names).save_pretrained(tmp_path / "big")
    STUDENT.save_pretrained(tmp_path / "big")
    config = recipe(tmp_path, llama, ROWS, TEMPLATE)
    words = config.pop("teacher")
    teachers = dict(words=words, big=str(tmp_path / "big"), both=dict(type="Ensemble", members=["words", "big"]))
    build({**config, "teachers": teachers, "terms": [dict(type="SoftTargets", source="both")]}).train()


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        (dict(teacher=dict(template="It is")), "LabelWords: template lacks {text}"),
        (dict(data=dict(text=["text", "label"])), "LabelWords: template lacks {label}"),
        (dict(teacher=dict(template="{text} {txt}")), "LabelWords: template has {txt}, and the texts are {text}"),
        (
            dict(teacher=dict(words=dict(positive=[" good"], negative=[]))),
            "class 'negative' needs a list of one word or more",
        ),
        (dict(teacher=dict(model="nowhere")), "no teacher at nowhere: there is no config.json"),
        (dict(teacher=dict(model=None)), "teacher: LabelWords needs model: the folder of a causal language model"),
        (dict(teacher=dict(tokenizer="nowhere")), "no tokenizer of the teacher at nowhere"),
        (dict(teacher=dict(wrods={})), "teacher: LabelWords takes no argument 'wrods'; did you mean 'words'"),
        (dict(task="regression"), "LabelWords gives classes of texts (task: classification)"),
        (dict(teacher_tokenizer=True), "teacher_tokenizer needs teacher: the folder of one model"),
    ],
)
def test_recipes_that_are_refused(entries, said, llama, tmp_path, capsys):
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe(tmp_path, llama, ROWS, TEMPLATE, **entries)))
    support.refused(capsys, ["check", str(tmp_path / "recipe.yaml")], said)
