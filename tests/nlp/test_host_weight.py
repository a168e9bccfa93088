"""The host's own loss: its share, and none where the batches have no labels."""

from __future__ import annotations

import logging

import pytest
import torch
import torch.nn.functional as F
from transformers import Trainer

from kdgraft import DistillError
from kdgraft_nlp import DistillTrainer, ForwardKL, HiddenStates, SoftTargets, distill
from kdgraft_nlp.student import graft
from support import nlp as support
from support.tensors import gradients


def trainer_of(folder, terms, family="bert", kind="", task="", more=None, data=None, **settings):
    """A trainer that has not trained; students without dropout."""
    more = dict(teacher=support.model(family, 32, 4, seed=2, kind=kind), terms=terms) if more is None else more
    return (DistillTrainer if more else Trainer)(
        model=support.quiet(support.model(family, seed=1, kind=kind)),
        args=support.arguments(folder, **{"optim": "sgd", "learning_rate": 0.1, "max_steps": 2, **settings}),
        train_dataset=data if data is not None else support.samples(8, task or support.TASKS[family][1]),
        data_collator=support.collate,
        **more,
    )


def entries(trainer, key):
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def test_general_distillation_by_hand(tmp_path, caplog):
    """BertModel learns from BertModel on text alone."""
    models = [support.quiet(support.model("bert", 16, 2, seed=seed, kind="BertModel")).eval() for seed in (1, 2)]
    batch = support.collate(support.samples(4, "none"))
    # By hand: the squared error of the last layer's states, mean over channels and real tokens.
    real = batch["attention_mask"].bool()
    student, teacher = (model(**batch).last_hidden_state[real] for model in models)
    by_hand = F.mse_loss(student, teacher.detach())
    by_hand.backward()
    expected = gradients(models[0])
    models[0].zero_grad()

    term = HiddenStates(layers="final", adapter="none")
    trainer = DistillTrainer(
        model=models[0],
        teacher=models[1],
        terms=[term],
        args=support.arguments(tmp_path, max_steps=1),
        train_dataset=support.samples(4, "none"),
        data_collator=support.collate,
    )
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            loss = trainer.compute_loss(trainer.model.train(), dict(batch))
    assert [r.message for r in caplog.records if "the batches have no labels" in r.message].__len__() == 1
    torch.testing.assert_close(loss.detach(), by_hand.detach())
    loss.backward()
    for name, parameter in trainer.model.named_parameters():
        gradient = expected.get(name, torch.zeros_like(parameter))
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6)
    # Said to be meant, nothing is said.
    for meant in (dict(terms=["HiddenStates"], host_weight=0), dict(terms=["HiddenStates", "TaskShare"])):
        caplog.clear()
        more = dict(teacher=support.model("bert", 32, 4, seed=2, kind="BertModel"), **meant)
        quiet = trainer_of(tmp_path, [], kind="BertModel", task="none", more=more)
        quiet.train()
        assert not [r for r in caplog.records if "labels" in r.message]
        assert entries(quiet, "task_loss") == [0.0, 0.0]
        assert entries(quiet, "loss") == pytest.approx(entries(quiet, "distill.hidden_states.loss"), rel=1e-4)


@pytest.mark.parametrize("family", ["bert", "llama", "vit"])
def test_a_model_with_a_loss_does_without_labels_too(family, tmp_path):
    data = [{k: v for k, v in s.items() if k != "labels"} for s in support.samples(8, support.TASKS[family][1])]
    trainer = trainer_of(tmp_path, ["SoftTargets"], family, data=data, gradient_accumulation_steps=2)
    trainer.train()
    assert entries(trainer, "task_loss") == [0.0, 0.0]
    assert all(value > 0 for value in entries(trainer, "distill.soft_targets.loss"))


@pytest.mark.parametrize("weight", [0, 0.25, 3])
@pytest.mark.parametrize("family", ["bert", "llama", "chunked"])
def test_the_share_of_the_host_by_hand(family, weight, tmp_path):
    chunked, family = (3, "llama") if family == "chunked" else (False, family)
    student = support.quiet(support.model(family, seed=1))
    teacher = support.model(family, 32, 4, seed=2).eval()
    batch = support.collate(support.samples(4, support.TASKS[family][1]))
    output = student(**batch)
    if family == "bert":
        ours, theirs = output.logits, teacher(**batch).logits.detach()
    else:
        counted = batch["labels"][:, 1:] != -100
        ours, theirs = (x[:, :-1][counted] for x in (output.logits, teacher(**batch).logits.detach()))
    kl = F.kl_div(ours.log_softmax(-1), theirs.log_softmax(-1), log_target=True, reduction="batchmean")
    (weight * output.loss + kl).backward()
    expected = gradients(student)
    student.zero_grad()

    trainer = Trainer(model=student, args=support.arguments(tmp_path))
    term = SoftTargets(temperature=1) if family == "bert" else ForwardKL()
    distill(trainer, teacher=teacher, terms=[term], host_weight=weight, chunked=chunked)
    loss = trainer.compute_loss(student.train(), dict(batch))
    torch.testing.assert_close(loss.detach(), (weight * output.loss + kl).detach())
    loss.backward()
    for name, gradient in expected.items():
        torch.testing.assert_close(student.get_parameter(name).grad, gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("share", [0, 0.25])
@pytest.mark.parametrize("family", ["bert", "llama", "chunked"])
def test_a_share_that_a_term_leaves_counts_as_the_weight_does(family, share, tmp_path):
    chunked, family = (3, "llama") if family == "chunked" else (False, family)
    batch = support.collate(support.samples(4, support.TASKS[family][1]))
    found = []
    for terms, weight in (([], share), ([dict(type="TaskShare", share=share)], 1)):
        trainer = Trainer(model=support.quiet(support.model(family, seed=1)), args=support.arguments(tmp_path))
        teacher = support.model(family, 32, 4, seed=2)
        distill(trainer, teacher=teacher, terms=["ForwardKL", *terms], host_weight=weight, chunked=chunked)
        loss = trainer.compute_loss(trainer.model.train(), dict(batch))
        loss.backward()
        found.append((loss.detach(), gradients(trainer.model)))
    torch.testing.assert_close(*(loss for loss, _ in found))
    assert found[0][1].keys() == found[1][1].keys()
    for name, gradient in found[0][1].items():
        torch.testing.assert_close(found[1][1][name], gradient)


def test_a_loss_that_is_not_finite_has_no_part_at_weight_0(tmp_path):
    class Infinite(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            output = model(**inputs)
            return (output.loss * torch.inf, output) if return_outputs else output.loss * torch.inf

    trainer = Infinite(model=support.model("bert", seed=1), args=support.arguments(tmp_path))
    distill(trainer, teacher=support.model("bert", seed=2), terms=["SoftTargets"], host_weight=0)
    loss = trainer.compute_loss(support.quiet(trainer.model.train()), support.collate(support.samples(4)))
    torch.testing.assert_close(loss, trainer.model.distill_link.last.losses["distill.soft_targets.loss"])
    assert loss > 0


def test_refused(tmp_path):
    teacher = support.model("bert", 32, 4, seed=2)
    for weight in (-1, "1", float("nan"), True):
        with pytest.raises(DistillError, match="host_weight: the host's share must be a number >= 0"):
            trainer_of(tmp_path, [], more=dict(teacher=teacher, terms=["SoftTargets"], host_weight=weight))
    with pytest.raises(DistillError, match="host_weight is for distillation only; give terms or a recipe"):
        trainer_of(tmp_path, [], more=dict(teacher=teacher, terms=[], host_weight=0.5))
    # The output of a graft without a trainer has no loss of its own either.
    student = graft(support.model("bert", seed=1, kind="BertModel"), teacher, ["HiddenStates"]).train()
    assert student(**support.collate(support.samples(2, "none"))).loss == 0
