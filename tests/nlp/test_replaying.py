"""Runs that are resumed within an epoch see the samples, and what is drawn for them, that one which never stopped sees."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch.utils.data import WeightedRandomSampler
from transformers import Trainer

from kdgraft_nlp import DistillTrainer, replaying
from support import nlp as support
from support.processes import found_by_two
from support.tensors import assert_same

STEPS = 7
"""Epochs of three steps: checkpoints lie within an epoch, at its end and before its last batch."""


def masking(features):
    """Pads, and replaces tokens that torch, numpy and ``random`` choose."""
    batch = support.collate(features)
    ids = batch["input_ids"]
    ids[torch.rand(ids.shape) < 0.2] = 3
    ids[:, np.random.randint(ids.shape[1])] = 4
    ids[random.randrange(len(ids))] = 2
    return batch


def transformed(samples):
    """A set whose samples are shuffled tokens, drawn anew whenever they are read."""

    def shuffled(batch):
        return {**batch, "input_ids": [random.sample(ids, len(ids)) for ids in batch["input_ids"]]}

    return Dataset.from_list(samples).with_transform(shuffled)


class Weighted(DistillTrainer):
    """Draws samples by weights, without a generator of its own."""

    def _get_train_sampler(self, train_dataset=None):
        return WeightedRandomSampler([1.0, 2.0, 3.0] * 4, 12)


UNSEEDED = dict(accelerator_config=dict(use_seedable_sampler=False))
CASES = {
    "grouped": dict(train_sampling_strategy="group_by_length"),
    "rebalanced": dict(train_sampling_strategy="batch_rebalance"),
    "unseeded": UNSEEDED,
    "weighted": dict(kind=Weighted),
    "masked": dict(collate=masking),
    "transformed": dict(data=transformed),
    "all": dict(train_sampling_strategy="group_by_length", collate=masking, gradient_accumulation_steps=2),
    "in workers": dict(train_sampling_strategy="group_by_length", dataloader_num_workers=1),
    "smaller last batch": dict(collate=masking, per_device_train_batch_size=5, **UNSEEDED),
}


def trainer(
    folder, kind=DistillTrainer, terms=("SoftTargets", "HiddenStates"), collate=support.collate, data=list, **told
):
    given = dict(teacher=support.model("bert", 32, 1, seed=2), terms=list(terms)) if terms else {}
    settings = dict(max_steps=STEPS, save_strategy="steps", save_steps=1, eval_strategy="steps", eval_steps=2)
    return kind(
        model=support.model("bert", layers=1, seed=1),
        args=support.arguments(folder, **settings, **told),
        train_dataset=data(support.samples(12)),
        eval_dataset=support.samples(6),
        data_collator=collate,
        **given,
    )


@pytest.mark.parametrize("case", list(CASES))
def test_wherever_a_run_stops_it_ends_like_one_that_never_did(case, tmp_path):
    whole = trainer(tmp_path, **CASES[case])
    whole.train()
    for stop in (1, 2, 3, 5) if case != "in workers" else (4,):
        again = trainer(tmp_path / "again", **CASES[case])
        again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{stop}"))
        assert again.state.global_step == STEPS
        assert_same(again.model.state_dict(), whole.model.state_dict())


def test_a_run_that_is_stopped_twice_in_an_epoch(tmp_path):
    told = dict(train_sampling_strategy="group_by_length", collate=masking, per_device_train_batch_size=2)
    whole = trainer(tmp_path / "whole", **told)
    whole.train()
    trainer(tmp_path / "run", **told).train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    again = trainer(tmp_path / "again", **told)
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    assert_same(again.model.state_dict(), whole.model.state_dict())


@pytest.mark.parametrize("case", ["grouped", "all", "transformed"])
def test_without_terms_the_plain_trainer_sees_the_same(case, tmp_path):
    ends = []
    for kind in (DistillTrainer, Trainer):
        done = trainer(tmp_path, kind, terms=(), **CASES[case])
        done.train()
        ends.append(done.model.state_dict())
    assert_same(*ends)


def test_a_checkpoint_without_the_record_resumes_as_in_the_host(tmp_path):
    trainer(tmp_path, Trainer, terms=()).train()
    assert "data" not in torch.load(tmp_path / "checkpoint-2" / "rng_state.pth", weights_only=False)
    ends = []
    for kind in (DistillTrainer, Trainer):
        again = trainer(tmp_path / "again", kind, terms=(), train_sampling_strategy="group_by_length")
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
        ends.append(again.model.state_dict())
    assert_same(*ends)


def test_the_plain_trainer_resumes_from_a_checkpoint_with_the_record(tmp_path):
    trainer(tmp_path, terms=()).train()
    again = trainer(tmp_path / "again", Trainer, terms=())
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert again.state.global_step == STEPS


def test_data_that_is_skipped_on_purpose_is_not_drawn_again(tmp_path):
    told = dict(train_sampling_strategy="group_by_length", ignore_data_skip=True)
    trainer(tmp_path, terms=(), **told).train()
    ends = []
    for kind in (DistillTrainer, Trainer):
        again = trainer(tmp_path / "again", kind, terms=(), **told)
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
        ends.append(again.model.state_dict())
    assert_same(*ends)


@pytest.mark.parametrize("strategy", ["random", "group_by_length"])
def test_two_processes(strategy, tmp_path):
    for found in found_by_two("replaying_ranks", tmp_path, strategy, str(tmp_path), host="transformers"):
        assert_same(found["again"], found["whole"])


def test_a_loop_of_ones_own_keeps_no_state_for_each_batch(tmp_path, monkeypatch):
    monkeypatch.setattr(replaying, "AHEAD", 2)
    made = trainer(tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=4, collate=masking)
    loader = made.get_train_dataloader()
    assert len(list(loader)) == 12
    assert len(loader.batch_sampler.record()["ahead"]) == 2
    made.train()
    again = trainer(tmp_path / "again", per_device_train_batch_size=1, gradient_accumulation_steps=4, collate=masking)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_same(again.model.state_dict(), made.model.state_dict())
