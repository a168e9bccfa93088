"""One accumulated on-policy step of a DistillTrainer on a share of eight samples, alone or as one of several processes.

:func:`trained` is also what the tests compute in one process.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from kdgraft_nlp import OnPolicy
from support import nlp as support
from support import nlp_ranks
from support.processes import as_rank


class Trained(nlp_ranks.Recording):
    """Keeps the batches that it trained on, too."""

    def training_step(self, model: Any, inputs: Any, *args: Any, **settings: Any) -> Any:
        kept = {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}
        vars(self).setdefault("batches", []).append(kept)
        return super().training_step(model, inputs, *args, **settings)


def trained(folder: Path, on_policy: Any, *, terms: Any = ("ReverseKL",), **settings: Any) -> Trained:
    """A trainer that has taken steps on texts that its student wrote; ``found`` holds the gradient of the first.

    Args:
        folder: the folder of the training.
        on_policy: the settings; those of the texts are added to a mapping.
        terms: the terms.
        settings: training arguments, and arguments of the trainer by these names: ``collator``, ``data``, ``model``, ``teacher``,
            ``family``, ``resume``, ``more``.
    """
    take = settings.pop
    family = take("family", "llama")
    collator, data, resume = take("collator", support.collate), take("data", None), take("resume", None)
    model, teacher, more = take("model", None), take("teacher", None), take("more", {})
    if isinstance(on_policy, dict):
        on_policy = OnPolicy(**{"max_new_tokens": 6, **on_policy})
    trainer = Trained(
        model=model or support.quiet(support.model(family, seed=1)),
        teacher=teacher or support.model(family, 32, seed=2),
        terms=list(terms),
        on_policy=on_policy,
        args=support.arguments(folder, **{"max_steps": 1, "max_grad_norm": 1e9, **settings}),
        train_dataset=data or support.samples(8, "causal"),
        data_collator=collator,
        **more,
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def step(rank: int, folder: str) -> dict[str, Any]:
    """The gradient and the figures of a process that has half of the samples, with texts that the teacher helps to write."""
    told = dict(share=1.0, mix=0.2)
    done = trained(Path(folder) / f"rank{rank}", told, terms=["MiniLLM"], ddp_backend="gloo", max_steps=1)
    return {"gradient": done.found, "log": done.state.log_history[0], "labels": done.batches[0]["labels"]}


if __name__ == "__main__":
    as_rank(step)
