"""``distill`` around TRL's SFTTrainer, whose forward computes the loss without logits."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlamaForCausalLM

from kdgraft import Ensemble, WiringError
from kdgraft_nlp import ForwardKL, GeneralizedJSD, HiddenStates, distill, undistill
from support import nlp as support
from support.sft import chats, first_batch, model, step, teacher, texts, trainer_of
from support.tensors import gradients

pytest.importorskip("trl")
peft = pytest.importorskip("peft")


def by_hand(student, taught, batch, beta=None):
    """Cross-entropy and forward KL, both the mean over the tokens that predict a labelled one, of two plain models."""
    student, taught = copy.deepcopy(student).train(), copy.deepcopy(taught).eval()
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask") if name in batch}
    targets = batch["labels"][:, 1:]
    counted = targets != -100
    ours = student(**inputs).logits[:, :-1][counted].log_softmax(-1)
    with torch.no_grad():
        theirs = taught(**inputs).logits[:, :-1][counted].log_softmax(-1)
    hard, kl = F.nll_loss(ours, targets[counted]), F.kl_div(ours, theirs, log_target=True, reduction="batchmean")
    (hard + kl).backward()
    return (hard + kl).detach(), kl.detach(), gradients(student)


def close(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("data", ["chats", "texts"])
def test_loss_and_gradient_by_hand(tmp_path, data):
    trainer = trainer_of(tmp_path, {"chats": chats, "texts": texts}[data]())
    batch, other = first_batch(trainer), teacher()
    distill(trainer, teacher=other, terms=[ForwardKL()])
    loss, found = step(trainer, batch)
    whole, kl, expected = by_hand(model(), other, batch)
    if data == "chats":
        assert (batch["labels"] == -100).sum() > (batch["attention_mask"] == 0).sum()  # prompts are masked
    torch.testing.assert_close(loss, whole, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(trainer.model.distill_link.last.losses["distill.forward_kl.loss"], kl)
    close(found, expected)


def test_no_logits_are_computed(tmp_path):
    trainer = trainer_of(tmp_path)
    distill(trainer, teacher=teacher(), terms=[ForwardKL(), HiddenStates()])
    called = []
    for one in (trainer.model, trainer.model.distiller.teacher.model):
        one.lm_head.register_forward_hook(lambda *_: called.append(1))
    batch = first_batch(trainer)
    step(trainer, batch)
    assert not called


@pytest.mark.parametrize("packing", ["packed", "padding-free"])
def test_packed_batches_are_padded_ones(tmp_path, packing):
    settings = dict(packing=True) if packing == "packed" else dict(padding_free=True)
    student, other = model(), teacher()
    student.config.use_cache = False
    found = []
    for told in ({}, settings):
        trainer = trainer_of(
            tmp_path, texts(4), copy.deepcopy(student), max_length=256 if packing == "packed" else None, **told
        )
        terms = [ForwardKL(), HiddenStates(), GeneralizedJSD(beta=0.3, weight=0.5)]
        distill(trainer, teacher=copy.deepcopy(other), terms=terms)
        batch = first_batch(trainer)
        assert ("attention_mask" in batch) == (not told)
        found.append((batch["labels"][:, 1:].ne(-100).sum(), *step(trainer, batch)))
    assert found[0][0] == found[1][0]
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-4, atol=1e-5)
    for name, value in found[0][2].items():
        torch.testing.assert_close(found[1][2][name], value, rtol=1e-3, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_parts_of_a_batch_add_up(tmp_path):
    runs = []
    for size, parts in ((8, 1), (2, 4)):
        trainer = trainer_of(
            tmp_path,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=parts,
            max_steps=2,
            optim="sgd",
            learning_rate=0.05,
            shuffle_dataset=False,
        )
        distill(trainer, teacher=teacher(), terms=[ForwardKL(), HiddenStates()])
        trainer.train()
        runs.append((trainer.state.log_history, dict(trainer.model.named_parameters())))
    close(runs[1][1], {name: value.detach() for name, value in runs[0][1].items()})
    for key in ("loss", "task_loss", "distill.forward_kl.loss", "distill.hidden_states.loss"):
        assert runs[0][0][0][key] == pytest.approx(runs[1][0][0][key], rel=1e-4), key


def test_the_trainer_stays_an_sft_trainer(tmp_path):
    trainer = trainer_of(tmp_path, eval_data=chats(4), eval_strategy="steps", eval_steps=3)
    distill(trainer, teacher=teacher(), terms=[ForwardKL()])
    trainer.train()
    log = {key: value for entry in trainer.state.log_history for key, value in entry.items()}
    for key in ("mean_token_accuracy", "entropy", "num_tokens", "eval_loss", "eval_mean_token_accuracy", "task_loss"):
        assert key in log
    assert log["distill.forward_kl.loss"] > 0
    trainer.save_model(tmp_path / "student")
    saved = LlamaForCausalLM.from_pretrained(tmp_path / "student")
    batch = first_batch(trainer)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        torch.testing.assert_close(saved(**inputs).logits, trainer.model.eval()(**inputs).logits)


def test_without_the_distiller_it_trains_as_before(tmp_path):
    plain, taken = trainer_of(tmp_path), trainer_of(tmp_path)
    distill(taken, teacher=teacher(), terms=[ForwardKL()])
    undistill(taken.model)
    plain.train()
    taken.train()
    close(dict(taken.model.named_parameters()), {n: p.detach() for n, p in plain.model.named_parameters()})


@pytest.mark.parametrize("terms", [["ForwardKL"], ["HiddenStates"], ["AttentionMaps", "ForwardKL"]])
def test_lora(tmp_path, terms):
    adapters = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    student = peft.get_peft_model(model(), adapters)
    merged = copy.deepcopy(student).merge_and_unload().requires_grad_(True)
    trainer = trainer_of(tmp_path, student=student)
    other, batch = teacher(), first_batch(trainer)
    distill(trainer, teacher=other, terms=terms)
    loss, found = step(trainer, batch)
    assert found and all("lora_" in name for name in found if "distiller" not in name)
    if terms == ["ForwardKL"]:
        torch.testing.assert_close(loss, by_hand(merged, other, batch)[0], rtol=1e-5, atol=1e-6)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    changed = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
    assert changed and all("lora_" in name or "distiller" in name for name in changed)
    trainer.save_model(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


def test_lora_learns_from_its_own_base(tmp_path):
    adapters = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    student = peft.get_peft_model(model(), adapters)
    merged = copy.deepcopy(student).merge_and_unload().requires_grad_(True)
    trainer = trainer_of(tmp_path, student=student)
    batch = first_batch(trainer)
    distill(trainer, teacher="base", terms=[ForwardKL()])
    loss, _ = step(trainer, batch)
    whole, kl, _ = by_hand(merged, model(), batch)
    torch.testing.assert_close(loss, whole, rtol=1e-5, atol=1e-6)
    assert kl > 0
    trainer.train()
    assert trainer.state.log_history[0]["distill.forward_kl.loss"] > 0


def test_interrupted_training_resumes_exactly(tmp_path):
    def trained(folder, **settings):
        trainer = trainer_of(folder, max_steps=4, save_strategy="steps", save_steps=2)
        distill(trainer, teacher=teacher(), terms=[ForwardKL(), HiddenStates()])
        trainer.train(**settings)
        return dict(trainer.model.named_parameters())

    whole = trained(tmp_path / "whole")
    again = trained(tmp_path / "again", resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert all(torch.equal(value, again[name]) for name, value in whole.items())


@pytest.mark.parametrize("settings", [dict(loss_type="dft"), dict(label_smoothing_factor=0.1)])
def test_other_losses_of_the_trainer_stay_its_own(tmp_path, settings):
    plain, taken = trainer_of(tmp_path, **settings), trainer_of(tmp_path, **settings)
    distill(taken, teacher=teacher(), terms=[ForwardKL()])
    batch = first_batch(plain)
    items = (batch["labels"] != -100).sum()
    own, _ = step(plain, batch, items)
    loss, _ = step(taken, batch, items)
    kl = taken.model.distill_link.last.losses["distill.forward_kl.loss"]
    torch.testing.assert_close(loss - kl, own, rtol=1e-5, atol=1e-6)
    assert kl > 0


def test_terms_that_need_whole_logits_are_refused(tmp_path):
    for terms, said in (
        (
            ["UniversalLogits"],
            "universal_logits needs whole logits, which a trainer without logits, such as SFTTrainer",
        ),
        ([dict(type="ForwardKL", weight="auto")], "weight='auto' needs whole losses"),
    ):
        trainer = trainer_of(tmp_path)
        forward = trainer.model.forward
        with pytest.raises(WiringError, match=said):
            distill(trainer, teacher=teacher(), terms=terms)
        assert trainer.model.forward == forward and "distiller" not in dict(trainer.model.named_modules())


def test_several_teachers_teach_layers(tmp_path):
    trainer = trainer_of(tmp_path)
    teachers = dict(a=teacher(), b=model(32, 4, seed=3))
    terms = [dict(type="HiddenStates", source="a"), dict(type="AttentionMaps", source="b")]
    distill(trainer, teachers=teachers, terms=terms)
    trainer.train()
    assert any("distill.attention_maps.loss" in entry for entry in trainer.state.log_history)


@pytest.mark.parametrize("mean", ["arithmetic", "geometric"])
def test_several_teachers_of_logits_by_hand(tmp_path, mean):
    """KL to each of two teachers, and to the mean of what they predict."""
    trainer, taught = trainer_of(tmp_path), dict(a=teacher(), b=model(24, 3, seed=3))
    batch = first_batch(trainer)
    terms = [dict(type="ForwardKL", source=name, name=f"to_{name}") for name in ("a", "b", "both")]
    distill(trainer, teachers={**taught, "both": Ensemble(["a", "b"], mean, [1, 3])}, terms=terms)
    loss, found = step(trainer, batch)
    student, counted = model().train(), batch["labels"][:, 1:] != -100
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}

    def logs(one):
        return one(**inputs).logits[:, :-1][counted].log_softmax(-1)

    with torch.no_grad():
        a, b = (logs(one.eval()) for one in taught.values())
        both = (a.exp() / 4 + 3 * b.exp() / 4).log() if mean == "arithmetic" else (a / 4 + 3 * b / 4).log_softmax(-1)
    ours = logs(student)
    divergences = [F.kl_div(ours, one, log_target=True, reduction="batchmean") for one in (a, b, both)]
    whole = F.nll_loss(ours, batch["labels"][:, 1:][counted]) + sum(divergences)
    whole.backward()
    torch.testing.assert_close(loss, whole.detach(), rtol=1e-5, atol=1e-6)
    close(found, gradients(student))
    said = trainer.model.distill_link.last.losses
    for term, value in zip(terms, divergences, strict=True):
        torch.testing.assert_close(said[f"distill.{term['name']}.loss"], value.detach(), rtol=1e-5, atol=1e-6)


def test_the_student_writes_texts_itself(tmp_path):
    trainer = trainer_of(tmp_path, max_steps=2)
    told = dict(share=1.0, max_new_tokens=4, eos_token_id=[])
    distill(trainer, teacher=teacher(), recipe="gkd", on_policy=told)
    trainer.train()
    first = trainer.state.log_history[0]
    assert first["on_policy.fraction"] == 1 and first["distill.generalized_jsd.loss"] > 0
    assert first["loss"] == pytest.approx(first["distill.generalized_jsd.loss"], rel=1e-4)


def test_a_forward_that_is_replaced_otherwise_is_the_student_s(tmp_path):
    student = support.model("bert", seed=1)
    own, called = student.forward, []

    def forward(*args, **inputs):
        called.append(1)
        return own(*args, **inputs)

    student.forward = forward
    from kdgraft_nlp.student import graft

    graft(student, support.model("bert", seed=2), ["SoftTargets"])
    called.clear()
    student.train()(**support.collate(support.samples(4)))
    assert called and student.distill_link.last.losses["distill.soft_targets.loss"] > 0
    assert not isinstance(undistill(student).forward, nn.Module) and student.forward is forward
