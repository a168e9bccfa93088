"""One accumulated step of a DistillTrainer on a share of eight samples, alone or as one of several processes.

Run as ``python -m support.nlp_ranks RANK WORLD PORT FAMILY OUT``; :func:`gradients` is also what the test computes in one process.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import SequentialSampler

from kdgraft_nlp import DistillTrainer
from support import nlp as support

TERMS: dict[str, list[Any]] = {
    "bert": [
        dict(type="SoftTargets"),
        dict(type="AttentionMaps"),
        dict(type="Relations"),
        dict(type="HiddenStates"),
        dict(type="Embeddings"),
        dict(type="PatientStates", layers="last"),
    ],
    "llama": [
        dict(type="GeneralizedJSD"),
        dict(type="UniversalLogits"),
        dict(type="AttentionMaps", of="distributions"),
        dict(type="HiddenStates", loss="cosine"),
    ],
}
WITHOUT_LABELS: dict[str, list[Any]] = {"bert/BertModel": TERMS["bert"][1:5]}
"""A family and a class of it that has no loss of its own."""


class Recording(DistillTrainer):
    """Keeps the gradient of the first optimizer step; batches come in order."""

    found: dict[str, Tensor]

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return SequentialSampler(train_dataset if train_dataset is not None else self.train_dataset)

    def _clip_grad_norm(self, model: Any) -> Any:
        if not hasattr(self, "found"):
            self.found = support.distillation_gradient(self.model)
        return super()._clip_grad_norm(model)


def gradients(family: str, folder: Path, terms: list[Any], batch: int, accumulation: int, **settings: Any) -> Recording:
    """A trainer that has done one step on the eight samples; ``found`` holds the gradient of the first."""
    family, _, kind = family.partition("/")
    student = support.quiet(support.model(family, 16, 2, 4, seed=1, kind=kind))
    teacher = support.model(family, 32, 4, 4, seed=2, kind=kind)
    torch.manual_seed(0)
    trainer = Recording(
        model=student,
        teacher=teacher,
        terms=terms,
        args=support.arguments(
            folder,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            max_grad_norm=1e9,
            **{"max_steps": 1, **settings},
        ),
        train_dataset=support.samples(8, "none" if kind else support.TASKS[family][1]),
        data_collator=support.collate,
    )
    trainer.train()
    return trainer


if __name__ == "__main__":
    rank, world, port, family, out = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4], Path(sys.argv[5])
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=port
    )
    terms, steps = ({**TERMS, **WITHOUT_LABELS}[family], 2 if family in WITHOUT_LABELS else 1)
    done = gradients(family, out / f"rank{rank}", terms, 4, 1, ddp_backend="gloo", max_steps=steps)
    if rank == 0:
        logged = [entry for entry in done.state.log_history if "distill.hidden_states.loss" in entry]
        torch.save({"gradient": done.found, "logged": logged[0]}, out / "found.pt")
    torch.distributed.barrier()
    os._exit(0)
