"""A DistillTrainer whose student is in parts, as one of two processes on CPUs: accelerate's FSDP2, and DeepSpeed's ZeRO.

accelerate shards by FSDP2 on accelerators alone: here a process of several on CPUs says that it is one, and all that follows is
accelerate's own. DeepSpeed runs on CPUs as it is.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import SequentialSampler
from transformers import LlamaForCausalLM

from kdgraft.sources import Itself, Peer, Teacher
from kdgraft_bench.costs.sharded import SETTINGS, shard_on_cpus
from kdgraft_nlp import DistillTrainer, OnPolicy
from kdgraft_nlp.sharding import whole
from support import nlp as support
from support.processes import as_rank

LATER = dict(
    type="HiddenStates", schedule=dict(type="WarmUp", end=2)
)  # in the first step its projections learn nothing
TERMS: dict[str, dict[str, Any]] = {
    "whole": dict(terms=["HiddenStates", "AttentionMaps", "Relations", "ForwardKL", "DSKD"]),
    "chunked": dict(terms=["ForwardKL", dict(type="GeneralizedJSD", weight=0.5), LATER, "DSKD"], chunked=3),
}
WEIGHED: dict[str, Any] = dict(
    terms=["ForwardKL", dict(type="SoftTargets", hard_weight=0.5)], chunked=3, weights="weight"
)
"""Terms with weights of samples."""
WHOLE_WEIGHTS = ("auto", "peers", "written")
"""What needs whole weights on each process, as ZeRO-1 and 2 have them."""


def settings_of(name: str) -> dict[str, Any]:
    """The teachers and terms of a trainer."""
    if name in TERMS or name == "weighed":
        return TERMS.get(name, WEIGHED)
    if name == "auto":
        return dict(terms=[dict(type="ForwardKL", weight="auto")])
    if name == "written":
        return dict(terms=["ForwardKL"], on_policy=OnPolicy(share=1.0, max_new_tokens=4, eos_token_id=2))
    teachers = dict(peer=Peer(support.quiet(support.model("llama", 16, 2, seed=2))), average=Itself(momentum=0.9))
    weights = dict(type="WeightMatching", source="average", modules="model.layers.0.mlp")
    return dict(teacher=None, teachers=teachers, terms=[dict(type="ForwardKL", source="peer"), weights])


class InOrder(DistillTrainer):
    """Takes the samples in their order."""

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return SequentialSampler(train_dataset if train_dataset is not None else self.train_dataset)


def sharded(way: str, state: str = "FULL_STATE_DICT") -> dict[str, Any]:
    """Let accelerate shard on CPUs in this process; returns the arguments of the Trainer for that.

    Args:
        way: ``"fsdp2"``, or ``"zero1"`` to ``"zero3"``.
        state: how FSDP2 saves; with full states save_model writes the student.
    """
    if way != "fsdp2":
        os.environ["DS_ACCELERATOR"] = "cpu"
        _without_compiling()
        return {"deepspeed": zero(int(way[-1]))}
    os.environ.update(SETTINGS, FSDP_STATE_DICT_TYPE=state)
    shard_on_cpus()
    return {}


def _without_compiling() -> None:
    """Leave out DeepSpeed's all-reduce in shared memory, which is compiled for a minute at its first use; gloo has one, too."""
    import deepspeed
    from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

    deepspeed.ops.__compatible_ops__[ShareMemCommBuilder.NAME] = False


def zero(stage: int) -> dict[str, Any]:
    """DeepSpeed's settings: no weight is too small to be in parts, and the optimizer is torch's."""
    told = {"stage": stage, "stage3_param_persistence_threshold": 0, "stage3_gather_16bit_weights_on_model_save": True}
    return {
        "zero_optimization": told,
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
        **dict.fromkeys(("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"), "auto"),
    }


def trainer_of(folder: Path, name: str, batch: int, student: Any = None, more: Any = None, **settings: Any) -> InOrder:
    """A trainer on sixteen samples."""
    told = dict(per_device_train_batch_size=batch, max_steps=2, max_grad_norm=0.0)
    data = support.samples(32, "causal")
    if name == "weighed":
        data = [{**sample, "weight": (i % 5) / 2} for i, sample in enumerate(data)]
    return InOrder(
        model=support.quiet(support.model("llama", 16, 2, seed=1)) if student is None else student,
        **{"teacher": support.model("llama", 32, 4, seed=2), **settings_of(name), **(more or {})},
        args=support.arguments(folder, **{**told, **settings}),
        train_dataset=data,
        data_collator=support.collate,
    )


def of_teacher(folder: Path, name: str, batch: int, student: Any, teacher: Any, **settings: Any) -> InOrder:
    """A trainer whose student starts from layers of its teacher."""
    told = dict(optim="sgd", learning_rate=0.05, **settings)
    return trainer_of(folder, name, batch, student, dict(teacher=teacher, init_from=[1, 3]), **told)


def weights(trainer: Any) -> dict[str, Any]:
    """The whole weights of a student and of its terms; all processes must call this."""
    return {name: whole(p).detach().clone() for name, p in trainer.model.named_parameters()}


def train(rank: int, way: str, name: str, folder: str) -> dict[str, Any]:
    """Trains, saves, and tells what came of it."""
    told = sharded(way)
    trainer = trainer_of(Path(folder) / "run", name, 4, optim="sgd", learning_rate=0.05, **told)
    trainer.train()
    engine = trainer.distiller
    taught = [p for one in engine.sources.values() if isinstance(one, Teacher) for p in one.model.parameters()]
    found = {"weights": weights(trainer), "teacher": any(whole(p) is not p for p in taught)}
    found["way"] = "fsdp2" if trainer.accelerator.is_fsdp2 else type(trainer.model_wrapped).__name__
    trainer.save_model(str(Path(folder) / "student"))
    return {**found, "log": trainer.state.log_history[0]}


def loaded(rank: int, way: str, name: str, folder: str) -> dict[str, Any]:
    """Trains a student and a teacher that ``from_pretrained`` loads in parts, the student from layers of the teacher."""
    told = sharded(way)
    arguments = support.arguments(Path(folder) / "run", **told)  # from here on models are loaded in parts
    student, teacher = (LlamaForCausalLM.from_pretrained(Path(folder) / name) for name in ("first", "teacher"))
    parts = [whole(p) is not p for model in (student, teacher) for p in model.parameters()]
    trainer = of_teacher(Path(folder) / "run", name, 4, student, teacher, **told)
    trainer.train()
    return {"weights": weights(trainer), "parts": all(parts) and arguments.deepspeed is not None}


def accumulate(rank: int, way: str, name: str, folder: str) -> dict[str, Any]:
    """Trains on batches in two parts, with Adam and a limit to the gradient."""
    told = dict(gradient_accumulation_steps=2, max_grad_norm=0.5, **sharded(way))
    trainer = trainer_of(Path(folder) / "run", name, 2, **told)
    trainer.train()
    return {"weights": weights(trainer), "log": trainer.state.log_history[0]}


def resume(rank: int, way: str, name: str, folder: str, state: str) -> dict[str, Any]:
    """Trains four steps in one go, and two of them again from the checkpoint after two."""
    told = dict(max_steps=4, save_strategy="steps", save_steps=2, **sharded(way, state))
    found = {}
    for run in ("whole", "again"):
        trainer = trainer_of(Path(folder) / run, name, 4, **told)
        trainer.train(str(Path(folder) / "whole" / "checkpoint-2") if run == "again" else None)
        found[run] = weights(trainer)
    return found


def with_adapters() -> Any:
    """A student with LoRA."""
    import peft

    torch.manual_seed(3)
    told = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    return peft.get_peft_model(support.quiet(support.model("llama", 16, 2, seed=1)), told)


def adapters(rank: int, way: str, name: str, folder: str) -> dict[str, Any]:
    """Trains LoRA."""
    told = sharded(way)
    trainer = trainer_of(Path(folder) / "run", name, 4, with_adapters(), optim="sgd", learning_rate=0.05, **told)
    trainer.train()
    return {"weights": weights(trainer), "log": trainer.state.log_history[0]}


if __name__ == "__main__":
    works = {work.__name__: work for work in (train, loaded, accumulate, resume, adapters)}
    as_rank(lambda rank, work, *told: works[work](rank, *told))
