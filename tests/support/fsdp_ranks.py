"""A DistillTrainer under accelerate's FSDP2, as one of two processes on CPUs.

accelerate shards on accelerators alone: here a process of several on CPUs says that it is one, and all that follows is accelerate's own.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor
from torch.utils.data import SequentialSampler

from kdgraft_nlp import DistillTrainer
from support import nlp as support
from support.processes import as_rank

SETTINGS = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}
TERMS: dict[str, dict[str, Any]] = {
    "layers": dict(terms=["HiddenStates", "AttentionMaps"]),
    "logits": dict(terms=["ForwardKL", dict(type="GeneralizedJSD", weight=0.5)]),
    "chunked": dict(terms=["ForwardKL", "HiddenStates"], chunked=3),
    "relations": dict(terms=["Relations", "SoftTargets"]),
}


class InOrder(DistillTrainer):
    """Takes the samples in their order."""

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return SequentialSampler(train_dataset if train_dataset is not None else self.train_dataset)


def sharded(state: str = "FULL_STATE_DICT") -> None:
    """Let accelerate shard on CPUs in this process; with full states save_model writes the student."""
    os.environ.update(SETTINGS, FSDP_STATE_DICT_TYPE=state)
    before = PartialState.__init__

    def begin(self: Any, *args: Any, **settings: Any) -> None:
        before(self, *args, **settings)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = begin  # type: ignore[method-assign]


def trainer_of(folder: Path, name: str, batch: int, student: Any = None, **settings: Any) -> InOrder:
    """A trainer on sixteen samples."""
    told = dict(per_device_train_batch_size=batch, max_steps=2, max_grad_norm=0.0)
    return InOrder(
        model=support.quiet(support.model("llama", 16, 2, seed=1)) if student is None else student,
        **{"teacher": support.model("llama", 32, 4, seed=2), **TERMS[name]},
        args=support.arguments(folder, **{**told, **settings}),
        train_dataset=support.samples(32, "causal"),
        data_collator=support.collate,
    )


def weights(trainer: Any) -> dict[str, Any]:
    """The whole weights of a student and of its terms; all processes must call this."""
    named = trainer.model.named_parameters()
    return {n: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone() for n, p in named}


def train(rank: int, name: str, folder: str) -> dict[str, Any]:
    """Trains, saves, and tells what came of it."""
    sharded()
    trainer = trainer_of(Path(folder) / "run", name, 4, optim="sgd", learning_rate=0.05)
    trainer.train()
    teacher = next(iter(trainer.distiller.teacher.model.parameters()))
    found = {"weights": weights(trainer), "fsdp": trainer.accelerator.is_fsdp2, "teacher": isinstance(teacher, DTensor)}
    trainer.save_model(str(Path(folder) / "student"))
    return {**found, "log": trainer.state.log_history[0]}


def resume(rank: int, name: str, folder: str, state: str) -> dict[str, Any]:
    """Trains four steps in one go, and two of them again from the checkpoint after two."""
    sharded(state)
    found = {}
    for run in ("whole", "again"):
        trainer = trainer_of(Path(folder) / run, name, 4, max_steps=4, save_strategy="steps", save_steps=2)
        trainer.train(str(Path(folder) / "whole" / "checkpoint-2") if run == "again" else None)
        found[run] = weights(trainer)
    return found


def adapters(rank: int, name: str, folder: str) -> dict[str, Any]:
    """Trains LoRA under its own base."""
    import peft

    sharded()
    torch.manual_seed(3)
    told = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    student = peft.get_peft_model(support.quiet(support.model("llama", 16, 2, seed=1)), told)
    trainer = trainer_of(Path(folder) / "run", name, 4, student, optim="sgd", learning_rate=0.05)
    trainer.train()
    return {"weights": weights(trainer), "log": trainer.state.log_history[0]}


if __name__ == "__main__":
    as_rank(lambda rank, work, *told: {"train": train, "resume": resume, "adapters": adapters}[work](rank, *told))
