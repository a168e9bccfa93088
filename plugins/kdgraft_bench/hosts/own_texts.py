"""How well a teacher likes the texts that a language model writes by itself: what on-policy distillation makes smaller."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM

from kdgraft.losses import reverse_kl
from kdgraft_nlp import DistillTrainer, OnPolicy
from kdgraft_nlp.pen import Pen

PROMPT = 8
"""The tokens of a block that a text begins as."""


@torch.no_grad()
def own_texts(run: DistillTrainer, teacher: str, blocks: Dataset) -> Mapping[str, float]:
    """Return the mean reverse KL to the teacher per token of texts that a model writes, and the teacher's loss on them.

    Args:
        run: the model's Trainer.
        teacher: the folder of the teacher.
        blocks: the blocks of tokens that the texts begin as.
    """
    device = run.args.device
    length = len(blocks[0]["input_ids"]) - PROMPT
    # Blocks of joined sentences go on after a sentence, and so do the texts, which are as long.
    settings = OnPolicy(max_new_tokens=length, prompt=PROMPT, eos_token_id=[], seed=0)
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
