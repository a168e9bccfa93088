"""Students and teachers under PEFT's wrapper: as their base models, adapters included."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaForCausalLM, Trainer

from kdgraft import DistillError, WiringError
from kdgraft_nlp import DistillTrainer, ForwardKL, SoftTargets, undistill
from kdgraft_nlp.student import graft
from support import nlp as support

peft = pytest.importorskip("peft")


def wrapped(family="llama", width=16, layers=2, seed=1, **settings):
    """A model with LoRA whose adapters do something already."""
    built = support.quiet(support.model(family, width, layers, seed=seed))
    targets = ["q_proj", "v_proj"] if family == "llama" else ["query", "value"]
    return peft.get_peft_model(built, peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False, **settings))


def merged(model):
    """The plain model that a wrapped one stands for."""
    return copy.deepcopy(model).merge_and_unload().eval()


def trained_gradients(model):
    return {
        name.removeprefix("base_model.model."): p.grad for name, p in model.named_parameters() if p.grad is not None
    }


@pytest.mark.parametrize("teacher", ["plain", "wrapped"])
@pytest.mark.parametrize("chunk", [None, 3])
def test_loss_and_gradient_by_hand(chunk, teacher):
    student = wrapped()
    teacher = wrapped(width=32, layers=4, seed=2) if teacher == "wrapped" else support.model("llama", 32, 4, seed=2)
    batch = support.collate(support.samples(4, "causal"))
    # By hand: cross-entropy of the next token and KL(teacher ‖ student), both the mean over tokens that predict a labelled one.
    plain = copy.deepcopy(student)
    targets = batch["labels"][:, 1:]
    counted = targets != -100
    with torch.no_grad():
        known = merged(teacher) if hasattr(teacher, "merge_and_unload") else teacher.eval()
        theirs = known(batch["input_ids"], batch["attention_mask"]).logits[:, :-1][counted].log_softmax(-1)
    ours = plain(batch["input_ids"], batch["attention_mask"]).logits[:, :-1][counted].log_softmax(-1)
    kl = F.kl_div(ours, theirs, log_target=True, reduction="batchmean")
    (F.nll_loss(ours, targets[counted]) + kl).backward()

    assert graft(student, teacher, [ForwardKL()], chunk=chunk) is student
    output = student.train()(**batch)
    loss = student.distill_link.last.losses["distill.forward_kl.loss"]
    torch.testing.assert_close(loss.detach(), kl.detach())
    # In chunks the term's gradient comes with the host's loss.
    (output.loss + loss).backward()
    found, expected = trained_gradients(student), trained_gradients(plain)
    assert found.keys() == expected.keys() and all("lora_" in name for name in found)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)


def trained(folder, student, teacher, terms, family="llama", resume=None, **settings):
    trainer = DistillTrainer(
        model=student,
        teacher=teacher,
        terms=terms,
        args=support.arguments(folder, **settings),
        train_dataset=support.samples(12, support.TASKS[family][1]),
        eval_dataset=support.samples(4, support.TASKS[family][1]),
        data_collator=support.collate,
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_training_is_that_of_the_base_model(family, tmp_path):
    terms = ["AttentionMaps", "HiddenStates", "ForwardKL" if family == "llama" else "SoftTargets"]
    more = {} if family == "llama" else dict(task_type="SEQ_CLS")
    found = []
    for of in (lambda model: model, lambda model: model.base_model.model):
        student, teacher = of(wrapped(family, **more)), of(wrapped(family, 32, 4, seed=2, **more))
        trainer = trained(tmp_path, student, teacher, terms, family, optim="sgd", learning_rate=0.1)
        assert "eval_loss" in trainer.evaluate()
        found.append({name.removeprefix("base_model.model."): v for name, v in trainer.model.state_dict().items()})
    assert found[0].keys() == found[1].keys()
    for name, value in found[0].items():
        assert torch.equal(value, found[1][name]), name


def test_the_saved_adapter_is_a_plain_one(tmp_path):
    def student():
        return wrapped(task_type="CAUSAL_LM")

    teacher = support.model("llama", 32, 4, seed=2)
    terms = ["ForwardKL", "HiddenStates"]
    whole = trained(tmp_path / "whole", student(), teacher, terms, save_strategy="steps", save_steps=2)
    again = str(tmp_path / "whole" / "checkpoint-2")
    resumed = trained(tmp_path / "again", student(), teacher, terms, resume=again)
    state = {name: value.clone() for name, value in whole.model.state_dict().items()}
    assert state.keys() == student().state_dict().keys()
    assert all(torch.equal(value, resumed.model.state_dict()[name]) for name, value in state.items())

    whole.save_model(tmp_path / "adapter")
    base = support.quiet(support.model("llama", seed=1))
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    batch = support.collate(support.samples(3, "causal"))
    expected = student()
    expected.load_state_dict(state)
    torch.save(whole.model, tmp_path / "whole.pt")
    pickled = torch.load(tmp_path / "whole.pt", weights_only=False)
    assert type(pickled.base_model.model) is LlamaForCausalLM
    for model in (loaded, pickled, undistill(whole.model), whole.model.merge_and_unload()):
        with torch.no_grad():
            torch.testing.assert_close(model.eval()(**batch).logits, expected.eval()(**batch).logits)
    assert type(whole.model.base_model.model) is LlamaForCausalLM
    with pytest.raises(DistillError, match="PeftModelForCausalLM is not being distilled"):
        undistill(whole.model)


def test_prompts_are_refused(tmp_path):
    settings = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    prompted = peft.get_peft_model(support.model("llama", seed=1), settings)
    message = "PeftModelForCausalLM: adapters of kind PROMPT_TUNING act outside layers"
    with pytest.raises(WiringError, match=message):
        graft(prompted, support.model("llama", seed=2), ["ForwardKL"])
    with pytest.raises(WiringError, match=message):
        graft(support.model("llama", seed=2), prompted, ["ForwardKL"])


def test_distilling_twice_is_refused(tmp_path):
    trainer = Trainer(model=wrapped(), args=support.arguments(tmp_path))
    graft(trainer.model, support.model("llama", seed=2), [SoftTargets()])
    with pytest.raises(DistillError, match="already being distilled"):
        DistillTrainer(
            model=trainer.model, teacher=support.model("llama", seed=2), terms=["ForwardKL"], args=trainer.args
        )
