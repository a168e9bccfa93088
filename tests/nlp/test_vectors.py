"""Embeddings of texts and scores of candidates, on real models: padding, packed rows, two tokenizers, counts."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from kdgraft import DistillError
from kdgraft_nlp import DistillTrainer
from kdgraft_nlp.student import graft
from kdgraft_nlp.tokens import read_batch
from support import nlp as support
from support.nlp import distilled_step as step
from support.nlp import same_step

POOLS = ("mean", "first", "last")
EMBED = dict(type="SampleEmbeddings")


def pair(family, terms, kind="", **settings):
    student = support.quiet(support.model(family, 16, 2, 4, seed=1, kind=kind, **settings))
    teacher = support.model(family, 32, 4, 4, seed=2, kind=kind, **settings)
    return graft(student, teacher, terms).train()


def states_of(student, batch):
    """The last states of both models, by transformers' own argument."""
    given = {k: batch[k] for k in ("input_ids", "attention_mask") if k in batch}
    with torch.no_grad():
        return [
            run(**given, output_hidden_states=True).hidden_states[-1]
            for run in (student.plain_forward, student.distiller.teacher.model)
        ]


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("family", ["bert", "llama", "distilbert"])
def test_embeddings_by_hand(family, pool):
    student = pair(family, [{**EMBED, "pool": pool}])
    batch = support.collate(support.samples(5, support.TASKS[family][1]))
    lengths = batch["attention_mask"].sum(1)
    vectors = []
    for states in states_of(student, batch):
        rows = [row[:n] for row, n in zip(states, lengths, strict=True)]
        picked = {"mean": lambda row: row.mean(0), "first": lambda row: row[0], "last": lambda row: row[-1]}[pool]
        vectors.append(torch.stack([picked(row) for row in rows]))
    mapped = student.distiller.terms["sample_embeddings"].adapters[0].project(vectors[0])
    loss, slopes = step(student, batch)
    torch.testing.assert_close(loss, F.mse_loss(mapped, vectors[1]))
    assert any(slope.any() for slope in slopes.values())


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("family", list(support.TASKS))
def test_padding_changes_nothing_and_counts_are_known_ahead(family, pool):
    task = support.TASKS[family][1]
    student = pair(family, [{**EMBED, "pool": pool, "loss": "cosine"}])
    data = support.samples(6, task)
    batch = support.collate(data)
    first = step(student, batch)
    assert first[0] > 0
    if task != "image":
        same_step(first, step(student, support.collate(data, extra=5)))
    counts = student.distiller.counts(read_batch(batch, task))
    assert counts["sample_embeddings"] == 6
    student.distill_link.totals = counts
    same_step(first, step(student, batch))
    parts = [step(student, support.collate([sample])) for sample in data]
    total = {n: sum(p[1].get(n, 0 * slope) for p in parts) for n, slope in first[1].items()}
    same_step(first, (sum(p[0] for p in parts), total))


@pytest.mark.parametrize("pool", POOLS)
def test_packed_rows_are_one_vector_per_text(pool):
    student = pair("llama", [{**EMBED, "pool": pool}], use_cache=False)  # as the Trainer does; a cache joins the texts
    data = support.samples(4, "causal")
    padded = step(student, support.collate(data))
    ids = torch.tensor([[i for sample in data for i in sample["input_ids"]]])
    labels = torch.tensor([[i for sample in data for i in sample["labels"]]])
    positions = torch.cat([torch.arange(len(sample["input_ids"])) for sample in data])[None]
    packed = dict(input_ids=ids, labels=labels, position_ids=positions)
    same_step(padded, step(student, packed))
    assert student.distiller.counts(read_batch(packed, "causal"))["sample_embeddings"] == 4


def test_two_tokenizers_need_no_aligned_tokens():
    student = pair("bert", [EMBED])
    batch = support.collate(support.samples(3, "none"))
    theirs = support.collate(support.samples(3, "none", seed=7, longest=12))
    both = {**batch, "teacher_inputs": theirs, "token_pairs": torch.full((3, 1, 2), -1)}
    mine, other = states_of(student, batch)[0], states_of(student, theirs)[1]
    means = [
        torch.stack([row[:n].mean(0) for row, n in zip(states, given["attention_mask"].sum(1), strict=True)])
        for states, given in ((mine, batch), (other, theirs))
    ]
    mapped = student.distiller.terms["sample_embeddings"].adapters[0].project(means[0])
    torch.testing.assert_close(step(student, both)[0], F.mse_loss(mapped, means[1]))


def test_a_base_model_is_its_own_encoder():
    student = pair("bert", [EMBED], kind="BertModel")
    assert [row.student_tap for row in student.distiller.rows] == ["[0]"]
    assert step(student, support.collate(support.samples(3, "none")))[0] > 0
    pooler = pair("bert", [{**EMBED, "tap": "bert[pooler_output]"}])
    assert step(pooler, support.collate(support.samples(3)))[0] > 0


# --- rankers


def rows(candidates, count=3, seed=0):
    """Rows of candidates of each query; the collator's rows are more than the samples."""
    data = support.samples(count * candidates, "none", seed=seed)
    return support.collate(data)


def test_a_cross_encoder_trains_by_the_trainer(tmp_path):
    """Each sample is a query with two candidates; the collator makes it two rows, whatever the order of samples."""
    pairs = [support.samples(2, "none", seed=i) for i in range(8)]
    samples = [dict(pair=both) for both in pairs]

    def collate(features):
        return support.collate([row for feature in features for row in feature["pair"]])

    trainer = DistillTrainer(
        model=support.quiet(support.model("bert", num_labels=1)),
        teacher=support.model("bert", 32, 4, num_labels=1, seed=2),
        recipe="marginmse",
        args=support.arguments(tmp_path, remove_unused_columns=False, max_steps=2, gradient_accumulation_steps=2),
        train_dataset=samples,
        data_collator=collate,
    )
    trainer.train()
    logged = [
        entry["distill.margin_mse.loss"] for entry in trainer.state.log_history if "distill.margin_mse.loss" in entry
    ]
    assert len(logged) == 2 and all(value > 0 for value in logged)


def test_margins_of_cross_encoders_by_hand():
    student = pair("bert", [dict(type="MarginMSE")], num_labels=1)
    batch = rows(2)
    with torch.no_grad():
        s, t = (run(**batch).logits[:, 0] for run in (student.plain_forward, student.distiller.teacher.model))
    expected = ((s[0::2] - s[1::2]) - (t[0::2] - t[1::2])).square().mean()
    first = step(student, batch)
    torch.testing.assert_close(first[0], expected)
    assert student.distiller.counts(read_batch(batch, "sequence"))["margin_mse"] == 3
    longer = {name: F.pad(value, (0, 4)) for name, value in batch.items()}
    same_step(first, step(student, longer))
    with pytest.raises(DistillError, match="5 rows are no queries of 2 rows"):
        step(student, {name: value[:5] for name, value in batch.items()})


def test_margins_of_bi_encoders_by_hand():
    student = pair(
        "bert", [dict(type="MarginMSE", tap="last_hidden_state", pool="first", similarity="cosine")], kind="BertModel"
    )
    batch = rows(3)
    expected = []
    for states in states_of(student, batch):
        q, p, n = states[:, 0].view(3, 3, -1).unbind(1)
        expected.append(F.cosine_similarity(q, p) - F.cosine_similarity(q, n))
    torch.testing.assert_close(step(student, batch)[0], F.mse_loss(*expected))
    assert student.distiller.counts(read_batch(batch, "other"))["margin_mse"] == 3


def test_multiple_choice_has_a_row_per_query():
    student = pair("bert", [dict(type="MarginMSE")], kind="BertForMultipleChoice")
    batch = {name: value.view(3, 2, -1) for name, value in rows(2).items()}
    with torch.no_grad():
        s, t = (run(**batch).logits for run in (student.plain_forward, student.distiller.teacher.model))
    torch.testing.assert_close(step(student, batch)[0], F.mse_loss(s[:, 0] - s[:, 1], t[:, 0] - t[:, 1]))
    assert student.distiller.counts(read_batch(batch, "choice"))["margin_mse"] == 3
