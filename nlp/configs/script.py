"""The options of the three scripts, and their three trainings."""

from __future__ import annotations

import argparse
from typing import Any

from kdgraft_nlp.run import build, with_perplexity


def main(
    task: str,
    teacher: dict[str, Any],
    student: dict[str, Any],
    teacher_training: Any,
    training: Any,
    **distillation: Any,
) -> None:
    """Train a teacher (unless one is given), the plain student and the distilled student, and print their scores."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--train", required=True)
    parser.add_argument("--eval", required=True)
    parser.add_argument("--out", default="runs/nlp")
    parser.add_argument("--teacher", help="a folder of save_pretrained, with its tokenizer")
    parser.add_argument("--vocabulary", type=int, default=4000, help="entries of the tokenizer that is trained")
    parser.add_argument("--epochs", type=float)
    parser.add_argument("--seed", type=int, default=0)
    told = parser.parse_args()
    data = dict(train=told.train, eval=told.eval, length=64)
    more = dict(seed=told.seed, save_strategy="no", disable_tqdm=True)
    if told.epochs is not None:
        more["num_train_epochs"] = told.epochs

    def fit(name: str, model: Any, how: Any, **settings: Any) -> str:
        folder = f"{told.out}/{name}"
        trainer = build(dict(task=task, data=data, student=model, training={**how, **more}, output=folder, **settings))
        trainer.train()
        trainer.save_model()
        found = with_perplexity({"task": task}, trainer.evaluate())
        wanted = {
            k.removeprefix("eval_"): round(v, 4)
            for k, v in found.items()
            if k.split("_")[-1] in ("loss", "accuracy", "f1", "perplexity")
        }
        print(f"{name}: {wanted}")
        return folder

    folder = told.teacher
    if folder is None:
        folder = fit("teacher", teacher, teacher_training, tokenizer=dict(vocab_size=told.vocabulary))
    fit("plain", student, training, tokenizer=folder)
    fit("distilled", student, training, tokenizer=folder, teacher=folder, **distillation)
