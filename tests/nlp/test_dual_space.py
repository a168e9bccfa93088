"""DSKD on real models: the authors' figures, two tokenizers, chunks, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from transformers import DataCollatorWithPadding

import golden.dual_space as dual
from kdgraft import DistillError, WiringError
from kdgraft.registry import expand_recipe
from kdgraft_nlp import DSKD, RECIPES, DistillCollator
from kdgraft_nlp.chunked import head_of
from kdgraft_nlp.student import graft
from kdgraft_nlp.tokens import read_batch
from support import nlp as support
from support.nlp import distilled_step, same_step

CAUSAL = [("llama", {}), ("gpt2", {}), ("llama", dict(attention=True)), ("gpt2", dict(attention=True))]


def pair(family="llama", facts=None, chunk=None, **settings):
    student = support.quiet(support.model(family, 16, 2, 4, seed=1))
    teacher = support.model(family, 32, 4, 4, seed=2)
    return graft(student, teacher, [dict(type="DSKD", **settings)], facts=facts, chunk=chunk).train()


def squares(slopes, part):
    own = [v for k, v in slopes.items() if (part in k if part else "distiller" not in k)]
    return sum(value.double().square().sum().item() for value in own)


@pytest.mark.parametrize(("attention", "divergence"), dual.FIGURES)
def test_authors_figures(attention, divergence):
    models = [support.model("llama", w, 2, 4, vocab_size=v) for w, v in ((16, 11), (24, 13 if attention else 11))]
    for model in models:
        dual.fill(model)
    facts = {"vocabulary": "different"} if attention else {}
    student = graft(*models, [dict(type="DSKD", divergence=divergence)], facts=facts).train()
    (term,) = student.distiller.all_terms
    names = {"t2s": term.to_student.project, "s2t": term.to_teacher.project}
    dual.projections(names | ({"query": term.query.project} if attention else {}))
    ids, others = dual.tokens(attention)
    batch = dict(input_ids=ids, labels=ids, attention_mask=torch.ones_like(ids))
    if attention:
        given = dict(input_ids=others, labels=others, attention_mask=torch.ones_like(others))
        batch.update(teacher_inputs=given, token_pairs=torch.full((2, 1, 2), -1))
    loss, slopes = distilled_step(student, batch)
    found = [loss.item(), *(squares(slopes, part) for part in ("", "to_student", "to_teacher", "query"))]
    expected = dual.FIGURES[attention, divergence]
    assert found[: len(expected)] == pytest.approx(expected, rel=2e-6)


@pytest.mark.parametrize(("family", "settings"), CAUSAL)
def test_padding_changes_nothing(family, settings):
    student = pair(family, **settings)
    data = support.samples(5, "causal")
    first = distilled_step(student, support.collate(data))
    assert first[0] > 0
    same_step(first, distilled_step(student, support.collate(data, extra=4)))
    counts = student.distiller.counts(read_batch(support.collate(data), "causal"))
    assert counts["dskd"] == sum(label != -100 for sample in data for label in sample["labels"][1:])


@pytest.mark.parametrize(("family", "settings"), CAUSAL)
@pytest.mark.parametrize("chunk", [3, 1000])
def test_chunks_give_the_same(family, settings, chunk):
    batch = support.collate(support.samples(5, "causal"))
    plain, chunked = (pair(family, chunk=size, **settings) for size in (None, chunk))
    assert [row.student_tap for row in chunked.distiller.rows] != [row.student_tap for row in plain.distiller.rows]
    same_step(distilled_step(plain, batch), distilled_step(chunked, batch))


@pytest.mark.parametrize("settings", [{}, dict(attention=True)])
def test_no_label_is_zero_with_a_live_graph(settings):
    for chunk in (None, 4):
        student = pair(chunk=chunk, **settings)
        batch = support.collate(support.samples(3, "causal"))
        batch["labels"][:] = -100
        loss, slopes = distilled_step(student, batch)
        assert loss == 0
        assert all(slope.isfinite().all() and not slope.any() for slope in slopes.values())


def test_attention_across_tokenizers():
    ours, texts = support.by_word(), ["the cat sat", "a dog", "the dog sat on the cat"]
    student, teacher = support.model("llama", vocab_size=11, seed=1), support.model("llama", 32, vocab_size=28, seed=2)
    grafted = support.quiet(graft(student, teacher, ["DSKD"], facts={"vocabulary": "different"})).train()
    assert "attention" in grafted.distiller.rows[0].adapter
    found = []
    for side in ("left", "right"):
        collator = DistillCollator(DataCollatorWithPadding(ours), support.by_letter(side), text="text")
        batch = collator([{**ours(text), "text": text} for text in texts])
        batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        batch["labels"][:, :2] = -100
        found.append(distilled_step(grafted, batch))
    same_step(*found)
    assert {"to_student", "to_teacher", "query"} <= {name.split(".")[-3] for name in found[0][1] if "distiller" in name}
    # The second text has no label: it changes only what it adds to the deviations, which it does not.
    batch["labels"][1] = -100
    without = {k: v[[0, 2]] for k, v in batch.items() if isinstance(v, torch.Tensor)}
    without["teacher_inputs"] = {k: v[[0, 2]] for k, v in batch["teacher_inputs"].items()}
    same_step(distilled_step(grafted, batch), distilled_step(grafted, without))


def test_the_student_has_no_projection():
    student = pair(attention=True)
    assert not any("distiller" in name for name in student.state_dict())
    names = {name for name, _ in student.distiller.named_parameters()}
    kinds = [f"terms.dskd.{part}.project" for part in ("to_student", "to_teacher", "query")]
    assert names == {f"{path}.{kind}" for path in kinds for kind in ("weight", "bias")}


def test_a_capped_head_is_used_as_it_is():
    """Logits of Gemma 2 are capped after the output layer; those of projected states are, too."""
    sizes = dict(num_key_value_heads=2, head_dim=4, vocab_size=40, pad_token_id=0)
    models = [support.model("llama", w, 2, 4, kind="Gemma2ForCausalLM", seed=w, **sizes) for w in (16, 32)]
    student = graft(support.quiet(models[0]), models[1], ["DSKD"]).train()
    (term,) = student.distiller.all_terms
    assert [transform.cap for transform in term.transforms] == [30.0, 30.0]
    assert term._logits([head_of(model) for model in models], 0, torch.full((1, 16), 1e4)).abs().max() <= 30


def test_mistakes_are_told_in_one_line():
    with pytest.raises(WiringError, match="dskd needs two language models of one kind, got BertForSequenceClass"):
        graft(support.model("bert"), support.model("bert", 32), ["DSKD"])
    with pytest.raises(WiringError, match="the tokenizers differ, and attention=False compares token by token"):
        pair(attention=False, facts={"vocabulary": "different"})
    with pytest.raises(WiringError, match="both models must be causal"):
        pair("roberta", attention=True)
    with pytest.raises(DistillError, match="divergence must be one of forward_kl, reverse_kl, jsd"):
        DSKD(divergence="kl")
    with pytest.raises(DistillError, match="attention must be True, False or None, got 'auto'"):
        DSKD(attention="auto")
    batch = support.collate(support.samples(2, "causal"))
    with pytest.raises(DistillError, match="dskd needs the labels of tokens"):
        pair()(**{name: value for name, value in batch.items() if name != "labels"})
    batch["teacher_inputs"] = {k: batch[k] for k in ("input_ids", "attention_mask")}
    batch["token_pairs"] = torch.zeros(2, 1, 2, dtype=torch.long)
    with pytest.raises(WiringError, match="other tokens for the teacher, which it compares one by one"):
        pair()(**batch)


def test_the_acronym_is_the_term():
    assert expand_recipe("dskd", RECIPES) == [{"type": "DSKD"}]
