"""Two processes that train through two epochs, and again from a checkpoint within the second."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from kdgraft_nlp import DistillTrainer
from support import nlp as support
from support.processes import as_rank

STEPS, STOP = 6, 4
"""Of epochs of three steps."""


def masking(features: list[dict[str, Any]]) -> dict[str, Any]:
    """Pads, and replaces tokens at random."""
    batch = support.collate(features)
    batch["input_ids"][torch.rand(batch["input_ids"].shape) < 0.2] = 3
    return batch


def resume(rank: int, strategy: str, folder: str) -> dict[str, Any]:
    """The last weights of a run, and of one that went on from its fourth step."""
    found = {}
    for run in ("whole", "again"):
        trainer = DistillTrainer(
            model=support.model("bert", layers=1, seed=1),
            args=support.arguments(
                Path(folder) / run,
                max_steps=STEPS,
                save_strategy="steps",
                save_steps=1,
                per_device_train_batch_size=2,
                train_sampling_strategy=strategy,
                ddp_backend="gloo",
            ),
            train_dataset=support.samples(12),
            data_collator=masking,
            teacher=support.model("bert", 32, 1, seed=2),
            terms=["SoftTargets", "HiddenStates"],
        )
        trainer.train(str(Path(folder) / "whole" / f"checkpoint-{STOP}") if run == "again" else None)
        found[run] = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    return found


if __name__ == "__main__":
    as_rank(resume)
