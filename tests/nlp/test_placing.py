"""Teachers that a device map has placed stay where they are."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from kdgraft import WiringError
from kdgraft_nlp import DistillTrainer, SoftTargets
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
