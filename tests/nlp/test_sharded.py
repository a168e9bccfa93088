"""FSDP2: student and teacher in parts on two processes, as one process trains them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from transformers import LlamaForCausalLM

from kdgraft import DistillError
from kdgraft.sources import Itself, Peer
from kdgraft_nlp import DistillTrainer
from kdgraft_nlp.sharding import refuse_sharded, refuse_sharding
from support import fsdp_ranks
from support import nlp as support
from support.processes import found_by_two


def close(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value.detach(), rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("name", list(fsdp_ranks.TERMS))
def test_two_processes_are_one(tmp_path, name):
    both = found_by_two("fsdp_ranks", tmp_path, "train", name, str(tmp_path), host="transformers")
    assert all(one["fsdp"] and one["teacher"] for one in both)
    alone = fsdp_ranks.trainer_of(tmp_path / "alone", name, 8, optim="sgd", learning_rate=0.05)
    alone.train()
    for one in both:
        close(one["weights"], dict(alone.model.named_parameters()))
    for key, value in alone.state.log_history[0].items():
        if "loss" in key:
            assert both[0]["log"][key] == pytest.approx(value, rel=1e-4), key
    saved = LlamaForCausalLM.from_pretrained(tmp_path / "student")
    close(dict(saved.named_parameters()), {n: p for n, p in alone.model.named_parameters() if "distiller" not in n})


@pytest.mark.parametrize("state", ["FULL_STATE_DICT", "SHARDED_STATE_DICT"])
def test_interrupted_training_resumes_exactly(tmp_path, state):
    for one in found_by_two("fsdp_ranks", tmp_path, "resume", "chunked", str(tmp_path), state, host="transformers"):
        assert any("distiller" in name for name in one["whole"])
        assert all(torch.equal(value, one["again"][name]) for name, value in one["whole"].items())


def test_adapters_learn(tmp_path):
    peft = pytest.importorskip("peft")
    both = found_by_two("fsdp_ranks", tmp_path, "adapters", "logits", str(tmp_path), host="transformers")
    torch.manual_seed(3)
    told = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    student = peft.get_peft_model(support.quiet(support.model("llama", 16, 2, seed=1)), told)
    alone = fsdp_ranks.trainer_of(tmp_path / "alone", "logits", 8, student, optim="sgd", learning_rate=0.05)
    alone.train()
    close(both[0]["weights"], dict(alone.model.named_parameters()))


def test_the_config_that_ships_is_the_tested_one():
    told = yaml.safe_load((Path(__file__).parents[2] / "nlp/configs/fsdp2.yaml").read_text())
    found = {key.upper(): str(value).lower() for key, value in told["fsdp_config"].items()}
    tested = {key: value.lower() for key, value in fsdp_ranks.SETTINGS.items() if key.startswith("FSDP_")}
    assert found == {**tested, "FSDP_STATE_DICT_TYPE": "full_state_dict"} and told["distributed_type"] == "FSDP"


def host(version=2, efficient=False, deepspeed=False):
    plugin = SimpleNamespace(fsdp_version=version, cpu_ram_efficient_loading=efficient)
    accelerator = SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin))
    return SimpleNamespace(is_deepspeed_enabled=deepspeed, is_fsdp_enabled=not deepspeed, accelerator=accelerator)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (dict(version=1), "needs its second version; set fsdp_version: 2"),
        (dict(efficient=True), "only the first process has weights, .* set it to false"),
        (dict(deepspeed=True), "distilling under DeepSpeed is not supported; use FSDP2"),
    ],
)
def test_other_ways_to_shard_are_refused(settings, said):
    with pytest.raises(DistillError, match=said):
        refuse_sharding(host(**settings))
    refuse_sharding(host())


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (dict(teacher=Itself(momentum=0.9)), "under FSDP2 teachers teach, and 'teacher' is a Itself"),
        (dict(teacher=Peer(support.model("llama", seed=2))), "'teacher' is a Peer"),
        (
            dict(teacher=support.model("llama", seed=2), terms=[dict(type="WeightMatching", modules="model.layers.0")]),
            "reads weights",
        ),
    ],
)
def test_what_needs_whole_weights_is_refused(tmp_path, settings, said):
    trainer = DistillTrainer(
        model=support.model("llama", seed=1),
        **{"terms": ["ForwardKL"], **settings},
        args=support.arguments(tmp_path),
        train_dataset=support.samples(4, "causal"),
        data_collator=support.collate,
    )
    with pytest.raises(DistillError, match=said):
        refuse_sharded(trainer.distiller)
