"""Comparisons of models that Hugging Face's Trainer trains."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import datasets
import torch
import transformers
from datasets import Dataset
from torch import Tensor
from tqdm import tqdm
from transformers import PrinterCallback, TrainerCallback

from kdgraft.registry import expand_recipe
from kdgraft_nlp import RECIPES, DistillTrainer
from kdgraft_nlp.data import encode, read
from kdgraft_nlp.run import build, with_perplexity
from kdgraft_nlp.settings import encoding

from ..comparison import Comparison, Outcome, Training
from ..finished import code
from ..pictures import Curves
from .attention import draw_attention


@dataclass(frozen=True, kw_only=True)
class TrainerComparison(Comparison):
    """A comparison of models that Hugging Face's Trainer trains, as from recipe files.

    Attributes:
        recipe_task: the ``task`` of a recipe file.
        told: its ``data`` entry, without the files.
        rates: the learning rates of the teacher and of the students.
        vocabulary: the number of entries of the tokenizer, which is trained on the training set.
        batch_size: the sequences of a step.
    """

    costs: ClassVar[Mapping[str, int]] = {"parameters (k)": 0, "step (ms)": 1}
    task: str = "nlp"
    iterations: int = 1000
    tested: str = "test split"
    picture: str = "attention.png"
    recipe_task: str
    told: Mapping[str, Any]
    rates: tuple[float, float]
    vocabulary: int = 6000
    batch_size: int = 32

    @property
    def columns(self) -> tuple[str, str | None]:
        """The columns of texts and of labels."""
        if self.recipe_task == "tokens":
            return "tokens", "tags"
        return "text", "label" if self.recipe_task == "classification" else None

    def figures(self, found: Mapping[str, Any]) -> dict[str, float]:
        """Pick the metrics out of an evaluation, with the perplexity in addition."""
        return super().figures(with_perplexity({"task": self.recipe_task}, found))

    def sets(self, data: Path, split: str = "test") -> dict[str, Dataset]:
        """Read the sets ``train``, ``eval`` and ``test``; words are joined if the task needs texts."""
        names = dict(train="train", eval="val", test=split)
        found = {name: read(str(data / f"{self.splits[part]}.jsonl")) for name, part in names.items()}
        if self.recipe_task != "tokens" and all("tokens" in each.column_names for each in found.values()):
            found = {name: each.map(lambda row: {"text": " ".join(row["tokens"])}) for name, each in found.items()}
        return found

    def config(self, training: Training) -> dict[str, Any]:
        """Return the entries of a recipe file for this training."""
        teaches, teacher, steps = training.method == "teacher", str(training.teacher.folder), training.iterations
        return dict(
            task=self.recipe_task,
            data=dict(self.told),
            tokenizer=dict(vocab_size=self.vocabulary) if teaches else teacher,
            student=(self.teacher if teaches else self.student)[1],
            output=str(training.folder),
            training=dict(
                max_steps=steps,
                per_device_train_batch_size=self.batch_size,
                per_device_eval_batch_size=128,
                learning_rate=self.rates[0 if teaches else 1],
                lr_scheduler_type="cosine",
                warmup_steps=0.1,
                weight_decay=0.01,
                train_sampling_strategy="group_by_length",
                logging_steps=max(steps // 30, 1),
                eval_strategy="steps",
                eval_steps=self.every(steps),
                save_strategy="no",
                disable_tqdm=True,
                log_level="error",
                use_cpu=training.device == "cpu",
                seed=training.seed,
            ),
            **({"teacher": teacher, **self.recipes[training.method]} if training.method in self.recipes else {}),
        )

    def entered(self, device: str) -> AbstractContextManager[None]:
        """Silence the library while the body runs; the config of a training chooses the device."""
        return quiet()

    def settings(self, training: Training) -> dict[str, Any]:
        """Return the recipe files of the training and of its teacher, the terms of the recipe and the versions of the code."""
        moved = replace(training, data=Path("data"), root=Path("work"))
        recipe = self.recipes.get(training.method, {}).get("recipe")
        return dict(
            config=self.config(moved),
            teacher=self.config(moved.teacher) if training.method in self.recipes else self.vocabulary,
            tested=self.splits[training.split],
            terms=expand_recipe(recipe, RECIPES) if recipe is not None else None,
            versions=[code("kdgraft", "kdgraft_nlp", "kdgraft_bench"), torch.__version__, transformers.__version__],
        )

    def weights(self, training: Training) -> Path:
        return training.folder / "model.safetensors"

    def train(self, training: Training) -> Outcome:
        """Train, save and test a model through the Trainer, and count its parameters."""
        sets = self.sets(training.data, training.split)
        with training.progress() as bar:
            trainer = self._trainer(self.config(training), sets)
            trainer.add_callback(_Watch(bar, self))
            trainer.train()
        trainer.save_model()
        curves = self._curves(trainer.state.log_history)
        tokenizer: Any = trainer.processing_class
        names = [trainer.model.config.id2label[i] for i in range(trainer.model.config.num_labels)]
        how = encoding(self.config(training))
        tested = encode(self.recipe_task, sets["test"], tokenizer, self.columns, names, **how)
        metrics = self.figures(trainer.evaluate(tested))
        own = [p for name, p in trainer.model.named_parameters() if not name.startswith("distiller.")]
        metrics["parameters (k)"] = sum(p.numel() for p in own) / 1e3
        return Outcome(training, metrics, trainer, curves)

    def restore(self, training: Training) -> DistillTrainer:
        """Build the Trainer of the saved student. The parameters of its terms are not saved."""
        saved = str(training.folder)
        return self._trainer({**self.config(training), "student": saved, "tokenizer": saved}, self.sets(training.data))

    def batch(self, run: DistillTrainer) -> Any:
        """Return the first batch of the training set, on the device."""
        return next(iter(run.get_train_dataloader()))

    def loss(self, run: DistillTrainer, batch: Any) -> Tensor:
        return run.compute_loss(run.model, dict(batch))

    def draw(self, outcomes: Sequence[Outcome], path: Path) -> None:
        """Draw the attention maps on a short sentence of the test set."""
        training = outcomes[0].training
        texts = self.sets(training.data, training.split)["test"][self.columns[0]]
        short = (text for text in texts if len(text if isinstance(text, list) else text.split()) <= 12)
        folders = {outcome.method: str(outcome.training.folder) for outcome in outcomes}
        draw_attention(folders, self.recipe_task, next(short, texts[0]), path)

    def _trainer(self, config: Mapping[str, Any], sets: Mapping[str, Dataset]) -> DistillTrainer:
        trainer = build(config, {split: sets[split] for split in ("train", "eval")})
        trainer.remove_callback(PrinterCallback)
        return trainer

    def _curves(self, history: Sequence[Mapping[str, float]]) -> Curves:
        """Return the host's loss, the terms' figures and the validation score from the Trainer's log."""
        curves: Curves = {}
        for entry in history:
            step = int(entry["step"])
            if "eval_loss" in entry:
                curves.setdefault("validation", []).append((step, self.figures(entry)[self.metric]))
            elif "loss" in entry:
                curves.setdefault("task_loss", []).append((step, entry.get("task_loss", entry["loss"])))
                for key, value in entry.items():
                    if key.startswith("distill."):
                        curves.setdefault(key, []).append((step, value))
        return curves


@dataclass(frozen=True, kw_only=True)
class TokenizerComparison(TrainerComparison):
    """A comparison of language models in which the students have another tokenizer than their teacher, and texts stay apart.

    Attributes:
        student_vocabulary: the number of entries of the students' tokenizer, which is trained on the training set.
    """

    student_vocabulary: int = 1000

    def config(self, training: Training) -> dict[str, Any]:
        found = super().config(training)
        if training.method != "teacher":
            found["tokenizer"] = dict(vocab_size=self.student_vocabulary)
        if training.method in self.recipes:
            found["teacher_tokenizer"] = True
        return found

    def batches(self, runs: Sequence[DistillTrainer]) -> list[Any]:
        """Return each model's first batch, in its own tokens."""
        return [self.batch(run) for run in runs]


class _Watch(TrainerCallback):
    """Updates the progress bar after each step of the Trainer."""

    def __init__(self, bar: tqdm, comparison: TrainerComparison) -> None:
        self.bar, self.comparison, self.shown = bar, comparison, dict[str, float]()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.bar.set_postfix(self.shown, refresh=False)
        self.bar.update()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        if logs and "loss" in logs:
            self.shown["loss"] = logs["loss"]

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: dict[str, float] | None = None, **_: Any
    ) -> None:
        self.shown[self.comparison.metric] = self.comparison.figures(metrics or {})[self.comparison.metric]


def bert(width: int, layers: int) -> tuple[str, dict[str, Any]]:
    """Return name and config of a BERT of four heads."""
    sizes = dict(hidden_size=width, num_hidden_layers=layers, num_attention_heads=4, intermediate_size=4 * width)
    return f"BERT {layers} × {width}", dict(model_type="bert", **sizes, max_position_embeddings=64)


def llama(width: int, layers: int) -> tuple[str, dict[str, Any]]:
    """Return name and config of a Llama of four heads."""
    sizes = dict(hidden_size=width, num_hidden_layers=layers, num_attention_heads=4, intermediate_size=2 * width)
    return f"Llama {layers} × {width}", dict(model_type="llama", **sizes, max_position_embeddings=64)


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
