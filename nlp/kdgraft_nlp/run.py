"""Trainings from a recipe file: ``kdgraft train recipe.yaml``; the scripts of ``nlp/recipes`` and the demo use the same.

===============  ====================================================================================================
``task``         ``classification``, ``tokens``, ``causal`` or ``masked``
``data``         ``train``, ``eval``: jsonl or csv files, or folders that ``save_to_disk`` wrote; ``text`` (or ``words``),
                 ``label`` (or ``tags``): their columns; ``fraction``: the share of the training set to use; ``length``: tokens
``tokenizer``    a folder; or ``{vocab_size: 4000}`` to train a WordPiece one on the training set, where neither the
                 student's nor the teacher's folder brings one
``student``      a folder of ``save_pretrained``; or a config: ``{model_type: bert, hidden_size: 64, …}``
``teacher``      a folder; left out, the model trains alone (a teacher, or the plain student)
``recipe``       a recipe's name, or ``{type: name, …}``
``terms``        a list of terms beside it
``host_weight``  the share of the host's own loss under a teacher, 1 by default
``chunked``      for causal models under a teacher; see :class:`~kdgraft_nlp.DistillTrainer`
``training``     arguments of :class:`transformers.TrainingArguments`
``output``       where checkpoints and the student go
===============  ====================================================================================================
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import yaml
from datasets import Dataset
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoConfig,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

from kdgraft.errors import DistillError, nearest
from kdgraft.registry import call

from .collator import DistillCollator
from .tasks import AUTO_CLASSES
from .trainer import DistillTrainer

KEYS = (
    "task",
    "data",
    "tokenizer",
    "student",
    "teacher",
    "recipe",
    "terms",
    "host_weight",
    "chunked",
    "training",
    "output",
)
DATA_KEYS = ("train", "eval", "text", "words", "label", "tags", "fraction", "length")
TASKS = {"classification": "sequence", "tokens": "tokens", "causal": "causal", "masked": "masked"}
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def load(path: str | Path, options: Sequence[str] = ()) -> dict[str, Any]:
    """Reads a recipe file, YAML or TOML, and overrides entries by ``a.b=value``.

    Raises:
        DistillError: no such file, not readable, or keys that mean nothing.
    """
    path = Path(path)
    if not path.is_file():
        raise DistillError(f"recipe file not found: {path}")
    try:
        if path.suffix == ".toml":
            if sys.version_info < (3, 11):
                raise DistillError("reading TOML needs Python 3.11; write the recipe in YAML")
            import tomllib

            config = tomllib.loads(path.read_text(encoding="utf-8"))
        else:
            config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError) as error:
        if isinstance(error, DistillError):
            raise
        raise DistillError(f"cannot read {path}: {' '.join(str(error).split())}") from None
    if not isinstance(config, dict):
        raise DistillError(f"{path} holds no settings; it starts with 'task: classification' or the like")
    for option in options:
        key, equals, value = option.partition("=")
        if not equals:
            raise DistillError(f"write options like training.learning_rate=0.001, got {option!r}")
        *parents, last = key.split(".")
        place = config
        for parent in parents:
            place = place.setdefault(parent, {})
            if not isinstance(place, dict):
                raise DistillError(f"cannot set {key}: {parent} is {place!r}")
        place[last] = yaml.safe_load(value)
    return config


def train(
    path: str | Path,
    options: Sequence[str] = (),
    work_dir: str | None = None,
    resume: str | None = None,
    amp: bool = False,
    seed: int | None = None,
) -> DistillTrainer:
    """Trains what a recipe file says, and saves the plain student and its tokenizer in ``output``."""
    config = load(path, options)
    config.setdefault("output", work_dir or f"work_dirs/{Path(path).stem}")
    if work_dir is not None:
        config["output"] = work_dir
    training = dict(config.get("training") or {})
    training.update({"bf16": True} if amp else {}, **({} if seed is None else {"seed": seed}))
    config["training"] = training
    trainer = build(config)
    if resume == "auto":
        resume = get_last_checkpoint(config["output"]) if Path(config["output"]).is_dir() else None
        if resume is None:
            raise DistillError(f"nothing to resume: there is no checkpoint in {config['output']}")
    elif resume and not Path(resume).is_dir():
        raise DistillError(f"nothing to resume: {resume} is no checkpoint's folder")
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model()
    if trainer.eval_dataset is not None:
        found = trainer.evaluate()
        trainer.save_metrics("eval", found)
        print("  ".join(f"{key.removeprefix('eval_')} {value:.4f}" for key, value in found.items() if _shown(key)))
    print(f"student in {config['output']}")
    return trainer


def check(path: str | Path, options: Sequence[str] = ()) -> None:
    """Builds everything, runs one step on one batch and prints the wiring."""
    from kdgraft.report import print_rows

    config = load(path, options)
    config.setdefault("output", f"work_dirs/{Path(path).stem}")
    trainer = build(config)
    trainer.state.epoch = 0.0
    trainer.current_gradient_accumulation_steps = 1
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    loss = trainer.compute_loss(trainer.model.train(), dict(batch))
    if trainer.distiller is None:
        print("no terms: the model trains alone")
    else:
        print_rows([row._asdict() for row in trainer.distiller.rows])
        for key, value in (trainer.model._distill.losses or {}).items():
            print(f"{key:<40} {float(value.detach()):.5f}")
    print(f"{'loss':<40} {float(loss.detach()):.5f}")


def build(config: Mapping[str, Any], data: Mapping[str, Dataset] | None = None) -> DistillTrainer:
    """The trainer that a recipe describes.

    Args:
        config: the entries above.
        data: ``train`` and ``eval`` sets that are there already, instead of files.

    Raises:
        DistillError: one line on the entry that is wrong.
    """
    for key in config:
        if key not in KEYS:
            raise DistillError(f"a recipe has no entry {key!r}{nearest(key, KEYS)}")
    task = config.get("task")
    if task not in TASKS:
        raise DistillError(f"task is one of {', '.join(TASKS)}; got {task!r}")
    told = dict(config.get("data") or {})
    for key in told:
        if key not in DATA_KEYS:
            raise DistillError(f"data has no entry {key!r}{nearest(key, DATA_KEYS)}")
    arguments = _arguments(config)
    set_seed(arguments.seed)
    sets = dict(data) if data is not None else read_data(told)
    columns = _columns(task, told, sets["train"])
    tokenizer = _tokenizer(config.get("tokenizer"), sets["train"], columns[0], config)
    names = _class_names(task, sets["train"], columns[1]) if columns[1] else None
    sets["train"] = drawn(sets["train"], told.get("fraction", 1.0), arguments.seed)
    length = int(told.get("length", 128))
    encoded = {split: encode(task, found, tokenizer, columns, names, length) for split, found in sets.items()}
    student = _model(config.get("student"), TASKS[task], tokenizer, names)
    settings = {key: config.get(key) for key in ("teacher", "recipe", "terms")}
    if not settings["teacher"] and (settings["recipe"] or settings["terms"]):
        raise DistillError("a recipe or terms need teacher: the folder of a trained model")
    return DistillTrainer(
        model=student,
        args=arguments,
        train_dataset=encoded["train"],
        eval_dataset=encoded.get("eval"),
        data_collator=DistillCollator(_collator(task, tokenizer)),
        processing_class=tokenizer,
        compute_metrics=_metrics(task, names),
        chunked=(config.get("chunked") or False) if settings["teacher"] else False,
        host_weight=config.get("host_weight", 1) if settings["teacher"] else 1,
        **settings,
    )


def read_data(data: Mapping[str, Any]) -> dict[str, Dataset]:
    """The sets that ``data`` names, whole."""
    if not data.get("train"):
        raise DistillError("data needs train: a jsonl or csv file, or a folder that save_to_disk wrote")
    return {split: _read(str(data[split])) for split in ("train", "eval") if data.get(split)}


def drawn(found: Dataset, fraction: Any, seed: int) -> Dataset:
    """A share of a set, drawn with the seed; its classes are taken from all of it before."""
    if isinstance(fraction, bool) or not isinstance(fraction, (int, float)) or not 0 < fraction <= 1:
        raise DistillError(f"data.fraction must be in (0, 1], got {fraction!r}")
    if fraction == 1:
        return found
    kept = np.random.default_rng(seed).permutation(len(found))[: max(round(len(found) * fraction), 1)]
    return found.select(sorted(kept.tolist()))


def _read(source: str) -> Dataset:
    path = Path(source)
    kinds = {".jsonl": "json", ".json": "json", ".csv": "csv"}
    if path.is_dir():
        found = datasets.load_from_disk(source)
        if not isinstance(found, Dataset):
            raise DistillError(f"{source} holds several splits; name one: {', '.join(f'{source}/{k}' for k in found)}")
    elif not path.is_file():
        raise DistillError(f"no data at {source}")
    elif path.suffix not in kinds:
        raise DistillError(f"cannot read {source}; data is jsonl, csv, or a folder that save_to_disk wrote")
    else:
        if not path.stat().st_size:
            raise DistillError(f"{source} holds no samples")
        try:
            found = datasets.load_dataset(kinds[path.suffix], data_files=source, split="train")
        except datasets.exceptions.DatasetGenerationError as error:
            raise DistillError(
                f"cannot read {source}: {' '.join(str(error.__cause__ or error).split())[:300]}"
            ) from None
    if len(found) == 0:
        raise DistillError(f"{source} holds no samples")
    return found


def _columns(task: str, data: Mapping[str, Any], found: Dataset) -> tuple[str, str | None]:
    text = data.get("words", "tokens") if task == "tokens" else data.get("text", "text")
    label = data.get("tags", "tags") if task == "tokens" else data.get("label", "label")
    wanted = [text, label] if task in ("classification", "tokens") else [text]
    for column in wanted:
        if column not in found.column_names:
            entry = {text: "words" if task == "tokens" else "text", label: "tags" if task == "tokens" else "label"}[
                column
            ]
            raise DistillError(
                f"the training set has no column {column!r} but {', '.join(found.column_names)}; name it with data.{entry}"
            )
    return text, label if len(wanted) == 2 else None


def _class_names(task: str, found: Dataset, column: str) -> list[str]:
    values = found[column]
    flat = (tag for tags in values for tag in tags) if task == "tokens" else iter(values)
    return sorted({str(value) for value in flat})


def encode(
    task: str,
    found: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    columns: tuple[str, str | None],
    names: Sequence[str] | None,
    length: int,
) -> Dataset:
    """Token ids and labels; words carry their tag on their first token, language models get blocks of ``length`` tokens."""
    text, label = columns
    ids = {name: i for i, name in enumerate(names or [])}

    def number(value: Any) -> int:
        # A class that the training set has none of counts as wrong, whatever is predicted.
        return ids.get(str(value), -100)

    if task == "classification":
        encoded = tokenizer(list(found[text]), truncation=True, max_length=length)
        return Dataset.from_dict({**encoded, "labels": [number(value) for value in found[label]]})
    if task == "tokens":
        for i, (words, tags) in enumerate(zip(found[text], found[label], strict=True)):
            if len(words) != len(tags):
                raise DistillError(f"sample {i} has {len(words)} {text} and {len(tags)} {label}; every word needs one")
        encoded = tokenizer(list(found[text]), truncation=True, max_length=length, is_split_into_words=True)
        labels = []
        for i, tags in enumerate(found[label]):
            places = encoded.word_ids(i)
            labels.append(
                [
                    number(tags[word]) if word is not None and word != before else -100
                    for word, before in zip(places, [None, *places[:-1]], strict=True)
                ]
            )
        return Dataset.from_dict({**encoded, "labels": labels})
    flat = [
        token
        for row in tokenizer(list(found[text]), add_special_tokens=False)["input_ids"]
        for token in [*row, _end(tokenizer)]
    ]
    blocks = [flat[i : i + length] for i in range(0, max(len(flat) - length + 1, 1), length)]
    return Dataset.from_dict({"input_ids": blocks, "attention_mask": [[1] * len(block) for block in blocks]})


def _end(tokenizer: Any) -> int:
    return tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id


def _collator(task: str, tokenizer: Any) -> Callable[..., Any]:
    if task == "classification":
        return DataCollatorWithPadding(tokenizer)
    if task == "tokens":
        return DataCollatorForTokenClassification(tokenizer)
    return DataCollatorForLanguageModeling(tokenizer, mlm=task == "masked")


def _arguments(config: Mapping[str, Any]) -> TrainingArguments:
    training = dict(config.get("training") or {})
    training.setdefault("report_to", [])
    try:
        return call(TrainingArguments, {"output_dir": config.get("output", "work_dirs/nlp"), **training}, "training")
    except ValueError as error:
        raise (
            error if isinstance(error, DistillError) else DistillError(f"training: {' '.join(str(error).split())}")
        ) from None


def _tokenizer(spec: Any, found: Dataset, column: str, config: Mapping[str, Any]) -> PreTrainedTokenizerBase:
    if isinstance(spec, PreTrainedTokenizerBase):
        return spec
    if spec is None or isinstance(spec, Mapping):
        for entry in ("student", "teacher"):
            folder = config.get(entry)
            if isinstance(folder, (str, Path)) and (Path(folder) / "tokenizer_config.json").is_file():
                spec = folder
                break
    if isinstance(spec, (str, Path)):
        if not Path(spec).is_dir():
            raise DistillError(f"no tokenizer at {spec}")
        return AutoTokenizer.from_pretrained(spec)
    if isinstance(spec, Mapping):
        texts = found[column]
        flat = (" ".join(text) if isinstance(text, list) else text for text in texts)
        return call(train_tokenizer, {"texts": flat, **spec}, "tokenizer")
    raise DistillError("tokenizer is a folder, or {vocab_size: 4000} to train one on the training set")


def train_tokenizer(texts: Any, vocab_size: int = 4000, length: int = 128) -> PreTrainedTokenizerFast:
    """A lower-case WordPiece tokenizer with BERT's special tokens."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    learned = trainers.WordPieceTrainer(vocab_size=vocab_size, special_tokens=list(SPECIAL), show_progress=False)
    tokenizer.train_from_iterator(texts, learned)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(name, tokenizer.token_to_id(name)) for name in ("[CLS]", "[SEP]")],
    )
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), SPECIAL, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=length, **names)


def _model(spec: Any, task: str, tokenizer: Any, names: Sequence[str] | None) -> Any:
    labels = (
        {} if names is None else dict(id2label=dict(enumerate(names)), label2id={n: i for i, n in enumerate(names)})
    )
    if isinstance(spec, (str, Path)):
        if not (Path(spec) / "config.json").is_file():
            raise DistillError(
                f"no student at {spec}: there is no config.json; give a folder of save_pretrained, or a config"
            )
        return AUTO_CLASSES[task].from_pretrained(spec, **labels)
    if not isinstance(spec, Mapping) or "model_type" not in spec:
        raise DistillError(
            "student is a folder, or a config such as {model_type: bert, hidden_size: 64, num_hidden_layers: 2}"
        )
    settings = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id, **spec, **labels}
    try:
        config = AutoConfig.for_model(**settings)
        return AUTO_CLASSES[task].from_config(config)
    except (ValueError, KeyError) as error:
        raise DistillError(f"student: {' '.join(str(error).split())[:300]}") from None


def _metrics(task: str, names: Sequence[str] | None) -> Callable[[Any], dict[str, float]] | None:
    if task == "classification":
        return lambda predicted: scores(predicted.predictions.argmax(-1), predicted.label_ids)
    if task == "tokens":
        return lambda predicted: tag_scores(predicted.predictions.argmax(-1), predicted.label_ids, names or [])
    return None


def scores(predicted: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Accuracy and macro-F1."""
    from sklearn.metrics import accuracy_score, f1_score

    return {
        "accuracy": float(accuracy_score(labels, predicted)),
        "macro_f1": float(f1_score(labels, predicted, average="macro", zero_division=0)),
    }


def tag_scores(predicted: np.ndarray, labels: np.ndarray, names: Sequence[str]) -> dict[str, float]:
    """Accuracy of tags on words, and F1 of whole spans in BIO tags (micro, as conlleval has it)."""
    found = truly = right = correct = total = 0
    for row, truth in zip(predicted, labels, strict=True):
        kept = truth != -100
        ours, theirs = ([names[i] for i in values[kept]] for values in (row, truth))
        correct += sum(a == b for a, b in zip(ours, theirs, strict=True))
        total += len(theirs)
        mine, real = spans(ours), spans(theirs)
        found, truly, right = found + len(mine), truly + len(real), right + len(mine & real)
    return {"accuracy": correct / max(total, 1), "span_f1": 2 * right / max(found + truly, 1)}


def spans(tags: Sequence[str]) -> set[tuple[str, int, int]]:
    """(type, first word, one past the last) of each span in BIO tags; an I that continues nothing begins a span."""
    result, start, kind = set(), 0, ""
    for place, tag in enumerate([*tags, "O"]):
        prefix, _, name = tag.partition("-")
        if kind and (prefix != "I" or name != kind):
            result.add((kind, start, place))
            kind = ""
        if prefix in ("B", "I") and not kind:
            start, kind = place, name
    return result


def _shown(key: str) -> bool:
    return not any(word in key for word in ("runtime", "per_second", "epoch", "model_preparation"))
