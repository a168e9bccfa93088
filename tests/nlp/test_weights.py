"""Weights of samples and tokens in the host's own loss and in terms on predictions."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from kdgraft import DistillError
from kdgraft.sources import Peer
from kdgraft_nlp import DistillCollator, DistillTrainer, distill
from support import nlp as support
from support.tensors import gradients

PER_SAMPLE = [0.5, 2.0, 0.0, 1.0]


def samples(kind, count=12):
    """Samples with a column of weights, per sample or per token; ``"one"`` has the weight 1 everywhere."""
    found = support.samples(count, "causal")
    draw = torch.Generator().manual_seed(0)
    for i, sample in enumerate(found):
        of_tokens = (torch.rand(len(sample["input_ids"]), generator=draw) * 2).tolist()
        sample["how much"] = {"sample": PER_SAMPLE[i % 4], "token": of_tokens, "one": 1.0}[kind]
    return found


def trainer_of(folder, data, terms=("ForwardKL",), kind=DistillTrainer, weights="how much", student=None, **settings):
    more = {
        name: settings.pop(name) for name in ("chunked", "teacher", "on_policy", "data_collator") if name in settings
    }
    told = dict(max_steps=3, learning_rate=0.1, optim="sgd", remove_unused_columns=False)
    return kind(
        model=support.quiet(support.model("llama", seed=1)) if student is None else student,
        args=support.arguments(folder, **{**told, **settings}),
        train_dataset=data,
        **{"data_collator": support.collate, "teacher": support.model("llama", 32, 4, seed=2), **more},
        terms=list(terms),
        weights=weights,
    )


@pytest.mark.parametrize("kind", ["sample", "token"])
def test_loss_and_gradient_by_hand(kind, tmp_path):
    """Σ w·(cross-entropy + KL) / Σ w over the labelled tokens."""
    data = samples(kind)[:4]
    trainer = trainer_of(tmp_path, data)
    batch = trainer.data_collator(data)
    loss = trainer.compute_loss(trainer.model.train(), dict(batch))
    loss.backward()
    student, teacher = support.model("llama", seed=1).train(), support.model("llama", 32, 4, seed=2).eval()
    support.quiet(student)
    whole = count = 0.0
    for sample in data:
        ids, labels = (torch.tensor([sample[name]]) for name in ("input_ids", "labels"))
        given = torch.tensor(sample["how much"]).expand(ids.shape[1])[1:]
        ours = student(ids).logits[0, :-1].log_softmax(-1)
        with torch.no_grad():
            theirs = teacher(ids).logits[0, :-1].log_softmax(-1)
        kl = F.kl_div(ours, theirs, log_target=True, reduction="none").sum(-1)
        whole = whole + (given * (F.nll_loss(ours, labels[0, 1:], reduction="none") + kl)).sum()
        count += float(given.sum())
    expected = whole / count
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    for name, value in gradients(student).items():
        torch.testing.assert_close(gradients(trainer.model)[name], value, rtol=1e-4, atol=1e-6, msg=name)


def close(one, other, key="loss"):
    for name, value in one.model.named_parameters():
        found = dict(other.model.named_parameters())[name]
        torch.testing.assert_close(found, value, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    for name, value in one.state.log_history[0].items():
        if "loss" in name:
            assert other.state.log_history[0][name] == pytest.approx(value, rel=1e-4), name


TERMS = [dict(type="SoftTargets", hard_weight=0.3), dict(type="GeneralizedJSD", tokens="valid"), "DKD"]


@pytest.mark.parametrize("kind", ["sample", "token"])
def test_chunks_parts_and_whole_logits_agree(kind, tmp_path):
    runs = []
    for chunked, parts in ((False, 1), (3, 1), (3, 2), (False, 2)):
        told = dict(per_device_train_batch_size=4 // parts, gradient_accumulation_steps=parts)
        trainer = trainer_of(tmp_path, samples(kind), TERMS, chunked=chunked, seed=3, **told)
        trainer._get_train_sampler = lambda *_, t=trainer: torch.utils.data.SequentialSampler(t.train_dataset)
        trainer.train()
        runs.append(trainer)
    for other in runs[1:]:
        close(runs[0], other)


@pytest.mark.parametrize("chunked", [False, 3])
def test_equal_weights_are_none(chunked, tmp_path):
    ones, none = (
        trainer_of(tmp_path, samples("one"), TERMS, weights=told, chunked=chunked) for told in ("how much", None)
    )
    for one in (ones, none):
        one.train_dataset = samples("one") if one is ones else support.samples(12, "causal")
        one.train()
    close(none, ones)


def test_distill_takes_them_and_a_collator_that_has_them(tmp_path):
    collator = DistillCollator(support.collate, weights="how much")
    found = collator(samples("sample")[:3])["token_weights"]
    assert found[0, :3].eq(0.5).all() and found[1, :4].eq(2).all() and not found[2].any() and not found[0, 3:].any()
    from transformers import Trainer

    told = dict(max_steps=2, remove_unused_columns=False)
    args = dict(args=support.arguments(tmp_path, **told), train_dataset=samples("sample"), data_collator=collator)
    trainer = Trainer(model=support.model("llama", seed=1), eval_dataset=support.samples(4, "causal"), **args)
    distill(trainer, teacher=support.model("llama", seed=2), terms=["ForwardKL"], weights="how much")
    trainer.train()
    assert trainer.data_collator is collator and "eval_loss" in trainer.evaluate()


def test_refused(tmp_path):
    def made(data=None, **settings):
        return trainer_of(tmp_path, samples("token") if data is None else data, **settings)

    for settings, said in (
        (dict(terms=["HiddenStates"]), "hidden_states does not compare predictions token by token"),
        (dict(terms=["UniversalLogits"]), "universal_logits does not compare predictions token by token"),
        (dict(terms=[]), "weights is for distillation only"),
        (dict(weights=3), "weights must be the name of a column"),
        (dict(label_smoothing_factor=0.1), "this trainer computes another"),
        (dict(teacher=Peer(support.model("llama", seed=2))), "'teacher' trains on a loss of its own"),
        (
            dict(on_policy=dict(share=0.5, max_new_tokens=4, eos_token_id=2)),
            "texts that the student writes have no weights",
        ),
        (dict(data_collator=DistillCollator(support.collate, weights="other")), "the collator has those of 'other'"),
        (dict(student=support.model("bert"), teacher=support.model("bert", seed=2), terms=["SoftTargets"]), "task is"),
    ):
        with pytest.raises(DistillError, match=said):
            made(**settings)
    for value, said in (
        ([1.0], "1 weights for 3 tokens"),
        (-1.0, "must be finite numbers >= 0"),
        (float("inf"), "finite"),
    ):
        data = samples("token")
        data[0]["how much"] = value
        with pytest.raises(DistillError, match=said):
            made().data_collator(data[:2])
    with pytest.raises(DistillError, match="no column 'how much' for weights in the training set"):
        made(support.samples(8, "causal")).train()


class Twice(type(support.model("llama"))):
    def forward(self, input_ids=None, attention_mask=None, labels=None, **inputs):
        found = super().forward(input_ids, attention_mask, labels=labels, **inputs)
        found.loss = None if found.loss is None else 2 * found.loss
        return found


def test_a_loss_that_is_another_is_refused(tmp_path):
    student = Twice(support.model("llama").config)
    with pytest.raises(DistillError, match="Twice has another loss; leave out weights"):
        trainer_of(tmp_path, samples("token"), student=student).train()
