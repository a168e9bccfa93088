"""What the benchmark asks of Hugging Face."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import ceil
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import yaml
from torch import Tensor

from kdgraft.errors import DistillError, nearest
from kdgraft.files import written_whole
from kdgraft.hosts import Job, TrainedModel
from kdgraft.plans import PlannedRun
from kdgraft_nlp.data import read
from kdgraft_nlp.recipe_trainer import TRAINER
from kdgraft_nlp.run import build, plain_trainer, with_perplexity
from kdgraft_nlp.settings import load
from kdgraft_nlp.trainer import DistillTrainer

from .. import trl_gkd
from ..decisions import Decisions
from ..spec import Benchmark, Model
from .attention import draw_attention
from .base import BenchHost, Dataset, Opened, Step, Tested, endless
from .nlp_setup import CAUSAL, CLASSIFICATION, TOKENS, TextSetup, bert, llama, own_set, quiet, write_data
from .own_texts import own_texts
from .pretrained import minilm, some_layers

SETUPS: dict[str, TextSetup] = {
    "bert": CLASSIFICATION,
    "minilm": CLASSIFICATION,
    "bert_tagger": TOKENS,
    "llama": CAUSAL,
}
"""The setup of each small model."""
FINE_TUNING = 1e-4
"""The learning rate of a pretrained model."""
DATA_ARGUMENTS = ("length", "joined")
"""The arguments of a small model that are entries of ``data``."""
IGNORED = -100
TRL = f"{trl_gkd.__file__}:trl_gkd"


class TextBench(BenchHost):
    """The benchmark's part of Hugging Face."""

    scores: ClassVar = {
        "accuracy": ("accuracy", 3),
        "macro_f1": ("macro_f1", 3),
        "span_f1": ("span_f1", 3),
        "perplexity": ("perplexity", 2),
    }
    lengths = ("training.max_steps",)
    models = tuple(SETUPS)
    peers = ("trl_gkd",)
    embedded = "docstring sentences"
    picture = "attention"

    def named(self, found: Mapping[str, float]) -> dict[str, float]:
        """Return those metrics that the task has."""
        return {name: float(value) for name, value in found.items() if name != "loss" or len(found) == 1}

    def dataset(self, benchmark: Benchmark) -> Dataset:
        names = {str(model.settings["model"]) for model in _models(benchmark) if model.config is None}
        if benchmark.data is None:
            return Dataset(self.embedded, _embedded(benchmark.out / "data")) if names else Dataset("own data", None)
        root = Path(benchmark.data)
        with quiet():
            wanted = {SETUPS[name].task for name in names if name in SETUPS} - {
                "causal"
            }  # an unknown one is refused later
            missing = wanted - {*own_set(root)}
            if missing:
                raise DistillError(f"data {root}: there are no columns for the task {', '.join(sorted(missing))}")
            columns = read(str(root / "val.jsonl")).column_names
        if "text" in columns or wanted == {"tokens"}:
            return Dataset(root.resolve().name, root, root)
        return Dataset(root.resolve().name, _joined(root, benchmark.out / "data"), root)

    def config(self, model: Model, dataset: Dataset, benchmark: Benchmark, name: str) -> tuple[str, dict[str, Any]]:
        found = self._small(model, dataset, benchmark) if model.config is None else load(model.config)
        if benchmark.texts is not None and found["task"] != "causal":
            raise DistillError(f"texts are of language models, the task is {found['task']}; leave texts out")
        options = {} if benchmark.fraction is None else {"data.fraction": benchmark.fraction}
        if model.config is not None and dataset.real is None:
            return model.config, options
        if model.config is not None:
            found["data"] = {**found["data"], **self._files(dataset)}
        return _written(found, benchmark, name), options

    def peer(self, peer: Model, student: str, dataset: Dataset, benchmark: Benchmark) -> tuple[str, dict[str, Any]]:
        if peer.settings.get("model") not in self.peers:
            return super().peer(peer, student, dataset, benchmark)
        path, options = self.config(benchmark.students[student], dataset, benchmark, student)
        found = load(path)
        if found["task"] != "causal":
            raise DistillError(f"the peer trl_gkd trains language models, the task is {found['task']}; leave it out")
        for key in peer.settings:
            if key not in ("model", "beta"):
                raise DistillError(f"the peer trl_gkd takes no {key!r}{nearest(key, ('beta',))}")
        own = {key: value for key, value in peer.settings.items() if key != "model"}
        found["trainer"] = {"type": TRL, **own}
        told = _written(found, benchmark, f"{student}-trl_gkd")
        return told, {**options, "trainer.teacher": "{teacher.weights}"}

    def _small(self, model: Model, dataset: Dataset, benchmark: Benchmark) -> dict[str, Any]:
        name = str(model.settings["model"])
        sizes = ("layers", "rate") if name == "minilm" else ("width", "layers", "rate", "vocabulary")
        told = self.known(model.settings, (*sizes, *(DATA_ARGUMENTS if name == "llama" else ("length",))))
        made: Any
        if name == "minilm":
            made = minilm() if "layers" not in told else some_layers(told["layers"], benchmark.out.resolve() / "models")
            made = str(made)
        else:
            made = (llama if name == "llama" else bert)(told.get("width", 32), told.get("layers", 2))
        setup = SETUPS[name]
        setup = replace(
            setup,
            told={**setup.told, **{key: told[key] for key in DATA_ARGUMENTS if key in told}},
            rate=told.get("rate", FINE_TUNING if name == "minilm" else setup.rate),
            vocabulary=told.get("vocabulary", setup.vocabulary),
            batch_size=benchmark.batch or setup.batch_size,
        )
        found = setup.config(made, self._files(dataset), benchmark.iterations or setup.iterations)
        if benchmark.teacher.settings.get("model") == "minilm":  # all models read its tokens
            found["tokenizer"] = str(minilm())
        return found

    def _files(self, dataset: Dataset, split: str = "val") -> dict[str, str]:
        assert dataset.folder is not None
        there = {name: dataset.folder.resolve() / f"{name}.jsonl" for name in ("train", split)}
        return {"train": str(there["train"]), "eval": str(there[split])}

    def test(self, run: PlannedRun, trained: TrainedModel, dataset: Dataset, split: str) -> Tested:
        with quiet(), tempfile.TemporaryDirectory() as scratch:
            trainer, config = self._opened(run, trained, dataset, split, scratch)
            found = with_perplexity(config, trainer.evaluate())
            metrics = {key.removeprefix("eval_"): value for key, value in found.items() if not _is_time(key)}
            return Tested(self.named(metrics), _decisions(trainer, str(config["task"])))

    def _opened(
        self, run: PlannedRun, trained: TrainedModel, dataset: Dataset, split: str, scratch: str
    ) -> tuple[DistillTrainer, dict[str, Any]]:
        options = [f"{key}={value}" for key, value in run.options.items()]
        if dataset.folder is not None and split == "test" and dataset.real is None:
            options.append(f"data.eval={self._files(dataset, 'test')['eval']}")
        return plain_trainer(run.config, trained.weights, options, scratch)

    def texts(
        self, run: PlannedRun, trained: TrainedModel, teacher: TrainedModel, dataset: Dataset, split: str, count: int
    ) -> Mapping[str, float]:
        with quiet(), tempfile.TemporaryDirectory() as scratch:
            trainer, _ = self._opened(run, trained, dataset, split, scratch)
            blocks: Any = trainer.eval_dataset
            return own_texts(trainer, teacher.weights, blocks.select(range(min(count, len(blocks)))))

    def open(self, run: PlannedRun, trained: TrainedModel, dataset: Dataset) -> Opened:
        with quiet(), tempfile.TemporaryDirectory() as scratch:
            trainer, _ = self._opened(run, trained, dataset, "val", scratch)
        loader: Any = trainer.get_eval_dataloader()
        model: Any = trainer.model.eval()

        def ready(size: int) -> Callable[[], object]:
            rows = [loader.dataset[place % len(loader.dataset)] for place in range(size)]
            inputs = {key: value.to(model.device) for key, value in loader.collate_fn(rows).items() if key != "labels"}

            @torch.no_grad()
            def predict() -> object:
                return model(**inputs)

            return predict

        return Opened(model, ready, ready(1))

    def step(self, job: Job) -> Step:
        recipe, _ = TRAINER.recipe_of(job)
        with quiet():
            trainer = build(recipe)
        trainer.state.epoch = 0.0
        trainer.current_gradient_accumulation_steps = 1
        loader = trainer.get_train_dataloader()
        batches = endless(loader)
        batch = next(batches)
        model: Any = trainer.model.train()

        def save(folder: Path) -> TrainedModel:
            with quiet():
                trainer.save_model(str(folder))
            return TrainedModel(job.config, str(folder))

        def step() -> None:
            trainer.compute_loss(model, dict(batch)).backward()
            model.zero_grad()

        args = trainer.args
        whole = ceil(args.num_train_epochs * len(loader))
        count = whole if args.max_steps <= 0 else args.max_steps * args.gradient_accumulation_steps
        return Step(step, lambda: next(batches), count, save)

    def draw(self, models: Mapping[str, TrainedModel], dataset: Dataset, samples: Sequence[int], path: Path) -> None:
        if dataset.folder is None:
            return
        task = str(load(next(iter(models.values())).config)["task"])
        rows = read(self._files(dataset, "test" if dataset.real is None else "val")["eval"])
        texts = [rows[place]["tokens" if task == "tokens" else "text"] for place in samples]
        short = [text for text in texts if len(text if isinstance(text, list) else text.split()) <= 16]
        folders = {title: trained.weights for title, trained in models.items()}
        with quiet():
            draw_attention(folders, task, (short or texts)[0], path)


def _written(recipe: Mapping[str, Any], benchmark: Benchmark, name: str) -> str:
    """Write a recipe file, and return its path."""
    path = benchmark.out / "configs" / f"{name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as part:
        part.write_text(yaml.safe_dump(dict(recipe), sort_keys=False, allow_unicode=True), encoding="utf-8")
    return str(path)


def _models(benchmark: Benchmark) -> list[Model]:
    return [benchmark.teacher, *benchmark.students.values()]


def _embedded(folder: Path) -> Path:
    """Write the embedded set, unless it was written as a whole before, and return its folder."""
    whole = folder / "complete"
    if not whole.is_file():
        write_data(folder)
        whole.touch()
    return folder


def _joined(root: Path, folder: Path) -> Path:
    """Write a set of words as one of texts, for classifiers, and return its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", "val"):
        rows = [json.loads(line) for line in (root / f"{split}.jsonl").read_text(encoding="utf-8").splitlines() if line]
        lines = [
            json.dumps({"text": " ".join(row["tokens"]), "label": row["label"]}, ensure_ascii=False) for row in rows
        ]
        with written_whole(folder / f"{split}.jsonl") as part:
            part.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def _is_time(key: str) -> bool:
    return any(word in key for word in ("runtime", "per_second", "epoch", "model_preparation"))


@torch.no_grad()
def _decisions(trainer: DistillTrainer, task: str) -> Decisions | None:
    """Return the classes that a model gives to each sample or token; ``None`` for numbers, and for tokens masked at random."""
    if task in ("regression", "masked"):
        return None
    model: Any = trainer.model.eval()
    kept: list[tuple[Tensor, ...]] = []
    begun = 0
    for batch in trainer.get_eval_dataloader():
        given = {key: value for key, value in batch.items() if key != "labels"}
        logits, labels = model(**given).logits.float(), batch["labels"]
        sample = torch.arange(begun, begun + len(labels), device=labels.device)
        begun += len(labels)
        if task != "classification":
            if task == "causal":
                logits, labels = logits[:, :-1], labels[:, 1:]
            sample = sample[:, None].expand_as(labels)
        there = labels != IGNORED
        confidence, predicted = logits[there].softmax(-1).max(-1)
        kept.append(tuple(part.cpu() for part in (labels[there], predicted, confidence, sample[there])))
    columns = [torch.cat(parts).numpy() for parts in zip(*kept, strict=True)]
    return Decisions.of(_names(trainer, task), columns[0], columns[1], columns[2].astype(np.float64), columns[3])


def _names(trainer: DistillTrainer, task: str) -> list[str]:
    config: Any = trainer.model.config
    if task in ("classification", "tokens"):
        return [str(config.id2label[place]) for place in range(config.num_labels)]
    tokenizer: Any = trainer.processing_class
    return [str(token) for token in tokenizer.convert_ids_to_tokens(range(config.vocab_size))]
