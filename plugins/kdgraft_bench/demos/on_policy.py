"""On-policy distillation of a small Llama on the demo's text, compared with its teacher on the texts that it writes itself.

As in the papers, a student learns to write first: the plain student is trained further, on its labels, taught on the data set, or
taught on its own texts in half of the steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import AutoModelForCausalLM

from kdgraft.losses import reverse_kl
from kdgraft_nlp import DistillTrainer, OnPolicy
from kdgraft_nlp.data import encode
from kdgraft_nlp.pen import Pen

from ..comparison import Outcome, Training
from .hf import TrainerComparison, llama

LENGTH = 32
# Blocks of joined sentences go on after a sentence, and so do the texts, which are as long.
TEXTS: dict[str, Any] = dict(max_new_tokens=LENGTH - 8, prompt=8, eos_token_id=[])
METHODS: dict[str, dict[str, Any]] = {
    "continued": {},
    "off_policy": dict(recipe="gkd"),
    "on_policy": dict(recipe="gkd", on_policy=dict(TEXTS, share=0.5)),
    # The steps on the data set stand for the language-model loss that the paper adds.
    "minillm": dict(recipe="minillm", on_policy=dict(TEXTS, share=0.5, mix=0.2)),
}


@dataclass(frozen=True, kw_only=True)
class OnPolicyComparison(TrainerComparison):
    """A comparison of language models that start as the plain student.

    Attributes:
        further: the share of a training's iterations for which the plain student is trained further.
        slower: the factor of the students' learning rate in this.
        texts: the number of texts that each model writes to be measured.
    """

    further: float = 0.3
    slower: float = 0.25
    texts: int = 256

    def config(self, training: Training) -> dict[str, Any]:
        """Return the entries of a recipe file; a method's student is the plain one."""
        found = super().config(training)
        if training.method not in self.recipes:
            return found
        if "recipe" not in found:
            del found["teacher"]
        found["training"]["learning_rate"] *= self.slower
        return found | {"student": str(replace(training, method="plain").folder)}

    def settings(self, training: Training) -> dict[str, Any]:
        """Return the settings of the training, and for a method also those of the plain student."""
        own = super().settings(self._shortened(training)) | {"texts": self.texts, "written": TEXTS}
        if training.method not in self.recipes:
            return own
        return own | {"start": super().settings(replace(training, method="plain"))}

    def train(self, training: Training) -> Outcome:
        """Train, save and test a model, and have it write texts."""
        outcome = super().train(self._shortened(training))
        tested = self._encoded(self.sets(training.data, training.split)["test"], outcome.run)
        found = own_texts(outcome.run, str(training.teacher.folder), tested.select(range(min(self.texts, len(tested)))))
        return replace(outcome, training=training, metrics={**outcome.metrics, **found})

    def loss(self, run: DistillTrainer, batch: Any) -> Tensor:
        """Return the loss of a step on the data set, or of one on texts that the student writes for it, where there are such."""
        return run.compute_loss(run.model, dict(run.written(batch)))

    def _encoded(self, texts: Dataset, run: DistillTrainer) -> Dataset:
        tokenizer: Any = run.processing_class
        return encode(self.recipe_task, texts, tokenizer, self.columns, None, self.told["length"])

    def _shortened(self, training: Training) -> Training:
        if training.method not in self.recipes:
            return training
        return replace(training, iterations=max(round(self.further * training.iterations), 1))


@torch.no_grad()
def own_texts(run: DistillTrainer, teacher: str, blocks: Dataset) -> Mapping[str, float]:
    """Return the mean reverse KL to the teacher per token of texts that a model writes, and the teacher's loss on them.

    Args:
        run: the model's Trainer.
        teacher: the folder of the teacher.
        blocks: the blocks of tokens that the texts begin as.
    """
    settings, device = OnPolicy(**TEXTS, seed=0), run.args.device
    judge: Any = AutoModelForCausalLM.from_pretrained(teacher)
    model, judge = run.model.eval(), judge.to(device).eval()
    pen = Pen(settings, {"student": model}, run.processing_class, None)
    divergence, loss, count = 0.0, 0.0, 0
    for first in range(0, len(blocks), 256):
        ids = torch.tensor(blocks[first : first + 256]["input_ids"], device=device)
        batch = pen.write(model, {"input_ids": ids}, [settings.numbers(0, 0, first + row) for row in range(len(ids))])
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        counted = batch["labels"][:, 1:] != -100
        ours, theirs = (one(**inputs).logits[:, :-1][counted] for one in (model, judge))
        divergence += float(reverse_kl(ours, theirs, reduction="sum"))
        loss += float(torch.nn.functional.cross_entropy(theirs, batch["labels"][:, 1:][counted], reduction="sum"))
        count += int(counted.sum())
    return {"reverse KL": divergence / count, "teacher's loss": loss / count}


ON_POLICY = OnPolicyComparison(
    dataset="docstring text, on-policy",
    recipe_task="causal",
    told=dict(length=LENGTH),
    teacher=llama(64, 2),
    student=llama(32, 1),
    rates=(4e-3, 4e-3),
    recipes=METHODS,
    default=(),
    scores={"perplexity": ("eval_perplexity", 2), "reverse KL": ("", 3), "teacher's loss": ("", 3)},
    iterations=900,
    evaluations=2,
    rounds=5,
    vocabulary=1000,
    batch_size=16,
    folder="on_policy",
)
