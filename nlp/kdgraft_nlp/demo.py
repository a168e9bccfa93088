"""``kdgraft demo nlp``: does distilling pay, on text that every machine has, and on a real set of your own?

Two parts. Sentences of docstrings, whose library is to be guessed: a BERT teacher from scratch, a smaller student, plain and with
the recipes for classifiers. The same text as a language model's: a small Llama teaches a smaller one, measured by perplexity. The
same training set and schedule for every student; weights of terms were tuned on the validation split with other seeds; the tables
are of the test split. ``--data DIR`` takes real sentences (``train.jsonl``, ``val.jsonl``) instead.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import transformers
from datasets import Dataset
from transformers import AutoTokenizer, PrinterCallback, TrainerCallback

from kdgraft.bench import interleave
from kdgraft.comparison import Outcome, Progress, check_split, choose, compare
from kdgraft.errors import DistillError
from kdgraft.report import Result

from .data import encode, read_data
from .run import build, with_perplexity
from .tasks import AUTO_CLASSES, task_of
from .text import write_sentences
from .trainer import DistillTrainer

DATA = dict(train=14_000, val=2100, test=4200)
EVALUATIONS = 6


@dataclass(frozen=True)
class Part:
    """A comparison: one teacher, one student, some recipes, one dataset.

    Attributes:
        name: the folder of its results under the demo's own; empty for the first part.
        dataset: its name in tables and results.
        task: as in a recipe file.
        told: the ``data`` entry of a recipe file, without the files.
        teacher, student: (name, config).
        teaching, training: iterations and learning rate of the teacher and of the students.
        recipes: entries of a recipe file by name.
        default: the recipes that run when none are named.
        digits: metric -> digits in the table; the first is the main one.
        vocabulary: entries of the tokenizer, trained on the training set.
        batch: sequences a step.
    """

    name: str
    dataset: str
    task: str
    told: Mapping[str, Any]
    teacher: tuple[str, Mapping[str, Any]]
    student: tuple[str, Mapping[str, Any]]
    teaching: tuple[int, float]
    training: tuple[int, float]
    recipes: Mapping[str, Mapping[str, Any]]
    default: tuple[str, ...]
    digits: Mapping[str, int]
    vocabulary: int = 6000
    batch: int = 32

    @property
    def columns(self) -> tuple[str, str | None]:
        """What the text and the labels are called."""
        return (
            ("tokens", "tags")
            if self.task == "tokens"
            else ("text", "label" if self.task == "classification" else None)
        )

    @property
    def metric(self) -> str:
        """The metric that the gap is measured by."""
        return next(iter(self.digits))

    def figures(self, found: Mapping[str, float]) -> dict[str, float]:
        """The metrics among what the Trainer's evaluation gave."""
        known = with_perplexity({"task": self.task}, found)
        return {metric: known[f"eval_{metric}"] for metric in self.digits}


def bert(width: int, layers: int) -> tuple[str, dict[str, Any]]:
    """A BERT of four heads: its name and its config."""
    sizes = dict(hidden_size=width, num_hidden_layers=layers, num_attention_heads=4, intermediate_size=4 * width)
    return f"BERT {layers} × {width}", dict(model_type="bert", **sizes, max_position_embeddings=64)


def llama(width: int, layers: int) -> tuple[str, dict[str, Any]]:
    """A Llama of four heads: its name and its config."""
    sizes = dict(hidden_size=width, num_hidden_layers=layers, num_attention_heads=4, intermediate_size=2 * width)
    return f"Llama {layers} × {width}", dict(model_type="llama", **sizes, max_position_embeddings=64)


_SOFT = dict(temperature=4.0)
CLASSIFIERS: dict[str, dict[str, Any]] = {
    # Temperature and weight of the soft targets were tuned on the validation sentences with seed 100; the rest is the papers'.
    "tinybert": dict(recipe=dict(type="tinybert", logits=2.0, **_SOFT)),
    "minilm": dict(recipe="minilm", terms=[dict(type="SoftTargets", weight=2.0, **_SOFT)]),
    "minilmv2": dict(recipe="minilmv2", terms=[dict(type="SoftTargets", weight=2.0, **_SOFT)]),
    "distilbert": dict(recipe=dict(type="distilbert", soft=2.0, **_SOFT)),
    "pkd": dict(recipe=dict(type="pkd", soft=2.0, **_SOFT)),
    "mobilebert": dict(recipe="mobilebert"),
    # What tinybert is without attention, hidden states and embeddings.
    "soft_targets": dict(terms=[dict(type="SoftTargets", weight=2.0, **_SOFT)]),
}
TAGGERS = {name: recipe for name, recipe in CLASSIFIERS.items() if name != "pkd"}
"""Without what looks at a sentence's first token alone."""
LANGUAGE_MODELS: dict[str, dict[str, Any]] = {
    "gkd": dict(recipe="gkd"),
    # The paper's 5 : 1 : 2, the last being the host's loss.
    "distilbert": dict(recipe=dict(type="distilbert", soft=2.5, cosine=0.5)),
}
DEFAULT = ("tinybert",)

SENTENCES = Part(
    name="",
    dataset="docstring sentences",
    task="classification",
    told=dict(length=48),
    teacher=bert(128, 4),
    student=bert(32, 2),
    teaching=(1000, 5e-4),
    training=(1000, 2e-3),
    recipes=CLASSIFIERS,
    default=DEFAULT,
    digits={"accuracy": 3, "macro_f1": 3},
)
TAGS = replace(SENTENCES, name="tags", task="tokens", recipes=TAGGERS, digits={"span_f1": 3, "accuracy": 3})
LANGUAGE = Part(
    name="language_model",
    dataset="docstring text",
    task="causal",
    told=dict(length=64),
    teacher=llama(128, 4),
    student=llama(32, 2),
    teaching=(1000, 2e-3),
    training=(1000, 4e-3),
    recipes=LANGUAGE_MODELS,
    default=("gkd", "distilbert"),
    digits={"perplexity": 2},
    vocabulary=2000,
    batch=8,
)


@dataclass
class Trained(Outcome):
    """A trained model with its Trainer."""

    trainer: DistillTrainer


class _Watch(TrainerCallback):
    """Rewrites the line of progress as the Trainer goes."""

    def __init__(self, progress: Progress, part: Part) -> None:
        self.progress, self.part = progress, part
        self.loss = math.nan
        self.score: float | None = None

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        if "loss" in (logs or {}):
            self.loss = (logs or {})["loss"]
            if state.global_step < state.max_steps:
                self.progress.show(state.global_step, self.loss, self.score)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.progress.show(state.global_step, self.loss, self.score)

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: dict[str, float] | None = None, **_: Any
    ) -> None:
        self.score = self.part.figures(metrics or {})[self.part.metric]


def train(
    part: Part,
    method: str,
    sets: Mapping[str, Dataset],
    folder: Path,
    seed: int,
    iterations: int | None = None,
    teacher: Path | None = None,
    device: str = "cpu",
) -> Trained:
    """Trains one model through the host's Trainer, saves it in ``folder`` and evaluates it on ``sets["test"]``.

    Args:
        part: what to train.
        method: ``"teacher"``, ``"plain"`` or a recipe's name.
        sets: ``train``, ``eval`` and ``test``.
        folder: for the model and its tokenizer.
        seed: of the weights, of what is drawn, of the order.
        iterations: the part's own by default.
        teacher: its folder, for students.
        device: ``"cpu"`` or ``"cuda"``.
    """
    planned, rate = part.teaching if teacher is None else part.training
    steps = iterations or planned
    config = dict(
        task=part.task,
        data=dict(part.told),
        tokenizer=dict(vocab_size=part.vocabulary) if teacher is None else str(teacher),
        student=(part.teacher if teacher is None else part.student)[1],
        output=str(folder),
        training=dict(
            max_steps=steps,
            per_device_train_batch_size=part.batch,
            per_device_eval_batch_size=128,
            learning_rate=rate,
            lr_scheduler_type="cosine",
            warmup_steps=0.1,
            weight_decay=0.01,
            train_sampling_strategy="group_by_length",
            logging_steps=max(steps // 30, 1),
            eval_strategy="steps",
            eval_steps=max(steps // EVALUATIONS, 1),
            save_strategy="no",
            disable_tqdm=True,
            log_level="error",
            use_cpu=device == "cpu",
            seed=seed,
        ),
        **({"teacher": str(teacher), **part.recipes[method]} if method in part.recipes else {}),
    )
    trainer = build(config, {split: sets[split] for split in ("train", "eval")})
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(_Watch(Progress(f"{method} (seed {seed})", steps, part.metric, sys.stdout), part))
    trainer.train()
    trainer.save_model()
    curves = _curves(trainer.state.log_history, part)
    tokenizer: Any = trainer.processing_class
    names = [trainer.model.config.id2label[i] for i in range(trainer.model.config.num_labels)]
    tested = encode(part.task, sets["test"], tokenizer, part.columns, names, part.told["length"])
    metrics = part.figures(trainer.evaluate(tested))
    own = [p for name, p in trainer.model.named_parameters() if not name.startswith("distiller.")]
    metrics["parameters (k)"] = sum(p.numel() for p in own) / 1e3
    return Trained(method, seed, metrics, trainer, curves=curves)


def _curves(history: Sequence[Mapping[str, float]], part: Part) -> dict[str, list[tuple[int, float]]]:
    """The host's loss, every term's figures and the validation score from what the Trainer logged."""
    curves: dict[str, list[tuple[int, float]]] = {}
    for entry in history:
        step = int(entry["step"])
        if "eval_loss" in entry:
            curves.setdefault("validation", []).append((step, part.figures(entry)[part.metric]))
        elif "loss" in entry:
            curves.setdefault("task_loss", []).append((step, entry.get("task_loss", entry["loss"])))
            for key, value in entry.items():
                if key.startswith("distill."):
                    curves.setdefault(key, []).append((step, value))
    return curves


def time_steps(runs: Sequence[Trained], rounds: int = 20) -> dict[str, float]:
    """Milliseconds of a training step (forward, loss, backward) of each method, timed in turn on one batch: medians."""
    first = runs[0].trainer
    batch = next(iter(first.get_train_dataloader()))  # on the device, as accelerate prepares it

    def step(trainer: Any) -> Callable[[], None]:
        def run() -> None:
            trainer.compute_loss(trainer.model.train(), dict(batch)).backward()
            trainer.model.zero_grad()

        return run

    seconds = interleave({run.method: step(run.trainer) for run in runs}, rounds, device=first.args.device.type)
    return {method: float(np.median(values)) * 1e3 for method, values in seconds.items()}


def draw_attention(runs: Sequence[Trained], text: str | list[str], path: Path) -> None:
    """The last layer's attention maps on one sentence: a row a model, a column a head."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found = []
    for run in runs:
        folder = str(run.trainer.args.output_dir)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AUTO_CLASSES[task_of(run.trainer.model)].from_pretrained(folder, attn_implementation="eager").eval()
        inputs = tokenizer(text, return_tensors="pt", is_split_into_words=isinstance(text, list))
        with torch.no_grad():
            maps = model(**inputs, output_attentions=True).attentions[-1][0]
        found.append((run.method, tokenizer.convert_ids_to_tokens(inputs["input_ids"][0]), maps.numpy()))
    heads = max(len(maps) for _, _, maps in found)
    shape = (2.3 * heads + 0.8, 2.3 * len(found) + 0.5)
    figure, axes = plt.subplots(len(found), heads, figsize=shape, squeeze=False, layout="constrained")
    last = len(found) - 1
    for place, (row, (method, tokens, maps)) in enumerate(zip(axes, found, strict=True)):
        for head, axis in enumerate(row):
            if head >= len(maps):
                axis.set_axis_off()
                continue
            axis.imshow(maps[head], cmap="viridis", vmin=0, vmax=maps.max())
            axis.set_xticks(
                range(len(tokens)), tokens if place == last else [""] * len(tokens), rotation=90, fontsize=6
            )
            axis.set_yticks(range(len(tokens)), tokens if head == 0 else [""] * len(tokens), fontsize=6)
            axis.set_title(f"{method}, head {head + 1}", fontsize=8)
    figure.suptitle("attention of the last layer: a row is what a token looks at", fontsize=9)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def read_real(root: Path, fraction: float) -> list[tuple[Part, dict[str, Dataset]]]:
    """A real set's parts: sentences with a ``label`` are classified, ``tokens`` with ``tags`` are tagged.

    Args:
        root: a folder with ``train.jsonl`` and ``val.jsonl``, lines of ``{"text": …, "label": …}``, or with ``tokens`` (a list of
            words) in place of ``text``, and ``tags`` (one a word) in place of ``label`` or beside it.
        fraction: the share of the training set to use.

    Raises:
        DistillError: a file or the columns are not there.
    """
    for name in ("train.jsonl", "val.jsonl"):
        if not (root / name).is_file():
            raise DistillError(f"--data {root}: no {name}; a set has train.jsonl and val.jsonl")
    read = read_data(dict(train=root / "train.jsonl", eval=root / "val.jsonl"))
    columns = set(read["train"].column_names) & set(read["eval"].column_names)
    words = "tokens" in columns
    if not words and "text" not in columns:
        raise DistillError(f"--data {root}: train.jsonl and val.jsonl need a column 'text', or 'tokens'")
    # There is no third split: tables are of val, and nothing may be tuned on them.
    sets = {**read, "test": read["eval"]}
    parts: list[tuple[Part, dict[str, Dataset]]] = []
    told = dict(SENTENCES.told, fraction=fraction)
    if "label" in columns:
        part = replace(SENTENCES, dataset=root.name, told=told)
        joined = {k: v.map(lambda row: {"text": " ".join(row["tokens"])}) for k, v in sets.items()} if words else sets
        parts.append((part, joined))
    if words and "tags" in columns:
        tagging = replace(TAGS, name=TAGS.name if parts else "", dataset=f"{root.name}, tags", told=told)
        parts.append((tagging, sets))
    if not parts:
        raise DistillError(f"--data {root}: train.jsonl and val.jsonl need a column 'label', or 'tokens' and 'tags'")
    return parts


def _embedded(folder: Path, split: str) -> list[tuple[Part, dict[str, Dataset]]]:
    """The docstrings' parts, written to ``folder``; tables are of ``split``."""
    write_sentences(folder, DATA)
    read = {name: read_data(dict(train=folder / f"{name}.jsonl"))["train"] for name in ("train", "val", split)}
    sets = {"train": read["train"], "eval": read["val"], "test": read[split]}
    return [(SENTENCES, sets), (LANGUAGE, sets)]


def main(
    seeds: int = 1,
    recipes: str = "default",
    out: str | Path = "runs/demo/nlp",
    device: str = "cpu",
    iterations: int | None = None,
    first_seed: int = 0,
    split: str = "test",
    data: str | None = None,
    fraction: float = 1.0,
) -> list[Result]:
    """Trains everything, prints the tables and writes ``results.csv``, ``table.md``, ``attention.png``, ``curves.png`` to ``out``.

    Args:
        seeds, first_seed: how many seeds, and the first of them.
        recipes: ``"default"``, ``"all"``, ``"none"``, or names with commas between; a part without any of the names is left out.
        out: where results go; those of later parts go to folders in it.
        device: ``"cpu"`` keeps a machine's GPUs out of it.
        iterations: of every training; the parts' own by default.
        split: ``"val"`` to tune on (with other seeds than the table's).
        data: a real set's folder (see :func:`read_real`) instead of the docstrings.
        fraction: the share of a real set's training sentences to use, drawn with the seed.
    """
    check_split(split)
    if device == "cuda" and not torch.cuda.is_available():
        raise DistillError("no CUDA device here; use the device 'cpu'")
    known = list(dict.fromkeys(name for part in (SENTENCES, LANGUAGE) for name in part.recipes))
    chosen = choose(recipes, known, known)
    folder = Path(out)
    tested = "val split" if data is not None or split == "val" else "test split"
    results = []
    with _quiet():
        parts = _embedded(folder / "data", split) if data is None else read_real(Path(data), fraction)
        for part, sets in parts:
            names = list(part.default) if recipes == "default" else [name for name in chosen if name in part.recipes]
            if names or recipes == "none":
                run = partial(_train_all, part, sets, names, folder / part.name, iterations, device)
                results += _compare(part, sets, run, folder / part.name, range(first_seed, first_seed + seeds), tested)
    return results


def _train_all(
    part: Part,
    sets: Mapping[str, Dataset],
    names: Sequence[str],
    folder: Path,
    iterations: int | None,
    device: str,
    seed: int,
) -> list[Trained]:
    work = folder / f"seed{seed}"

    def fit(method: str, teacher: Path | None = None) -> Trained:
        return train(part, method, sets, work / method, seed, iterations, teacher, device)

    found = [fit("teacher")]
    found += [fit(name, work / "teacher") for name in ("plain", *names)]
    steps = time_steps(found)
    for trained in found:
        trained.metrics["step (ms)"] = steps[trained.method]
    return found


def _compare(
    part: Part,
    sets: Mapping[str, Dataset],
    run: Callable[[int], Sequence[Trained]],
    folder: Path,
    seeds: Sequence[int],
    tested: str,
) -> list[Result]:
    texts = sets["test"][part.columns[0]]
    short = [text for text in texts if len(text if isinstance(text, list) else text.split()) <= 12]
    return compare(
        "nlp",
        part.dataset,
        folder,
        seeds,
        run,
        models=lambda method: (part.teacher if method == "teacher" else part.student)[0],
        digits={**part.digits, "parameters (k)": 0, "step (ms)": 1},
        draw=lambda runs: draw_attention(runs, (short or texts)[0], folder / "attention.png"),  # type: ignore[arg-type]
        tested=tested,
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """The library's bars and remarks, off and on again."""
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
