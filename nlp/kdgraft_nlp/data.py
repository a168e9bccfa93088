"""Data of a recipe: reading files, checking samples, and encoding them as token ids and labels."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets import ClassLabel, Dataset
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from kdgraft.errors import DistillError

from .checks import one_line
from .second_tokenizer import able_to_pad, cut, kept_columns
from .settings import FILES, LABELLED, check_file

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
TextColumns = str | Sequence[str]
"""A column of texts (or of lists of words), or the two columns of pairs of texts."""


def read_data(data: Mapping[str, Any]) -> dict[str, Dataset]:
    """Read the complete sets that ``data`` names."""
    return {split: read(str(data[split])) for split in ("train", "eval") if data.get(split)}


def read(source: str) -> Dataset:
    """Read a set from a jsonl or csv file, or from a folder that ``save_to_disk`` wrote."""
    check_file("train", source)
    path = Path(source)
    with one_line(f"cannot read {source}"):
        if path.is_dir():
            found = datasets.load_from_disk(source)
        else:
            try:
                found = datasets.load_dataset(FILES[path.suffix], data_files=source, split="train")
            except datasets.exceptions.DatasetGenerationError as error:
                raise error.__cause__ or error from None
    if not isinstance(found, Dataset):
        raise DistillError(f"{source} holds several splits; name one: {', '.join(f'{source}/{k}' for k in found)}")
    if len(found) == 0:
        raise DistillError(f"{source} holds no samples")
    return found


def drawn(found: Dataset, fraction: float, seed: int) -> Dataset:
    """Draw a fraction of a set with the seed; the classes must be read from the complete set before."""
    if fraction == 1:
        return found
    kept = np.random.default_rng(seed).permutation(len(found))[: max(round(len(found) * fraction), 1)]
    return found.select(sorted(kept.tolist()))


def columns_of(task: str, data: Mapping[str, Any], sets: Mapping[str, Dataset]) -> tuple[TextColumns, str | None]:
    """Return the columns of texts and labels; a :class:`DistillError` is raised where a set lacks one.

    With ``labels: false`` the training set needs no labels, and the evaluation set, which names the classes, must be there.
    """
    entries = ("words", "tags") if task == "tokens" else ("text", "label")
    standard = ("tokens", "tags") if task == "tokens" else ("text", "label")
    text, label = (data.get(entry) or column for entry, column in zip(entries, standard, strict=True))
    wanted = [(column, entries[0]) for column in _names(text)]
    unlabelled = data.get("labels") is False
    if unlabelled and task in LABELLED and "eval" not in sets:
        raise DistillError("data.labels is false, so that data.eval must name the classes; add it")
    for split, found in sets.items():
        owner = "training" if split == "train" else "evaluation"
        labelled = task in LABELLED and not (unlabelled and split == "train")
        for column, entry in [*wanted, *([(label, entries[1])] if labelled else [])]:
            if column not in found.column_names:
                raise DistillError(
                    f"the {owner} set has no column {column!r} but {', '.join(found.column_names)}; name it with data.{entry}"
                )
    return text, label if task in LABELLED else None


def texts_of(found: Dataset, column: TextColumns, *, words: bool = False) -> list[list[Any]]:
    """Return the texts of each column, or its lists of words.

    Raises:
        DistillError: a sample is neither; the message names the first one, which the tokenizer's own error does not.
    """
    read = [list(found[name][:]) for name in _names(column)]  # at once, as one by one takes seconds
    for name, values in zip(_names(column), read, strict=True):
        for i, value in enumerate(values):
            fine = isinstance(value, list) and all(isinstance(word, str) for word in value)
            if not (fine if words else isinstance(value, str)):
                wanted = "a list of words" if words else "a text"
                raise DistillError(f"column {name!r} must hold {wanted} per sample; sample {i} has {_short(value)}")
    return read


def check_tags(found: Dataset, text: TextColumns, label: str) -> None:
    """Raise a :class:`DistillError` unless every word has a tag."""
    (words,), tags = texts_of(found, text, words=True), _classes("tokens", found, label)
    for i, (some, own) in enumerate(zip(words, tags, strict=True)):
        if len(some) != len(own):
            raise DistillError(f"sample {i} has {len(some)} {text} and {len(own)} {label}; every word needs a tag")


def class_names(task: str, found: Dataset, column: str) -> list[str]:
    """Return the classes of a column of labels or tags: those that the set declares, or those that occur, sorted."""
    declared = _declared(found, column)
    values = _classes(task, found, column)
    seen = {name for value in values for name in (value if isinstance(value, list) else [value])}
    if len(seen) < 2:
        raise DistillError(
            f"column {column!r} holds only one class, {', '.join(seen) or 'none'}; training needs at least two"
        )
    return list(declared) if declared is not None else sorted(seen)


def _declared(found: Dataset, column: str) -> list[str] | None:
    feature = found.features[column]
    feature = getattr(feature, "feature", feature)
    return feature.names if isinstance(feature, ClassLabel) else None


def _classes(task: str, found: Dataset, column: str) -> list[Any]:
    """Return the name of each sample's class, or the names of its tags."""
    declared = _declared(found, column)
    values: list[Any] = []
    for i, value in enumerate(found[column]):
        where = f"sample {i} of column {column!r}"
        if task == "tokens":
            if not isinstance(value, list):
                raise DistillError(f"{where} must be a list of tags, got {_short(value)}")
            values.append([_class(tag, declared, where) for tag in value])
        else:
            values.append(_class(value, declared, where))
    return values


def _class(value: Any, declared: Sequence[str] | None, where: str) -> str:
    """Return the name of a class; a whole number that was read as a float, as from a csv with gaps, is that number."""
    if declared is not None and isinstance(value, int):
        if not 0 <= value < len(declared):
            raise DistillError(f"{where} has no label ({value}); leave such samples out")
        return declared[value]
    if value is None or (isinstance(value, float) and math.isnan(value)):
        raise DistillError(f"{where} has no label; leave such samples out")
    if isinstance(value, float):
        if not value.is_integer():
            raise DistillError(f"{where} is {value}, which is not a class; use task: regression for numbers")
        value = int(value)
    if not isinstance(value, (str, int)):
        raise DistillError(f"{where} must be one class, a text or a whole number, got {_short(value)}")
    return str(value)


def _numbers(found: Dataset, column: str) -> list[float]:
    for i, value in enumerate(found[column]):
        fine = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        if not fine or _declared(found, column) is not None:
            raise DistillError(
                f"task regression needs numbers, and sample {i} of column {column!r} has {_short(value)}; use task: classification"
            )
    return [float(value) for value in found[column]]


def encode(
    task: str,
    found: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    columns: tuple[TextColumns, str | None],
    names: Sequence[str] | None,
    length: int,
    *,
    joined: bool = True,
    kept: bool = False,
    weights: str | None = None,
) -> Dataset:
    """Encode a set as token ids and labels: tags on each word's first token, blocks of ``length`` tokens for language models.

    Args:
        task: the recipe's task.
        found: the set.
        tokenizer: the student's tokenizer.
        columns: the columns of texts and of labels; without labels the set is encoded as token ids alone.
        names: the classes.
        length: the number of tokens that are kept of a text, or that make a block.
        joined: for language models, join the texts to blocks; else each text is encoded on its own, with the special tokens
            that the tokenizer adds, and texts of less than two tokens are left out.
        kept: keep the texts, cut to what is encoded, in columns of their own, for a teacher with another tokenizer.
        weights: a column with the weights of texts to keep, where the set has it.

    Raises:
        DistillError: special tokens leave no place for others, a sample is malformed, or no text is long enough.
    """
    text, label = columns
    texts, words = texts_of(found, text, words=task == "tokens"), task == "tokens"
    special = tokenizer.num_special_tokens_to_add(pair=len(texts) == 2)
    if length <= special:
        raise DistillError(f"data.length is {length}, and special tokens take {special} of it; raise data.length")
    if kept:
        texts = cut(texts, tokenizer, length, words=words)
    more = kept_columns(texts, words=words) if kept else {}
    if weights in found.column_names:
        more[str(weights)] = list(found[weights])
    if task in LABELLED:
        encoded = tokenizer(*texts, truncation=True, max_length=length, is_split_into_words=words)
        labels = {} if label is None else {"labels": _labels(task, found, text, label, names, encoded)}
        return Dataset.from_dict({**encoded, **labels, **more})
    rows = _blocks(texts[0], tokenizer, length) if joined else _apart(texts[0], tokenizer, length)
    blocks = Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows], **more})
    if joined:
        return blocks
    longer = [i for i, row in enumerate(rows) if len(row) > 1]
    if not longer:
        raise DistillError("no text of the set has two tokens, so that there is no next token to predict")
    return blocks if len(longer) == len(rows) else blocks.select(longer)


def _labels(
    task: str, found: Dataset, text: TextColumns, label: str, names: Sequence[str] | None, encoded: Any
) -> list[Any]:
    """Return the number, the class or the tags of each sample."""
    if task == "regression":
        return _numbers(found, label)
    ids = {name: i for i, name in enumerate(names or [])}

    def number(name: str) -> int:
        # A class that the training set lacks counts as wrong, whatever the prediction.
        return ids.get(name, -100)

    if task == "classification":
        return [number(name) for name in _classes(task, found, label)]
    check_tags(found, text, label)
    rows = []
    for i, tags in enumerate(_classes(task, found, label)):
        places = encoded.word_ids(i)
        words = zip(places, [None, *places[:-1]], strict=True)
        rows.append([number(tags[word]) if word not in (None, before) else -100 for word, before in words])
    return rows


def _blocks(texts: list[str], tokenizer: PreTrainedTokenizerBase, length: int) -> list[list[int]]:
    """Return the tokens of all texts, each with an end-of-text token, in blocks of ``length``."""
    encoded = tokenizer(texts, add_special_tokens=False)["input_ids"]
    flat = [token for row in encoded for token in [*row, _end(tokenizer)]]
    return [flat[i : i + length] for i in range(0, max(len(flat) - length + 1, 1), length)]


def _apart(texts: list[str], tokenizer: PreTrainedTokenizerBase, length: int) -> list[list[int]]:
    """Return the first ``length`` tokens of each text."""
    able_to_pad(tokenizer, "student's")
    found: list[list[int]] = tokenizer(texts, truncation=True, max_length=length)["input_ids"]
    return found


def _end(tokenizer: Any) -> int:
    end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    if end is None:
        raise DistillError("language models need a tokenizer with an end-of-text token (eos_token or sep_token)")
    return end


def train_tokenizer(
    texts: Any, vocab_size: int = 4000, length: int = 128, pairs: bool = False
) -> PreTrainedTokenizerFast:
    """Train a lower-case byte-level BPE tokenizer with BERT's special tokens; ``pairs`` adds token types for two texts.

    Byte-level BPE gives the same tokenizer in every process. Pieces with a prefix (WordPiece) or suffix and unigrams would not:
    the library numbers them in the order of a hash map, and breaks ties between equally frequent ones by these numbers.
    """
    tokenizer = Tokenizer(models.BPE(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    learned = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=list(SPECIAL), show_progress=False)
    tokenizer.train_from_iterator(texts, learned)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(name, tokenizer.token_to_id(name)) for name in ("[CLS]", "[SEP]")],
    )
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), SPECIAL, strict=True))
    inputs = ["input_ids", *(["token_type_ids"] if pairs else []), "attention_mask"]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=length, model_input_names=inputs, **names
    )


def _names(column: TextColumns) -> list[str]:
    return [column] if isinstance(column, str) else list(column)


def _short(value: Any) -> str:
    said = repr(value)
    return said if len(said) <= 40 else said[:39] + "…"
