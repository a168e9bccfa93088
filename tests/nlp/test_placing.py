"""Teachers that a device map has placed stay where they are."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BitsAndBytesConfig

from kdgraft import DistillError, WiringError
from kdgraft_nlp import DistillTrainer, SoftTargets
from kdgraft_nlp.checks import check_folder
from kdgraft_nlp.student import graft
from support import nlp as support

MAPS = {
    "one device": {"": "cpu"},
    "layers on disk": {"bert.embeddings": "cpu", "bert.encoder": "disk", "bert.pooler": "cpu", "classifier": "cpu"},
    "all but the layers on disk": {
        "bert.embeddings": "disk",
        "bert.encoder": "cpu",
        "bert.pooler": "disk",
        "classifier": "disk",
    },
}


def teachers(folder, places):
    """The same teacher, plain and placed."""
    support.model("bert", 32, 4, seed=2).save_pretrained(folder / "teacher")
    kind = AutoModelForSequenceClassification
    placed = kind.from_pretrained(folder / "teacher", device_map=places, offload_folder=folder / "disk")
    return kind.from_pretrained(folder / "teacher").eval(), placed


def where(model):
    return {name: parameter.device for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("places", MAPS.values(), ids=MAPS)
def test_soft_targets_by_hand(places, tmp_path):
    plain, placed = teachers(tmp_path, places)
    before = where(placed)
    student = support.quiet(support.model("bert", seed=1))
    batch = support.collate(support.samples(4))
    with torch.no_grad():
        ours, theirs = student(**batch).logits / 2, plain(**batch).logits / 2
    by_hand = 4 * F.kl_div(ours.log_softmax(-1), theirs.log_softmax(-1), log_target=True, reduction="batchmean")
    grafted = graft(student, placed, [SoftTargets(temperature=2)]).train()
    torch.testing.assert_close(support.loss_of(grafted, batch).detach(), by_hand)
    # What moves or converts the student leaves the teacher alone.
    grafted.to("cpu").double().float()
    assert where(placed) == before
    torch.testing.assert_close(support.loss_of(grafted, batch).detach(), by_hand)


@pytest.mark.parametrize("places", MAPS.values(), ids=MAPS)
def test_training_is_that_with_the_teacher_in_memory(places, tmp_path):
    plain, placed = teachers(tmp_path, places)
    before = where(placed)
    states = []
    for teacher in (plain, placed):
        trainer = DistillTrainer(
            model=support.model("bert", seed=1),
            teacher=teacher,
            terms=["AttentionMaps", "HiddenStates", "Embeddings", "SoftTargets"],
            args=support.arguments(tmp_path),
            train_dataset=support.samples(12),
            data_collator=support.collate,
        )
        trainer.train()
        states.append(trainer.model.state_dict())
    for name, value in states[0].items():
        assert torch.equal(states[1][name], value), name
    assert where(placed) == before


def test_chunks_need_the_output_layer_at_hand(tmp_path):
    support.model("llama", 32, 4, seed=2).save_pretrained(tmp_path / "teacher")
    places = {"model.embed_tokens": "cpu", "model.layers": "disk", "model.norm": "cpu", "model.rotary_emb": "cpu"}
    messages = {"cpu": None, "disk": "output layer on the student's device \\(cpu\\), and it is on no device"}
    for place, message in messages.items():
        teacher = AutoModelForCausalLM.from_pretrained(
            tmp_path / "teacher", device_map={**places, "lm_head": place}, offload_folder=tmp_path / place
        )
        if message is None:
            graft(support.model("llama", seed=1), teacher, ["ForwardKL"], chunk=8)
            continue
        with pytest.raises(WiringError, match=message):
            graft(support.model("llama", seed=1), teacher, ["ForwardKL"], chunk=8)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("chunk", [None, 3])
def test_a_quantised_teacher(bits, chunk, tmp_path):
    pytest.importorskip("bitsandbytes")
    support.model("llama", 64, 2, seed=2).save_pretrained(tmp_path / "teacher")
    told = dict(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32) if bits == 4 else dict(load_in_8bit=True)
    teacher = AutoModelForCausalLM.from_pretrained(tmp_path / "teacher", quantization_config=BitsAndBytesConfig(**told))
    kinds = {name: (p.dtype, p.device) for name, p in teacher.named_parameters()}
    student, batch = support.quiet(support.model("llama", seed=1)), support.collate(support.samples(4, "causal"))
    counted = batch["labels"][:, 1:] != -100
    with torch.no_grad():
        ours, theirs = (
            one(batch["input_ids"], batch["attention_mask"]).logits[:, :-1][counted].float().log_softmax(-1)
            for one in (student, teacher)
        )
    by_hand = F.kl_div(ours, theirs, log_target=True, reduction="batchmean")
    grafted = graft(student, teacher, ["ForwardKL"], chunk=chunk).train()
    grafted.to("cpu").double().float()  # what moves or converts the student leaves the teacher alone
    torch.testing.assert_close(support.loss_of(grafted, batch).detach(), by_hand, rtol=1e-3, atol=1e-5)
    assert {name: (p.dtype, p.device) for name, p in teacher.named_parameters()} == kinds


def test_adapters_on_a_quantised_base_learn_from_it(tmp_path):
    pytest.importorskip("bitsandbytes")
    peft = pytest.importorskip("peft")
    support.model("llama", 64, 2, seed=2).save_pretrained(tmp_path / "base")
    told = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=told)
    adapters = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    student = peft.get_peft_model(peft.prepare_model_for_kbit_training(base), adapters)
    trainer = DistillTrainer(
        model=student,
        teacher="base",
        terms=["ForwardKL", "HiddenStates"],
        host_weight=0.0,
        args=support.arguments(tmp_path / "out", learning_rate=1e-2),
        train_dataset=support.samples(4, "causal"),
        data_collator=support.collate,
    )
    before = {n: p.detach().clone() for n, p in student.named_parameters() if "distiller" not in n}
    trainer.train()
    changed = {name for name, p in student.named_parameters() if name in before and not torch.equal(p, before[name])}
    assert changed and all("lora_" in name for name in changed)
    losses = [e["distill.forward_kl.loss"] for e in trainer.state.log_history if "distill.forward_kl.loss" in e]
    assert 0 < losses[-1] < losses[0]


def test_a_name_of_the_hub_is_looked_for_when_it_is_loaded(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    check_folder("teacher", "owner/name")
    (tmp_path / "owner").mkdir()  # then it is a misspelt folder
    for name, offline in (("owner/name", False), ("nowhere", False), ("/owner/name", False), ("other/name", True)):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
        with pytest.raises(DistillError, match=r"no teacher at .*: there is no config\.json"):
            check_folder("teacher", name)


def test_a_name_that_the_hub_does_not_have_is_said_in_one_line(monkeypatch):
    def fails(*_, **__):
        raise OSError("We couldn't connect to the hub\nto load the files")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", fails)
    with pytest.raises(
        DistillError, match=r"cannot load the teacher owner/name: We couldn't connect to the hub to load the files$"
    ):
        graft(support.model("llama"), "owner/name", ["ForwardKL"])
