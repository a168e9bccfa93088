"""DistillCollator: one view of the batch, a second tokenizer, inputs for the teacher alone."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
)

from kdgraft import DistillError
from kdgraft_nlp import DistillCollator, DistillTrainer
from kdgraft_nlp.collator import align
from kdgraft_nlp.student import graft
from kdgraft_nlp.tokens import TEACHER_INPUTS, TOKEN_PAIRS, carried_over, read_batch
from support import nlp as support
from support.tensors import gradients

TEXTS = ["the cat sat", "a dog", "the dog sat on the cat", "on"]


def features(tokenizer, texts=TEXTS):
    return [{**tokenizer(text), "text": text, "labels": i % 3} for i, text in enumerate(texts)]


def test_plain_wrapping_is_the_wrapped_collator():
    tokenizer = support.by_word()
    plain = [{k: v for k, v in f.items() if k != "text"} for f in features(tokenizer)]
    wrapped, own = (
        make(plain)
        for make in (DistillCollator(DataCollatorWithPadding(tokenizer)), DataCollatorWithPadding(tokenizer))
    )
    assert wrapped.keys() == own.keys()
    assert all(torch.equal(wrapped[key], own[key]) for key in own)
    assert DistillCollator(lambda f: f)([(1, 2)]) == [(1, 2)]


def test_random_masking_is_drawn_once():
    tokenizer = support.by_word()
    collator = DistillCollator(DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.5))
    student = support.quiet(support.model("roberta", vocab_size=11, pad_token_id=0))
    grafted = graft(
        student, support.model("roberta", 32, vocab_size=11, pad_token_id=0, seed=2), ["SoftTargets"]
    ).train()
    seen = []
    grafted.distiller.teacher.model.register_forward_pre_hook(
        lambda _, a, k: seen.append(k["input_ids"]), with_kwargs=True
    )
    batch = collator([{k: v for k, v in f.items() if k not in ("text", "labels")} for f in features(tokenizer)])
    grafted(**batch)
    assert torch.equal(seen[0], batch["input_ids"])
    assert (batch["labels"] != -100).any()


def test_tokens_that_end_on_the_same_character():
    ours, theirs = support.by_word(), support.by_letter()
    collator = DistillCollator(DataCollatorWithPadding(ours), theirs, text="text")
    batch = collator(features(ours))
    given = batch[TEACHER_INPUTS]
    assert given["input_ids"].shape == (4, len(TEXTS[2]))
    assert given["attention_mask"][3].tolist() == [0] * 20 + [1, 1]  # "on", padded on the left
    pairs = [[tuple(p) for p in row.tolist() if p[0] >= 0] for row in batch[TOKEN_PAIRS]]
    # "the cat sat": [CLS] the cat sat [SEP]; the words end on characters 2, 6, 10, padded by 22 − 11.
    assert pairs[0] == [(1, 11 + 2), (2, 11 + 6), (3, 11 + 10)]
    assert pairs[3] == [(1, 21)]
    for row, text in zip(pairs, TEXTS, strict=True):
        assert len(row) == len(text.split())
    left = DistillCollator(DataCollatorWithPadding(support.by_word("left")), theirs, text="text")(features(ours))
    moved = [[tuple(p) for p in row.tolist() if p[0] >= 0] for row in left[TOKEN_PAIRS]]
    assert moved[3] == [(8 - 3 + 1, 21)]


def test_words():
    ours, theirs = support.by_word(), support.by_letter()
    words = [text.split() for text in TEXTS]
    data = [{**ours(w, is_split_into_words=True), "tokens": w} for w in words]
    for feature in data:
        feature["labels"] = [-100, *[0] * (len(feature["input_ids"]) - 2), -100]
    batch = DistillCollator(DataCollatorForTokenClassification(ours), theirs, words="tokens")(data)
    letters = theirs(words[0], is_split_into_words=True)
    starts = [letters.word_ids().index(i) for i in range(3)]
    longest = batch[TEACHER_INPUTS]["input_ids"].shape[1]
    offset = longest - len(letters["input_ids"])
    assert [tuple(p) for p in batch[TOKEN_PAIRS][0].tolist() if p[0] >= 0] == [
        (1 + i, offset + starts[i]) for i in range(3)
    ]


def test_pairs_of_texts():
    ours, theirs = support.by_word(), support.by_letter()
    data = [{**ours("the cat", "a dog"), "a": "the cat", "b": "a dog", "labels": 0}]
    batch = DistillCollator(DataCollatorWithPadding(ours), theirs, text=["a", "b"])(data)
    assert [tuple(p) for p in batch[TOKEN_PAIRS][0].tolist()] == [(1, 2), (2, 6), (4, 7), (5, 11)]
    encodings = [t(["the cat"], ["a dog"], return_offsets_mapping=True) for t in (ours, ours)]
    assert align(*encodings, 0, 0) == [(i, i) for i in (1, 2, 4, 5)]


@pytest.mark.parametrize(
    "term",
    [
        "HiddenStates",
        "AttentionMaps",
        "Relations",
        "SoftTargets",
        "PatientStates",
        dict(type="AttentionMaps", of="distributions"),
    ],
)
def test_terms_across_tokenizers(term):
    ours, theirs = support.by_word(), support.by_letter("right")  # BERT counts positions from the padding on
    collator = DistillCollator(DataCollatorWithPadding(ours), theirs, text="text")
    student = support.quiet(support.model("bert", vocab_size=11, seed=1))
    terms = [term if isinstance(term, dict) else dict(type=term)]
    if terms[0]["type"] == "PatientStates":
        terms[0]["layers"] = "last"
    grafted = graft(student, support.model("bert", 32, 4, vocab_size=28, seed=2), terms).train()
    found = []
    for texts in (TEXTS, TEXTS[:2] + TEXTS[3:] + ["the dog sat on the dog sat"]):
        batch = collator(features(ours, texts))
        batch = {
            k: v[:2] if isinstance(v, torch.Tensor) else {n: t[:2] for n, t in v.items()} for k, v in batch.items()
        }
        grafted.zero_grad()
        grafted(**batch)
        loss = next(iter(grafted.distill_link.last.losses.values()))
        loss.backward()
        found.append((loss.detach(), gradients(grafted)))
    # The two batches hold the same two samples, padded to other lengths for both models.
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-4, atol=1e-6)
    assert found[0][0] > 0
    for name, gradient in found[0][1].items():
        torch.testing.assert_close(gradient, found[1][1][name], rtol=1e-3, atol=1e-5)


def test_the_same_tokenizer_twice_changes_nothing():
    tokenizer = support.by_word()
    losses = []
    for second in (None, support.by_word()):
        text = {} if second is None else {"text": "text"}
        collator = DistillCollator(DataCollatorWithPadding(tokenizer), second, **text)
        data = features(tokenizer)
        if second is None:
            data = [{k: v for k, v in f.items() if k != "text"} for f in data]
        student = support.quiet(support.model("bert", vocab_size=11, seed=1))
        grafted = graft(student, support.model("bert", 32, 4, vocab_size=11, seed=2), ["SoftTargets"]).train()
        grafted(**collator(data))
        losses.append(grafted.distill_link.last.losses["distill.soft_targets.loss"])
    torch.testing.assert_close(*losses)


def test_inputs_for_the_teacher_alone():
    data = [{**sample, "teacher_pixel_values": torch.rand(3, 24, 24)} for sample in support.samples(4, "image")]
    batch = DistillCollator(support.collate)(data)
    assert batch[TEACHER_INPUTS]["pixel_values"].shape == (4, 3, 24, 24)
    student = support.quiet(support.model("vit", seed=1))
    grafted = graft(student, support.model("vit", 32, image_size=24, seed=2), ["SoftTargets"]).train()
    grafted(**batch)
    assert grafted.distill_link.last.losses["distill.soft_targets.loss"] > 0
    grafted.eval()(**batch)


@pytest.mark.parametrize("prune", [True, False])
def test_in_the_trainer(prune, tmp_path):
    from datasets import Dataset

    ours, theirs = support.by_word(), support.by_letter()
    data = Dataset.from_list(features(ours, TEXTS * 3))
    trainer = DistillTrainer(
        model=support.model("bert", vocab_size=11, seed=1),
        teacher=support.model("bert", 32, 4, vocab_size=28, seed=2),
        terms=["HiddenStates", "SoftTargets"],
        args=support.arguments(tmp_path, remove_unused_columns=prune, eval_strategy="steps", eval_steps=4),
        train_dataset=data,
        eval_dataset=data,
        data_collator=DistillCollator(DataCollatorWithPadding(ours), theirs, text="text"),
        processing_class=ours,
    )
    trainer.train()
    assert [e for e in trainer.state.log_history if e.get("distill.hidden_states.loss", 0) > 0]
    assert [e for e in trainer.state.log_history if "eval_loss" in e]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(), "name its column with text='text' or words='tokens'"),
        (dict(text="text", words="tokens"), "name its column"),
        (dict(text="text", collator=lambda f: f), "pass the student's as tokenizer=…"),
        (
            dict(text="text", collator=DataCollatorForLanguageModeling(support.by_word())),
            "cannot be drawn for two tokenizers",
        ),
        (dict(text="text", collator=3), "wraps a collator, got int"),
    ],
)
def test_one_clear_line(settings, message):
    collator = settings.pop("collator", DataCollatorWithPadding(support.by_word()))
    with pytest.raises(DistillError, match=message):
        DistillCollator(collator, support.by_letter(), **settings)


def test_text_that_is_not_there_or_does_not_fit():
    ours = support.by_word()
    collator = DistillCollator(DataCollatorWithPadding(ours), support.by_letter(), text="text")
    with pytest.raises(DistillError, match="no column 'text' for the collator in input_ids"):
        collator([{k: v for k, v in f.items() if k != "text"} for f in features(ours)])
    with pytest.raises(DistillError, match="does not tokenise to the student's input_ids"):
        collator([{**f, "text": "a dog"} for f in features(ours)])


@pytest.mark.parametrize("align", ["position", "text"])
def test_universal_logits_across_tokenizers(align):
    ours = support.by_word()
    texts = ["the cat sat", "a dog", "the dog sat on the cat"]
    losses = []
    for side in ("left", "right"):
        collator = DistillCollator(DataCollatorWithPadding(ours), support.by_letter(side), text="text")
        batch = collator([{**ours(text), "text": text} for text in texts])
        batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        batch["labels"][:, :2] = -100  # a prompt of one word
        student = support.model("llama", vocab_size=11, seed=1)
        teacher = support.model("llama", 32, vocab_size=28, seed=2)
        grafted = graft(
            student, teacher, [dict(type="UniversalLogits", align=align)], facts={"vocabulary": "different"}
        )
        losses.append(support.loss_of(support.quiet(grafted).train(), batch).detach())
        tokens = read_batch(batch, "causal").extra["tokens"]
        assert tokens.teacher.labelled.shape == batch["teacher_inputs"]["input_ids"].shape
    assert losses[0] > 0
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-6)


def test_labels_carried_over_by_hand():
    labelled = torch.tensor([[False, False, True, True, False]])
    pairs = torch.tensor([[[1, 2], [2, 5], [3, 7], [-1, -1]]])
    real = torch.tensor([[True] * 9 + [False]])
    # Up to token 4 the last paired one is the student's 1, which has no label; from 5 on it is 2, then 3.
    assert carried_over(labelled, pairs, real).tolist() == [[False] * 5 + [True] * 4 + [False]]
    assert carried_over(None, pairs, real) is None
    assert not carried_over(labelled, pairs[:, :0], real).any()


def test_a_decoder_with_other_tokens_needs_its_own_targets():
    batch = support.collate(support.samples(2, "seq2seq"))
    batch["teacher_inputs"] = {"input_ids": torch.ones(2, 3, dtype=torch.long), "attention_mask": torch.ones(2, 3)}
    student = graft(support.model("t5", seed=1), support.model("t5", 32, seed=2), ["HiddenStates"]).train()
    with pytest.raises(DistillError, match="teacher_decoder_input_ids or teacher_labels"):
        student(**batch)


def test_truncated_samples_are_paired():
    ours = support.by_word()
    text = "the cat sat on the dog"
    feature = {**ours(text, truncation=True, max_length=5), "text": text}
    batch = DistillCollator(DataCollatorWithPadding(ours), support.by_letter(), text="text")([feature])
    assert [tuple(pair) for pair in batch["token_pairs"][0].tolist()] == [(1, 2), (2, 6), (3, 10)]
