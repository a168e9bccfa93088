"""Language models of different tokenizers: groups of tokens that cover the same text, and shared entries."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import DataCollatorForSeq2Seq, DataCollatorWithPadding

import golden.text
from kdgraft import DistillError, WiringError
from kdgraft.losses import gold
from kdgraft.registry import expand_recipe
from kdgraft_nlp import GOLD, RECIPES, DistillCollator, DistillTrainer, UniversalLogits
from kdgraft_nlp.collator import align, group_starts
from kdgraft_nlp.logits import SortedScores
from kdgraft_nlp.student import graft
from kdgraft_nlp.tokens import ModelTokens, Tokens, read_batch, shared_tokens, tokens_of
from support import nlp as support

TEXTS = ["the cat sat", "a dog", "the dog sat on the cat"]


class Encoded(dict):
    """An encoding of a fast tokenizer, of one sample."""

    def __init__(self, offsets, parts):
        super().__init__(offset_mapping=[offsets])
        self.parts = parts

    def sequence_ids(self, sample):
        return self.parts


def test_groups_by_hand():
    # Special, then ends 2 3 | 5 of one text, special, ends 1 4 of a second; the other tokenizer ends at 3 4 5 and 2 4.
    ours = Encoded([(0, 0), (0, 2), (2, 3), (3, 5), (0, 0), (0, 1), (1, 4)], [None, 0, 0, 0, None, 1, 1])
    theirs = Encoded([(0, 3), (3, 4), (4, 5), (0, 2), (2, 4)], [0, 0, 0, 1, 1])
    pairs = align(ours, theirs, 0, 0)
    assert pairs == [(2, 0), (3, 2), (6, 4)]
    assert group_starts(ours, 0, [2, 3, 6]) == [1, 3, 5]
    assert group_starts(theirs, 0, [0, 2, 4]) == [0, 1, 3]
    # A truncated text ends no group; the next one starts its own.
    assert group_starts(ours, 0, [2, 6]) == [1, 5]


def tokens_of_groups(given):
    """The tokens of the golden case: groups by the ends of tokens, prompts of 2 and 3 tokens."""
    ends = [given[f"{owner}_ends"].tolist() for owner in ("student", "teacher")]
    common = [end for end in ends[0] if end in ends[1]]
    places, starts = [], []
    for own, prompt in zip(ends, (2, 3), strict=True):
        last = [own.index(end) + prompt for end in common]
        places.append(last)
        starts.append([prompt, *(place + 1 for place in last[:-1])])
    sides = []
    for owner, prompt in (("student", 2), ("teacher", 3)):
        ids = given[f"{owner}_ids"]
        predicts = torch.arange(ids.shape[1])[None] >= prompt - 1
        predicts[:, -1] = False
        sides.append(ModelTokens(torch.ones_like(ids, dtype=torch.bool), labelled=predicts, ids=ids))
    pairs, first = (torch.tensor(x).T[None].contiguous() for x in (places, starts))
    return Tokens(1, *sides, pairs=pairs, samples=1, starts=first)


@pytest.mark.parametrize(("merge", "hybrid"), golden.text.GROUPS)
def test_figures_of_trl(merge, hybrid):
    given = golden.text.groups()
    student = given["student"].requires_grad_()
    models = [support.model("llama", vocab_size=v) for v in (7, 10)]
    term = (GOLD if hybrid else UniversalLogits)("groups", merge=merge)
    if hybrid:
        term.shared = golden.text.shared()
    scores = SortedScores(*models, "term", "auto", "groups", merge)
    pairs = scores.per_token(student, given["teacher"], tokens_of_groups(given))
    assert pairs.count == 3
    value = term.compare(pairs).mean()
    (slope,) = torch.autograd.grad(value, student)
    found = (value.item(), slope[0, 3, 2].item(), slope.square().sum().item())
    assert found == pytest.approx(golden.text.GROUPS[merge, hybrid], rel=1e-12)


def collated(side="left", prompt=2):
    ours = support.by_word()
    collator = DistillCollator(DataCollatorWithPadding(ours), support.by_letter(side), text="text")
    batch = collator([{**ours(text), "text": text} for text in TEXTS])
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    batch["labels"][:, :prompt] = -100  # a prompt of one word
    return batch


def grafted(term):
    student, teacher = support.model("llama", vocab_size=11, seed=1), support.model("llama", 32, vocab_size=28, seed=2)
    facts = {"vocabulary": "different", "shared_tokens": torch.tensor([[8, 1], [3, 27], [5, 99]])}
    return support.quiet(graft(student, teacher, [term], facts=facts)).train()


@pytest.mark.parametrize("kind", ["GOLD", "UniversalLogits"])
def test_groups_of_words_and_letters(kind):
    student = grafted(dict(type=kind, align="groups", weight=1.0))
    batch = collated()
    tokens = tokens_of(read_batch(batch, "causal"))
    # "the cat sat": the word "cat" is the letters "␣cat", after "the" of three letters.
    starts, ends = tokens.starts[0, 1], tokens.pairs[0, 1]
    assert (starts[0] == ends[0]) and (ends[1] - starts[1] == 3)
    first = support.distilled_step(student, batch)
    assert first[0] > 0
    assert student.distiller.counts(read_batch(batch, "causal")).popitem()[1] == 2 + 1 + 5  # words after the first
    support.same_step(first, support.distilled_step(student, collated("right")))
    # By hand, the second text: of " dog" the teacher's last letter, times the probability of " do".
    alone = {k: v[1:2] for k, v in batch.items() if isinstance(v, torch.Tensor)}
    alone["teacher_inputs"] = {k: v[1:2] for k, v in batch["teacher_inputs"].items()}
    with torch.no_grad():
        theirs = student.distiller.teacher.model(**alone["teacher_inputs"]).logits[0].softmax(-1)
        own = {k: alone[k] for k in ("input_ids", "attention_mask")}
        ours = student.plain_forward(**own).logits[0].softmax(-1)
    ids = alone["teacher_inputs"]["input_ids"][0]
    *before, last = range(len(ids) - 4, len(ids))
    share = torch.stack([theirs[k - 1, ids[k]] for k in before]).prod()
    p, q = ours[1], theirs[last - 1] * share
    term = next(iter(student.distiller.all_terms))
    if kind == "GOLD":
        assert term.shared.tolist() == [[8, 1], [3, 27]]  # without what the model has no entry for
    if kind == "UniversalLogits":
        padded = torch.cat([p, torch.zeros(17)])
        expected = (padded.sort(descending=True).values - q.sort(descending=True).values).abs().sum()
    else:
        merged = dict(student_share=torch.ones(1), teacher_share=share[None])
        expected = gold(p.log()[None], theirs[last - 1].log()[None], term.shared, **merged)
    torch.testing.assert_close(support.loss_of(student, alone), expected, rtol=1e-4, atol=1e-6)


def test_the_same_tokens_need_no_groups():
    student = grafted(dict(type="UniversalLogits", align="groups"))
    plain = grafted(dict(type="UniversalLogits", align="text"))
    batch = support.collate(support.samples(3, "causal"))
    batch["input_ids"] %= 11
    batch["labels"] = batch["labels"].clamp(max=10)
    support.same_step(support.distilled_step(student, batch), support.distilled_step(plain, batch))


def test_nothing_that_counts_is_zero_with_a_live_graph():
    student = grafted(dict(type="GOLD"))
    batch = collated(prompt=99)
    loss, slopes = support.distilled_step(student, batch)
    assert loss == 0 and slopes and all(not slope.any() for slope in slopes.values())


def test_entries_that_both_tokenizers_write_alike():
    shared = shared_tokens(support.by_word(), support.by_letter())
    assert shared.tolist() == [[8, 1]]  # "a", the only word of one letter
    assert shared_tokens(support.by_word(), support.by_word()).tolist() == [[i, i] for i in range(11)]


def test_in_the_trainer(tmp_path):
    ours, theirs = support.by_word(), support.by_letter()
    data = [{**ours(text), "text": text} for text in TEXTS * 4]
    for sample in data:
        sample["labels"] = copy.copy(sample["input_ids"])
    trainer = DistillTrainer(
        model=support.model("llama", vocab_size=11, seed=1),
        teacher=support.model("llama", 32, vocab_size=28, seed=2),
        recipe="gold",
        args=support.arguments(tmp_path, max_steps=2, gradient_accumulation_steps=2),
        train_dataset=data,
        data_collator=DistillCollator(DataCollatorForSeq2Seq(ours), theirs, text="text", tokenizer=ours),
        processing_class=ours,
    )
    (term,) = trainer.distiller.all_terms
    assert term.shared.tolist() == [[8, 1]]
    assert not any("shared" in key for key in trainer.model.state_dict())
    trainer.train()
    logged = [e["distill.gold.loss"] for e in trainer.state.log_history if "distill.gold.loss" in e]
    assert len(logged) == 2 and min(logged) > 0


def test_mistakes_are_told_in_one_line():
    student, teacher = support.model("llama", vocab_size=11), support.model("llama", 32, vocab_size=28)
    with pytest.raises(WiringError, match="needs both tokenizers; give the trainer processing_class"):
        graft(student, teacher, ["GOLD"])
    with pytest.raises(
        WiringError, match="a group's probability is a product for causal models only, and RobertaForMaskedLM"
    ):
        graft(support.model("roberta"), support.model("roberta", 32), [dict(type="UniversalLogits", align="groups")])
    with pytest.raises(DistillError, match="merge must be one of bayesian, observed, got 'mean'"):
        GOLD(merge="mean")
    built, batch = grafted(dict(type="UniversalLogits", align="groups")), collated()
    del batch["token_starts"]
    with pytest.raises(WiringError, match="needs the text of both tokenizers"):
        built(**batch)


def test_the_acronyms_are_the_terms():
    assert expand_recipe("gold", RECIPES) == [{"type": "GOLD"}]
    assert expand_recipe("uld", RECIPES) == [{"type": "UniversalLogits"}]
