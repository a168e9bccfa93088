"""``teacher="base"``: the student's own model without its adapters teaches it, without a second copy."""

from __future__ import annotations

import copy

import pytest
import torch

from kdgraft import DistillError
from kdgraft_nlp import DistillTrainer
from kdgraft_nlp.adapters import adapter_layers, adapters_off
from kdgraft_nlp.student import graft
from support import nlp as support
from support.tensors import gradients

peft = pytest.importorskip("peft")


def wrapped(family="llama", **settings):
    """A model with adapters that do something already."""
    built = support.quiet(support.model(family, 16, 2, seed=1))
    targets = ["q_proj", "v_proj"] if family == "llama" else ["query", "value"]
    told = {**dict(r=4, target_modules=targets, init_lora_weights=False), **settings}
    torch.manual_seed(3)
    return peft.get_peft_model(built, peft.LoraConfig(**told))


def added(family="llama", **settings):
    """The same with transformers' own ``add_adapter``."""
    built = support.quiet(support.model(family, 16, 2, seed=1))
    torch.manual_seed(3)
    built.add_adapter(peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, **settings))
    return built


def copy_of_base(family="llama"):
    """The base model as a teacher of its own; PEFT's ``unload`` would keep modules that were trained as a whole."""
    return support.quiet(support.model(family, 16, 2, seed=1))


TERMS = {
    "layers": ["HiddenStates", "AttentionMaps"],
    "logits": ["ForwardKL", dict(type="GeneralizedJSD", beta=0.5, weight=0.5)],
    "both": ["Relations", "ReverseKL"],
}


@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize("chunk", [None, 3])
@pytest.mark.parametrize("make", [wrapped, added], ids=["get_peft_model", "add_adapter"])
def test_it_teaches_as_a_copy_does(make, chunk, terms):
    found = []
    for teacher in ("base", None):
        student = make()
        given = copy_of_base() if teacher is None else teacher
        torch.manual_seed(0)
        grafted = graft(student, given, TERMS[terms], chunk=chunk)
        model = grafted.base_model.model if make is wrapped else grafted
        output = grafted.train()(**support.collate(support.samples(4, "causal")))
        losses = {key: value for key, value in model.distill_link.last.losses.items() if key.endswith(".loss")}
        (output.loss + sum(losses.values())).backward()
        found.append((losses, gradients(grafted)))
        assert not any(layer.disable_adapters for layer in adapter_layers(model))
        assert all(module.training for module in model.modules())
    (ours, mine), (theirs, others) = found
    assert ours.keys() == theirs.keys() and mine.keys() == others.keys()
    for key in ours:
        torch.testing.assert_close(ours[key], theirs[key])
        assert ours[key] > 0
    for key in mine:
        torch.testing.assert_close(mine[key], others[key], rtol=1e-4, atol=1e-6)


def test_no_second_copy_and_the_same_parameters_are_trained(tmp_path):
    student = wrapped()
    student.base_model.model.model.layers[0].self_attn.q_proj.lora_A.requires_grad_(False)
    before = {name: p.requires_grad for name, p in student.named_parameters()}
    weights = {name: p.detach().clone() for name, p in student.named_parameters()}
    trainer = DistillTrainer(
        model=student,
        teacher="base",
        terms=["ForwardKL", "HiddenStates"],
        args=support.arguments(tmp_path),
        train_dataset=support.samples(12, "causal"),
        data_collator=support.collate,
    )
    source = trainer.distiller.teacher
    assert source.model is student.base_model.model
    trainer.train()
    after = {name: p for name, p in student.named_parameters() if "distiller" not in name}
    assert {name: p.requires_grad for name, p in after.items()} == before
    changed = {name for name, p in after.items() if not torch.equal(p, weights[name])}
    assert changed == {name for name, wanted in before.items() if wanted}


def test_modules_that_are_trained_as_a_whole_have_their_originals_in_the_teacher():
    """Also where the loss comes in chunks, from the weights of an output layer that is trained as a whole."""
    student = wrapped(modules_to_save=["lm_head"])
    with torch.no_grad():
        student.base_model.model.lm_head.modules_to_save["default"].weight.mul_(1.5)
    other = copy_of_base()
    batch = support.collate(support.samples(4, "causal"))
    losses = []
    for teacher, chunk in (("base", None), (other, None), ("base", 3), (other, 3)):
        one = copy.deepcopy(student)
        graft(one, teacher, ["ForwardKL"], chunk=chunk)
        one.train()(**batch)
        losses.append(one.base_model.model.distill_link.last.losses["distill.forward_kl.loss"].detach())
    assert losses[0] > 0
    for loss in losses[1:]:
        torch.testing.assert_close(loss, losses[0])


def test_a_classifier_learns_from_its_base():
    student = wrapped("bert", task_type="SEQ_CLS")  # its head is trained as a whole
    other = copy_of_base("bert")
    losses = []
    for teacher in ("base", other):
        one = copy.deepcopy(student)
        graft(one, teacher, ["SoftTargets"])
        one.train()(**support.collate(support.samples(4)))
        losses.append(one.base_model.model.distill_link.last.losses["distill.soft_targets.loss"].detach())
    torch.testing.assert_close(*losses)


def test_an_error_in_its_pass_leaves_the_adapters_on():
    student = wrapped()
    with pytest.raises(RuntimeError, match="stop"), adapters_off(student):
        raise RuntimeError("stop")
    assert not any(layer.disable_adapters for layer in adapter_layers(student))


def test_resuming_is_exact(tmp_path):
    def trained(folder, **settings):
        trainer = DistillTrainer(
            model=wrapped(),
            teacher="base",
            terms=["ForwardKL"],
            args=support.arguments(folder, save_strategy="steps", save_steps=2),
            train_dataset=support.samples(12, "causal"),
            data_collator=support.collate,
        )
        trainer.train(**settings)
        return dict(trainer.model.named_parameters())

    whole = trained(tmp_path / "whole")
    again = trained(tmp_path / "again", resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert all(torch.equal(value, again[name]) for name, value in whole.items())


def test_what_has_no_base_is_refused(tmp_path):
    merged, trained = wrapped(), wrapped()
    merged.merge_adapter()
    trained.base_model.model.model.norm.weight.requires_grad_(True)
    for student, said in (
        (support.model("llama"), r"LlamaForCausalLM has none; add some with peft\.get_peft_model"),
        (merged, "the adapters are merged into the weights"),
        (trained, r"weights of the base model are trained as well \(model\.norm\.weight\)"),
        (wrapped("bert", bias="all"), "weights of the base model are trained as well"),
    ):
        with pytest.raises(DistillError, match=said):
            graft(student, "base", ["HiddenStates"])
    with pytest.raises(DistillError, match="the student has the layers of its own base already"):
        graft(wrapped(), "base", ["ForwardKL"], init_from=[0, 1])
