"""Relations between texts or images of Hugging Face models: which states are pooled, and which samples are remembered."""

from __future__ import annotations

import pytest
import torch
from transformers import DataCollatorWithFlattening, DataCollatorWithPadding, ResNetConfig, ResNetForImageClassification

from kdgraft import DistillError, WiringError
from kdgraft.losses import rkd_distance
from kdgraft_nlp import DistillCollator, DistillTrainer, TeacherCache
from kdgraft_nlp.student import graft
from support import nlp as support

DISTANCES = dict(type="RKD", angle=0, name="term")
TEXTS = ["the cat sat", "a dog", "the dog sat on the cat", "on"]


def grafted(family: str, *terms: dict, **settings):
    student = support.quiet(support.model(family, 16, seed=1, **settings))
    student.config.use_cache = False
    return graft(student.train(), support.model(family, 32, seed=2, **settings), [*terms])


def last_states(student, batch) -> list[torch.Tensor]:
    """The last hidden states of both models, each by the name of its own base model."""
    inputs = {name: value for name, value in batch.items() if name in ("input_ids", "attention_mask", "pixel_values")}
    with torch.no_grad():
        return [model.base_model(**inputs)[0] for model in (student, student.distiller.teacher.model)]


@pytest.mark.parametrize("pool", ["mean", "first"])
@pytest.mark.parametrize("family", ["bert", "distilbert", "llama"])
def test_texts_by_hand(family: str, pool: str):
    student = grafted(family, dict(DISTANCES, pool=pool))
    batch = support.collate(support.samples(5, support.TASKS[family][1]), extra=2)
    states, mask = last_states(student, batch), batch["attention_mask"].bool()
    vectors = [
        torch.stack([text[real].mean(0) if pool == "mean" else text[0] for text, real in zip(x, mask, strict=True)])
        for x in states
    ]
    torch.testing.assert_close(support.distilled_step(student, batch)[0], rkd_distance(*vectors))


@pytest.mark.parametrize("pool", ["mean", "first"])
def test_packed_rows_hold_a_sample_for_each_text(pool: str):
    student = grafted("llama", dict(DISTANCES, pool=pool))
    data = support.samples(6, "causal")
    for i, sample in enumerate(data):
        sample["input_ids"][0] = 5 + i  # the first tokens differ, as do their states
    padded, packed = (support.distilled_step(student, f(data)) for f in (support.collate, DataCollatorWithFlattening()))
    assert padded[0] > 0
    torch.testing.assert_close(packed[0], padded[0], rtol=1e-4, atol=1e-6)
    for name, slope in padded[1].items():
        torch.testing.assert_close(packed[1][name], slope, rtol=1e-3, atol=2e-5)
    flat = grafted("llama", dict(DISTANCES, pool="flat"))
    with pytest.raises(WiringError, match="rows hold several texts, which cannot be flattened; use pool='mean'"):
        support.distilled_step(flat, DataCollatorWithFlattening()(data))


def test_each_model_is_pooled_over_its_own_tokens():
    ours, theirs = support.by_word(), support.by_letter("right")
    collator = DistillCollator(DataCollatorWithPadding(ours), theirs, text="text")
    batch = collator([{**ours(text), "text": text, "labels": 0} for text in TEXTS])
    student = support.quiet(support.model("bert", vocab_size=11, seed=1)).train()
    student = graft(student, support.model("bert", 32, vocab_size=28, seed=2), [DISTANCES])
    vectors = []
    for model, tokens in ((student, batch), (student.distiller.teacher.model, batch["teacher_inputs"])):
        mask = tokens["attention_mask"]
        with torch.no_grad():
            states = model.bert(input_ids=tokens["input_ids"], attention_mask=mask)[0]
        vectors.append((states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))
    torch.testing.assert_close(support.distilled_step(student, batch)[0], rkd_distance(*vectors))


def test_images_and_the_encoder_of_a_model_without_a_name_for_its_base():
    student = grafted("vit", DISTANCES)
    batch = support.collate(support.samples(4, "image"))
    vectors = [x.mean(1) for x in last_states(student, batch)]
    torch.testing.assert_close(support.distilled_step(student, batch)[0], rkd_distance(*vectors))
    torch.manual_seed(0)
    nets = [
        ResNetForImageClassification(ResNetConfig(embedding_size=w, hidden_sizes=[w], depths=[1], num_labels=3))
        for w in (4, 8)
    ]
    student = graft(nets[0].train(), nets[1], [DISTANCES])
    assert str(student.distiller.all_terms[0].student_taps[0]) == "resnet[0]"
    assert str(grafted("t5", DISTANCES).distiller.all_terms[0].teacher_taps[0]) == "encoder[0]"


def test_maps_have_no_first_token():
    with pytest.raises(WiringError, match=r"gives no vector per sample; tap states \(B, L, C\)"):
        grafted("vit", dict(DISTANCES, tap="vit.embeddings.patch_embeddings.projection", pool="first"))


def test_a_column_tells_which_samples_are_remembered(tmp_path):
    data = [{**sample, "key": f"s{i}"} for i, sample in enumerate(support.samples(6))]
    trainer = DistillTrainer(
        model=support.model("bert", seed=1),
        teacher=support.model("bert", 32, seed=2),
        recipe=dict(type="crd", width=4, name="term"),
        args=support.arguments(tmp_path, max_steps=3, per_device_train_batch_size=2),
        train_dataset=data,
        data_collator=DistillCollator(support.collate, id="key"),
    )
    trainer.train()
    term = trainer.distiller.terms["term"]
    assert sorted(term._places) == [f"s{i}" for i in range(6)]
    assert sorted(term.classes[:6].tolist()) == [0, 0, 1, 1, 2, 2]


def test_mistakes_with_ids():
    collator = DistillCollator(support.collate, id="key")
    assert collator.columns == ["key"]
    with pytest.raises(DistillError, match="id needs column 'key', not in input_ids, labels"):
        collator(support.samples(2))
    with pytest.raises(DistillError, match="the cache identifies samples by 'id', not by 'key'"):
        DistillCollator(support.collate, cache=TeacherCache(), id="key")
