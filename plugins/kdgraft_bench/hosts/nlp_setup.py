"""Small text models, their data and their schedules: docstrings, which every machine has, or a real set of the user's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import transformers

from kdgraft.errors import DistillError
from kdgraft_nlp.data import read

from ..data import check_layout
from ..data.docstrings import write_sentences

DATA = dict(train=14_000, val=2100, test=4200)
CHECKPOINTS = 5
"""The number of checkpoints of a training, to resume from."""


@dataclass(frozen=True, kw_only=True)
class TextSetup:
    """Training of models of one task, as a recipe file says it.

    Attributes:
        task: the ``task`` of a recipe file.
        told: its ``data`` entry, without the files.
        rate: the learning rate.
        iterations: the steps of a training.
        evaluations: the number of evaluations of a training on the validation split.
        vocabulary: the number of entries of the tokenizer, which is trained on the training set.
        batch_size: the sequences of a step.
    """

    task: str
    told: Mapping[str, Any]
    rate: float
    iterations: int = 1000
    evaluations: int = 6
    vocabulary: int = 6000
    batch_size: int = 32

    def config(self, model: Any, files: Mapping[str, str], steps: int) -> dict[str, Any]:
        """Return the entries of a recipe file: AdamW, warm-up and cosine, for teachers and students alike.

        Args:
            model: the config of the model, or the folder of a saved one.
            files: ``train`` and ``eval``.
            steps: the steps of the training.
        """
        return dict(
            task=self.task,
            data={**self.told, **files},
            tokenizer=dict(vocab_size=self.vocabulary),
            student=model,
            training=dict(
                max_steps=steps,
                per_device_train_batch_size=self.batch_size,
                per_device_eval_batch_size=128,
                learning_rate=self.rate,
                lr_scheduler_type="cosine",
                warmup_steps=0.1,
                weight_decay=0.01,
                train_sampling_strategy="group_by_length",
                logging_steps=max(steps // 30, 1),
                eval_strategy="steps",
                eval_steps=max(steps // self.evaluations, 1),
                save_strategy="steps",
                save_steps=max(steps // CHECKPOINTS, 1),
                save_total_limit=1,
                report_to=[],
                disable_tqdm=True,
                log_level="error",
            ),
        )


CLASSIFICATION = TextSetup(task="classification", told=dict(length=48), rate=2e-3)
TOKENS = TextSetup(task="tokens", told=dict(length=48), rate=2e-3)
CAUSAL = TextSetup(task="causal", told=dict(length=64), rate=4e-3, vocabulary=2000, batch_size=8)


def own_set(root: Path) -> tuple[str, ...]:
    """Return the tasks of a real set: sentences with a ``label`` are classified, ``tokens`` with ``tags`` are tagged.

    Args:
        root: a folder with ``train.jsonl`` and ``val.jsonl``, lines of ``{"text": …, "label": …}``, or with ``tokens`` (a list of
            words) in place of ``text``, and ``tags`` (one for each word) in place of ``label`` or beside it.

    Raises:
        DistillError: a file or a column is missing.
    """
    check_layout(root, ("train.jsonl", "val.jsonl"), "train.jsonl and val.jsonl")
    columns = set.intersection(*(set(read(str(root / f"{name}.jsonl")).column_names) for name in ("train", "val")))
    words = "tokens" in columns
    if not words and "text" not in columns:
        raise DistillError(f"--data {root}: train.jsonl and val.jsonl need a column 'text', or 'tokens'")
    found = (*(["classification"] if "label" in columns else []), *(["tokens"] if words and "tags" in columns else []))
    if not found:
        raise DistillError(f"--data {root}: train.jsonl and val.jsonl need a column 'label', or 'tokens' and 'tags'")
    return found


def write_data(folder: Path) -> Path:
    """Write the sentences to a folder; return it."""
    return write_sentences(folder, DATA)


def bert(width: int, layers: int) -> dict[str, Any]:
    """Return the config of a BERT of four heads."""
    sizes = dict(hidden_size=width, num_hidden_layers=layers, num_attention_heads=4, intermediate_size=4 * width)
    return dict(model_type="bert", **sizes, max_position_embeddings=64)


def llama(width: int, layers: int) -> dict[str, Any]:
    """Return the config of a Llama of four heads."""
    sizes = dict(hidden_size=width, num_hidden_layers=layers, num_attention_heads=4, intermediate_size=2 * width)
    return dict(model_type="llama", **sizes, max_position_embeddings=64)


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the library's progress bars and messages while the body runs."""
    level, bars = transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(level)
        datasets.enable_progress_bars()
        if bars:
            transformers.logging.enable_progress_bar()
