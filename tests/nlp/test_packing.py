"""Packed rows: several texts side by side count as each of them does in a padded batch."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from transformers import DataCollatorWithFlattening

from kdgraft import DistillError
from kdgraft_nlp import DistillCollator, TeacherCache
from kdgraft_nlp.student import graft
from kdgraft_nlp.tokens import read_batch, tokens_of
from support import nlp as support
from support.steps import watched

TERMS = {
    "scores": dict(type="AttentionMaps"),
    "distributions": dict(type="AttentionMaps", of="distributions"),
    "averaged": dict(type="AttentionMaps", heads="averaged", of="distributions"),
    "relations": dict(type="Relations", layers="last"),
    "minilm": dict(type="Relations", of=("attention", "value")),
    "hidden": dict(type="HiddenStates"),
    "patient": dict(type="PatientStates", layers="last"),
    "forward": dict(type="ForwardKL"),
}
MARKS = {
    "position_ids": dict(),
    "cu_seq_lens": dict(return_flash_attn_kwargs=True),
    "seq_idx": dict(return_seq_idx=True),
}


def texts(count=12):
    return support.samples(count, "causal")


def models(family, equal_width=False):
    student = support.quiet(support.model(family, 32 if equal_width else 16, 2, 4, seed=1)).train()
    student.config.use_cache = False  # as the Trainer does; models with a cache do not part texts
    return student, support.model(family, 32, 4, 4, seed=2).eval()


def close(one, other):
    torch.testing.assert_close(one[0], other[0], rtol=1e-4, atol=1e-6)
    assert one[1].keys() == other[1].keys()
    for name in one[1]:
        torch.testing.assert_close(
            one[1][name], other[1][name], rtol=1e-3, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("name", TERMS)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_packed_row_is_the_padded_batch(family, name):
    student, teacher = models(family, equal_width=name == "patient")
    student = graft(student, teacher, [TERMS[name]])
    data = texts()
    padded, packed = support.collate(data), DataCollatorWithFlattening()(data)
    assert packed["input_ids"].shape[0] == 1 and len(padded["input_ids"]) == 12
    whole = support.distilled_step(student, padded)
    assert whole[0] > 0
    close(whole, support.distilled_step(student, packed))
    # Told from the batch alone, the count is the same.
    counts = [student.distiller.counts(read_batch(batch, "causal")) for batch in (padded, packed)]
    assert counts[0] == counts[1] and counts[0]
    student.distill_link.totals = counts[1]
    close(whole, support.distilled_step(student, packed))


def heard(model, ids):
    """Of one text alone: queries, keys and values of each layer, and each layer's output, from the plain model."""
    seen, states = [], []
    hooks = [
        block.attn.c_attn.register_forward_hook(lambda _, args, out: seen.append(out)) for block in model.transformer.h
    ]
    hooks += [
        block.register_forward_hook(lambda _, args, out: states.append(out[0] if isinstance(out, tuple) else out))
        for block in model.transformer.h
    ]
    with torch.no_grad():
        model(input_ids=torch.tensor([ids]))  # alone
    for hook in hooks:
        hook.remove()
    heads = model.config.n_head
    split = [[x[0].unflatten(-1, (heads, -1)).transpose(0, 1) for x in out.chunk(3, -1)] for out in seen]
    return split, [state[0] for state in states]


def by_hand(name, student, teacher, data):
    """TinyBERT's squared errors, MiniLM's relations of values and PKD's first tokens, text by text, two layers of four."""
    total = count = 0.0
    for sample in data:
        (ours, our_states), (theirs, their_states) = (heard(model, sample["input_ids"]) for model in (student, teacher))
        length = len(sample["input_ids"])
        lower = torch.ones(length, length).tril().bool()
        for mine, other in ((0, 1), (1, 3)):  # each second layer of the teacher
            s, t = ours[mine], theirs[other]
            if name == "scores":
                maps = [q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5 for q, k, _ in (s, t)]
                total += (maps[0] - maps[1]).square().mean(0)[lower].sum() / 2
                count += length * (length + 1) / 2 / 2
            elif name == "relations":
                related = [
                    (v @ v.transpose(-1, -2) / v.shape[-1] ** 0.5).masked_fill(~lower, -torch.inf).log_softmax(-1)
                    for _, _, v in (s, t)
                ]
                total += (
                    F.kl_div(related[0], related[1], log_target=True, reduction="none").nan_to_num(0).sum(-1).mean() / 2
                )
                count += 1 / 2
            else:
                first = [
                    F.normalize(states[layer][0], dim=0)
                    for states, layer in ((our_states, mine), (their_states, other))
                ]
                total += (first[0] - first[1]).square().sum() / 2
                count += 1 / 2
    return total / count


@pytest.mark.parametrize("marks", MARKS)
@pytest.mark.parametrize(
    ("name", "term"),
    [
        ("scores", dict(type="AttentionMaps")),
        ("relations", dict(type="Relations", of="value", layers="uniform")),
        ("patient", dict(type="PatientStates", layers="uniform")),
    ],
)
def test_texts_of_a_packed_row_by_hand(name, term, marks):
    student, teacher = models("gpt2", equal_width=True)
    data = texts()
    expected = by_hand(name, copy.deepcopy(student), teacher, data)
    student = graft(student, teacher, [term])
    packed = DataCollatorWithFlattening(**MARKS[marks])(data)
    torch.testing.assert_close(support.loss_of(student, packed).detach(), expected, rtol=1e-4, atol=1e-6)


def test_kernels_that_are_told_where_texts_end_get_no_mask():
    """What flash attention sees: a causal call over the whole row; pairs of tokens of two texts do not count."""
    student = graft(*models("llama"), ["AttentionMaps"])
    term, data = student.distiller.terms["attention_maps"], texts(4)
    batch = DataCollatorWithFlattening(return_flash_attn_kwargs=True)(data)
    tokens = tokens_of(read_batch(batch, "causal"))
    length = batch["input_ids"].shape[1]
    with watched() as steps:
        student.train()(**batch)
    recording = steps[0].recordings["student"]
    call = recording[term.student_taps[0]]._replace(mask=None, causal=True)
    sizes = [len(sample["input_ids"]) for sample in data]
    expected = torch.block_diag(*(torch.ones(n, n).tril() for n in sizes)).bool()
    assert term._valid(call, call, tokens).expand(1, 1, length, length)[0, 0].equal(expected)


@pytest.mark.parametrize(
    ("marks", "expected"),
    [
        (dict(position_ids=torch.tensor([[0, 1, 2, 0, 1], [0, 0, 1, 2, 3]])), [[0, 0, 0, 1, 1], [2, 3, 3, 3, 3]]),
        (
            dict(position_ids=torch.tensor([[2, 3, 4, 2, 3]])),
            [[0, 0, 0, 1, 1], [2, 2, 2, 3, 3]],
        ),  # RoBERTa's, for all rows
        (
            dict(position_ids=torch.tensor([[[0, 1, 0, 1, 2]] * 2] + [[[0, 0, 0, 0, 0]] * 2] * 3)),
            [[0, 0, 1, 1, 1], [2, 2, 3, 3, 3]],
        ),
        (dict(seq_idx=torch.tensor([[0, 0, 1, 1, 1], [0, 0, 0, 0, 0]])), [[0, 0, 1, 1, 1], [2, 2, 2, 2, 2]]),
        (dict(cu_seq_lens_q=torch.tensor([0, 3, 5, 10], dtype=torch.int32)), [[0, 0, 0, 1, 1], [2, 2, 2, 2, 2]]),
        (dict(position_ids=torch.tensor([[0, 1, 2, 3, 4]])), None),
        (
            dict(position_ids=torch.tensor([[0, 1, 2, 0, 1]]), attention_mask=torch.ones(2, 5)),
            None,
        ),  # no model parts these
        (dict(), None),
    ],
)
def test_where_texts_begin(marks, expected):
    side = tokens_of(read_batch({"input_ids": torch.ones(2, 5, dtype=torch.long), **marks}, "masked")).student
    assert side.texts is None if expected is None else side.texts.tolist() == expected


def test_no_text_predicts_the_next():
    ids = torch.arange(5)[None]
    batch = {"input_ids": ids, "labels": ids.clone(), "position_ids": torch.tensor([[0, 1, 2, 0, 1]])}
    side = tokens_of(read_batch(batch, "causal")).student
    assert side.labelled is not None and side.labelled.tolist() == [[True, True, False, True, False]]


def test_the_teacher_is_told_where_texts_end():
    student, teacher = models("llama")
    given = []
    teacher.register_forward_pre_hook(lambda _, args, kwargs: given.append(set(kwargs)), with_kwargs=True)
    student = graft(student, teacher, ["ForwardKL"])
    student(**DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True)(texts(3)))
    assert {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx", "position_ids"} <= given[-1]


def test_what_needs_a_row_a_sample_is_refused():
    data = [{**sample, "id": str(i), "text": "the cat"} for i, sample in enumerate(texts(3))]
    flat = DataCollatorWithFlattening()
    words = support.by_word()
    for collator, features in (
        (DistillCollator(flat, cache=TeacherCache()), data),
        (DistillCollator(flat, teacher_tokenizer=words, tokenizer=words, text="text"), data),
        (DistillCollator(flat), [{**sample, "teacher_token_type_ids": [0]} for sample in texts(3)]),
    ):
        with pytest.raises(DistillError, match="needs one row per sample; use a collator that pads"):
            collator(features)
    pairs = dict(flat(texts(3)), token_pairs=torch.zeros(1, 2, 2, dtype=torch.long))
    with pytest.raises(DistillError, match="packed rows cannot be aligned across two tokenizers"):
        read_batch(pairs, "causal")
