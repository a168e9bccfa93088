"""FSDP2 and DeepSpeed's ZeRO: student and teacher in parts on two processes, as one process trains them."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from accelerate.utils import is_deepspeed_available
from safetensors import safe_open
from transformers import LlamaForCausalLM

from kdgraft import DistillError
from kdgraft.sources import Itself, Peer
from kdgraft_nlp import DistillTrainer
from kdgraft_nlp.sharding import refuse_sharded, refuse_sharding, refuse_uneven
from support import nlp as support
from support import sharded_ranks
from support.processes import found_by_two


def close(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value.detach(), rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


needs_deepspeed = pytest.mark.skipif(not is_deepspeed_available(), reason="deepspeed is not installed")
ZERO = ["zero1", "zero2", "zero3"]


def case(*told, slow=("zero1",)):
    """A case, which is skipped where it needs DeepSpeed and that is not installed; stage 2 does what stage 1 does, and more."""
    marks = [needs_deepspeed] if set(told) & set(ZERO) else []
    return pytest.param(*told, marks=[*marks, *([pytest.mark.slow] if set(told) & set(slow) else [])])


WAYS = ["fsdp2", *ZERO]
# Stage 3 does what stage 2 does, and more.
ENDS = [case(way, slow=("zero1", "zero2")) for way in WAYS]
CASES = [case(*one, slow=("zero1", "zero2")) for one in product(sharded_ranks.TERMS, WAYS)]
CASES += [case(name, "zero2") for name in sharded_ranks.WHOLE_WEIGHTS]
CASES += [case("weighed", way) for way in ("fsdp2", "zero2")]


@pytest.mark.parametrize(("name", "way"), CASES)
def test_two_processes_are_one(tmp_path, name, way):
    both = found_by_two("sharded_ranks", tmp_path, "train", way, name, str(tmp_path), host="transformers")
    assert all(one["way"] == ("fsdp2" if way == "fsdp2" else "DeepSpeedEngine") for one in both)
    assert all(one["teacher"] == (way in ("fsdp2", "zero3")) for one in both)  # in parts
    alone = sharded_ranks.trainer_of(tmp_path / "alone", name, 8, optim="sgd", learning_rate=0.05)
    alone.train()
    for one in both:
        close(one["weights"], dict(alone.model.named_parameters()))
    for key, value in alone.state.log_history[0].items():
        if "loss" in key:
            assert both[0]["log"][key] == pytest.approx(value, rel=1e-4), key
    saved = LlamaForCausalLM.from_pretrained(tmp_path / "student")
    close(dict(saved.named_parameters()), {n: p for n, p in alone.model.named_parameters() if "distiller" not in n})
    names = safe_open(tmp_path / "student" / "model.safetensors", "pt").keys()
    assert not any("distiller" in name for name in names)


@needs_deepspeed
@pytest.mark.parametrize("name", ["chunked", pytest.param("whole", marks=pytest.mark.slow)])
def test_models_that_are_loaded_in_parts_are_wired_as_whole_ones(tmp_path, name):
    student, teacher = support.model("llama", 16, 2, seed=1), support.model("llama", 16, 4, seed=2)
    student.save_pretrained(tmp_path / "first")
    teacher.save_pretrained(tmp_path / "teacher")
    both = found_by_two("sharded_ranks", tmp_path, "loaded", "zero3", name, str(tmp_path), host="transformers")
    assert all(one["parts"] for one in both)
    alone = sharded_ranks.of_teacher(tmp_path / "alone", name, 8, student, teacher)
    alone.train()
    for one in both:
        close(one["weights"], dict(alone.model.named_parameters()))


@pytest.mark.parametrize("way", ENDS)
def test_accumulated_batches_are_one(tmp_path, way):
    both = found_by_two("sharded_ranks", tmp_path, "accumulate", way, "chunked", str(tmp_path), host="transformers")
    alone = sharded_ranks.trainer_of(tmp_path / "alone", "chunked", 8, max_grad_norm=0.5)
    alone.train()
    close(both[0]["weights"], dict(alone.model.named_parameters()))
    assert both[0]["log"]["grad_norm"] == pytest.approx(alone.state.log_history[0]["grad_norm"], rel=1e-4)


@pytest.mark.parametrize(
    ("way", "state", "name"),
    [
        pytest.param("fsdp2", "FULL_STATE_DICT", "chunked", marks=pytest.mark.slow),
        ("fsdp2", "SHARDED_STATE_DICT", "chunked"),
        case("zero1", "", "chunked"),
        case("zero2", "", "chunked", slow=("zero2",)),
        case("zero2", "", "peers"),
        case("zero3", "", "chunked"),
    ],
)
def test_interrupted_training_resumes_exactly(tmp_path, way, state, name):
    both = found_by_two("sharded_ranks", tmp_path, "resume", way, name, str(tmp_path), state, host="transformers")
    for one in both:
        assert any("distiller" in name for name in one["whole"])
        assert all(torch.equal(value, one["again"][name]) for name, value in one["whole"].items())


@pytest.mark.parametrize("way", ENDS)
def test_adapters_learn(tmp_path, way):
    pytest.importorskip("peft")
    both = found_by_two("sharded_ranks", tmp_path, "adapters", way, "chunked", str(tmp_path), host="transformers")
    told = dict(optim="sgd", learning_rate=0.05)
    alone = sharded_ranks.trainer_of(tmp_path / "alone", "chunked", 8, sharded_ranks.with_adapters(), **told)
    alone.train()
    close(both[0]["weights"], dict(alone.model.named_parameters()))


def test_the_config_that_ships_is_the_tested_one():
    told = yaml.safe_load((Path(__file__).parents[2] / "nlp/configs/fsdp2.yaml").read_text())
    found = {key.upper(): str(value).lower() for key, value in told["fsdp_config"].items()}
    tested = {key: value.lower() for key, value in sharded_ranks.SETTINGS.items() if key.startswith("FSDP_")}
    assert found == {**tested, "FSDP_STATE_DICT_TYPE": "full_state_dict"} and told["distributed_type"] == "FSDP"


@needs_deepspeed
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_configs_of_zero_that_ship_say_what_is_tested(stage):
    found = yaml.safe_load((Path(__file__).parents[2] / f"nlp/configs/zero{stage}.yaml").read_text())
    told, tested = found["deepspeed_config"], sharded_ranks.zero(stage)
    assert found["distributed_type"] == "DEEPSPEED" and told["zero_stage"] == tested["zero_optimization"]["stage"]
    assert all(told[name] == tested[name] == "auto" for name in ("gradient_accumulation_steps", "gradient_clipping"))
    whole = told.get("zero3_save_16bit_model", False)
    assert whole == (stage == 3) and tested["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"]


def host(version=2, efficient=False, deepspeed=None):
    plugin = SimpleNamespace(fsdp_version=version, cpu_ram_efficient_loading=efficient)
    zero = SimpleNamespace(zero_stage=(deepspeed or {}).pop("stage", 2), deepspeed_config=deepspeed)
    accelerator = SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin, deepspeed_plugin=zero))
    told = dict(is_deepspeed_enabled=deepspeed is not None, is_fsdp_enabled=deepspeed is None)
    return SimpleNamespace(accelerator=accelerator, **told)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (dict(version=1), "needs its second version; set fsdp_version: 2"),
        (dict(efficient=True), "only the first process has weights, .* set it to false"),
        (dict(deepspeed=dict(stage=0)), "needs ZeRO stage 1, 2 or 3, got 0; set zero_stage"),
        (
            dict(deepspeed=dict(tensor_parallel=dict(autotp_size=2))),
            "tensor_parallel gives each process a part of a model",
        ),
        (
            dict(deepspeed=dict(sequence_parallel_size=2)),
            "sequence_parallel_size gives each process a part .* leave it out",
        ),
    ],
)
def test_other_ways_to_shard_are_refused(settings, said):
    with pytest.raises(DistillError, match=said):
        refuse_sharding(host(**settings))
    refuse_sharding(host())
    refuse_sharding(host(deepspeed=dict(tensor_parallel=None)))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (dict(teacher=Itself(momentum=0.9)), "under FSDP2 teachers teach, and 'teacher' is a Itself"),
        (dict(teacher=Peer(support.model("llama", seed=2))), "'teacher' is a Peer"),
        (
            dict(teacher=support.model("llama", seed=2), terms=[dict(type="WeightMatching", modules="model.layers.0")]),
            "reads weights",
        ),
        (
            dict(teacher=support.model("llama", seed=2), terms=[dict(type="ForwardKL", weight="auto")]),
            "measures gradients",
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
        refuse_sharded(trainer.distiller, "FSDP2")


def test_what_runs_models_unequally_often_is_refused():
    refuse_uneven("ZeRO-3", None, None)
    refuse_uneven(None, object(), object())
    with pytest.raises(DistillError, match=r"on_policy: .* for which ZeRO-3 would wait forever"):
        refuse_uneven("ZeRO-3", object(), None)
    with pytest.raises(DistillError, match=r"the teacher of a cache runs on those processes alone .* FSDP2"):
        refuse_uneven("FSDP2", None, object())
