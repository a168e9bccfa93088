"""``distill`` around the trainer of sentence-transformers: the transformer in an embedding model learns from that in another."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import nn

from kdgraft import DistillError, SampleEmbeddings, WiringError
from kdgraft_nlp import HiddenStates, distill, undistill
from support import nlp as support

sentences = pytest.importorskip("sentence_transformers")

PAIRS = {
    "anchor": ["the cat sat", "a dog", "on a cat", "the dog sat on the cat"] * 4,
    "positive": ["cat on a", "dog"] * 8,
}


def embedder(folder, width=16, layers=2, seed=1):
    """An embedding model: a small BERT, and the mean of its states."""
    from sentence_transformers import models

    support.quiet(support.model("bert", width, layers, seed=seed, kind="BertModel")).save_pretrained(folder)
    support.by_word().save_pretrained(folder)
    transformer = models.Transformer(str(folder), max_seq_length=16)
    found = sentences.SentenceTransformer(modules=[transformer, models.Pooling(width)], device="cpu")
    support.quiet(found)
    return found


def trainer_of(folder, student, loss=None, **settings):
    from sentence_transformers import losses

    told = dict(
        max_steps=2, per_device_train_batch_size=4, use_cpu=True, report_to=[], logging_steps=1, disable_tqdm=True
    )
    return sentences.SentenceTransformerTrainer(
        model=student,
        args=sentences.SentenceTransformerTrainingArguments(
            str(folder / "out"), **{**told, "save_strategy": "no", "seed": 1, "learning_rate": 1e-3, **settings}
        ),
        train_dataset=Dataset.from_dict(PAIRS),
        loss=(loss or losses.MultipleNegativesRankingLoss)(student),
    )


def columns(batch):
    """The features of each column of a batch."""
    return [
        {name: batch[f"{column}_{name}"] for name in ("input_ids", "attention_mask")}
        for column in ("anchor", "positive")
    ]


def test_loss_by_hand(tmp_path):
    student, teacher = embedder(tmp_path / "s"), embedder(tmp_path / "t", seed=2)
    trainer = trainer_of(tmp_path, student)
    batch = next(iter(trainer.get_train_dataloader()))
    own = trainer.compute_loss(student.train(), copy.deepcopy(batch)).detach()
    by_hand = sum(
        F.mse_loss(*(one(dict(each))["sentence_embedding"].detach() for one in (student, teacher)))
        for each in columns(batch)
    )
    distill(trainer, teacher=teacher, terms=[SampleEmbeddings()])
    trainer.state.epoch, trainer.current_gradient_accumulation_steps = 0.0, 1
    loss = trainer.compute_loss(student.train(), copy.deepcopy(batch)).detach()
    torch.testing.assert_close(loss, own + by_hand)


@pytest.mark.parametrize("given", ["model", "folder"])
def test_a_wider_teacher_teaches_layers_and_vectors(tmp_path, given):
    student, teacher = embedder(tmp_path / "s"), embedder(tmp_path / "t", 32, 4, seed=2)
    if given == "folder":
        teacher.save(str(tmp_path / "saved"))
        teacher = str(tmp_path / "saved")
    trainer = distill(trainer_of(tmp_path, student), teacher=teacher, terms=[HiddenStates(), SampleEmbeddings()])
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["distill.hidden_states.loss"] > 0 and log["distill.sample_embeddings.loss"] > 0 and log["task_loss"] > 0
    trainer.save_model(str(tmp_path / "saved_student"))
    plain = sentences.SentenceTransformer(str(tmp_path / "saved_student"), device="cpu")
    texts = ["the cat sat", "a dog"]
    assert torch.allclose(plain.encode(texts, convert_to_tensor=True), student.encode(texts, convert_to_tensor=True))
    assert not any("distiller" in name for name in plain.state_dict())
    assert undistill(student) is student and type(student[0].auto_model).__mro__[1].__name__ != "Grafted"


def test_resuming_is_exact(tmp_path):
    def trained(name, **settings):
        student = embedder(tmp_path / name)
        trainer = trainer_of(tmp_path / name, student, max_steps=4, save_strategy="steps", save_steps=2)
        distill(trainer, teacher=embedder(tmp_path / "t", 32, seed=2), terms=[HiddenStates()])
        trainer.train(**settings)
        return dict(student.named_parameters())

    whole = trained("whole")
    again = trained("again", resume_from_checkpoint=str(tmp_path / "whole" / "out" / "checkpoint-2"))
    assert all(torch.equal(value, again[name]) for name, value in whole.items())


def test_adapters_in_it_and_its_base_as_the_teacher(tmp_path):
    peft = pytest.importorskip("peft")
    student = embedder(tmp_path / "s")
    student.add_adapter(peft.LoraConfig(r=2, target_modules=["query"], init_lora_weights=False))
    before = {name: p.detach().clone() for name, p in student.named_parameters()}
    trainer = distill(trainer_of(tmp_path, student), teacher="base", terms=[SampleEmbeddings()])
    trainer.train()
    changed = {name for name, value in before.items() if not torch.equal(dict(student.named_parameters())[name], value)}
    assert changed and all("lora_" in name for name in changed)
    assert trainer.state.log_history[0]["distill.sample_embeddings.loss"] > 0


def test_losses_that_run_the_model_afterwards_are_refused(tmp_path):
    from sentence_transformers import losses

    trainer = trainer_of(tmp_path, embedder(tmp_path / "s"), losses.CachedMultipleNegativesRankingLoss)
    distill(trainer, teacher=embedder(tmp_path / "t", seed=2), terms=[HiddenStates()])
    with pytest.raises(DistillError, match="compute_loss did not run the model; run it there to distil"):
        trainer.train()


def test_a_model_without_a_transformer_is_refused(tmp_path):
    from sentence_transformers import models

    student = sentences.SentenceTransformer(modules=[models.BoW(vocab=["cat"])], device="cpu")
    trainer = trainer_of(tmp_path, embedder(tmp_path / "s"))
    trainer.model = student
    with pytest.raises(WiringError, match="is a BoW, which holds no transformer to distil"):
        distill(trainer, teacher=nn.Linear(1, 1), terms=[HiddenStates()])
