"""One accumulated step of a DistillTrainer on a share of eight samples, alone or as one of several processes.

:func:`gradients` is also what the test computes in one process.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import SequentialSampler

from kdgraft_nlp import DistillTrainer
from support import detectors, tensors
from support import nlp as support
from support.processes import as_rank

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
        dict(type="DSKD"),
    ],
}
WITHOUT_LABELS: dict[str, list[Any]] = {"bert/BertModel": TERMS["bert"][1:5]}
"""A family and a class of it that has no loss of its own."""
ATTENTION: dict[str, list[Any]] = {"llama/": [dict(type="DSKD", attention=True)]}
"""A term that relates the tokens of a batch, so that accumulated batches are not one batch; by a name of its own."""


DETECTORS: dict[str, list[Any]] = {
    "detr": [
        dict(type="SoftTargets"),
        dict(type="SoftTargets", name="of_objects", queries="objects"),
        dict(type="MatchedBoxes"),
        dict(type="BoundedRegression", margin=1.0),
        dict(type="HiddenStates"),
        dict(type="HiddenStates", name="decoder_states", stack="decoder"),
    ]
}
"""Terms of a detector. Its own loss divides by what each process holds, so that it is left out."""


class Recording(DistillTrainer):
    """Keeps the gradient of the first optimizer step; batches come in order."""

    found: dict[str, Tensor]

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return SequentialSampler(train_dataset if train_dataset is not None else self.train_dataset)

    def _clip_grad_norm(self, model: Any) -> Any:
        if not hasattr(self, "found"):
            self.found = tensors.gradients(self.model)
        return super()._clip_grad_norm(model)


def gradients(family: str, folder: Path, terms: list[Any], batch: int, accumulation: int, **settings: Any) -> Recording:
    """A trainer that has done one step on the eight samples; ``found`` holds the gradient of the first."""
    family, _, kind = family.partition("/")
    data: Any
    if family in DETECTORS:
        student, teacher = detectors.detector(family, 16, 1), detectors.detector(family, 32, 2, queries=8)
        data, collate = detectors.scenes(8, objects=3), detectors.collate
    else:
        student = support.quiet(support.model(family, 16, 2, 4, seed=1, kind=kind))
        teacher = support.model(family, 32, 4, 4, seed=2, kind=kind)
        data, collate = support.samples(8, "none" if kind else support.TASKS[family][1]), support.collate
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
        train_dataset=data,
        data_collator=collate,
        host_weight=0.0 if family in DETECTORS else 1.0,
    )
    trainer.train()
    return trainer


def step(rank: int, family: str, folder: str) -> dict[str, Any]:
    """The gradient of this process's share and what the trainer logged."""
    terms, steps = ({**TERMS, **WITHOUT_LABELS, **ATTENTION, **DETECTORS}[family], 2 if family in WITHOUT_LABELS else 1)
    done = gradients(family, Path(folder) / f"rank{rank}", terms, 4, 1, ddp_backend="gloo", max_steps=steps)
    logged = [entry for entry in done.state.log_history if "distill.hidden_states.loss" in entry]
    return {"gradient": done.found, "logged": next(iter(logged), None)}


if __name__ == "__main__":
    as_rank(step)
