"""Data of a recipe: reading files, checking samples, and encoding them as token ids and labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from kdgraft.errors import DistillError

from .checks import one_line
from .columns import TextColumns, labels_of, texts_of
from .recipe_tasks import FILES, LABELLED, check_file
from .second_tokenizer import able_to_pad, cut, kept_columns

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


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
        labels = {} if label is None else {"labels": labels_of(task, found, text, label, names, encoded)}
        return Dataset.from_dict({**encoded, **labels, **more})
    rows = _blocks(texts[0], tokenizer, length) if joined else _apart(texts[0], tokenizer, length)
    blocks = Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows], **more})
    if joined:
        return blocks
    longer = [i for i, row in enumerate(rows) if len(row) > 1]
    if not longer:
        raise DistillError("no text of the set has two tokens, so that there is no next token to predict")
    return blocks if len(longer) == len(rows) else blocks.select(longer)


def _blocks(texts: list[str], tokenizer: PreTrainedTokenizerBase, length: int) -> list[list[int]]:
    """Return the tokens of all texts, each with an end-of-text token, in blocks of ``length``."""
    encoded = tokenizer(texts, add_special_tokens=False)["input_ids"]
    flat = [token for row in encoded for token in [*row, end_of_text(tokenizer)]]
    return [flat[i : i + length] for i in range(0, max(len(flat) - length + 1, 1), length)]


def _apart(texts: list[str], tokenizer: PreTrainedTokenizerBase, length: int) -> list[list[int]]:
    """Return the first ``length`` tokens of each text."""
    able_to_pad(tokenizer, "student's")
    found: list[list[int]] = tokenizer(texts, truncation=True, max_length=length)["input_ids"]
    return found


def end_of_text(tokenizer: Any) -> int:
    """Return the token that ends a text; a :class:`DistillError` is raised where a tokenizer has none."""
    end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    if end is None:
        raise DistillError("language models need a tokenizer with an end-of-text token (eos_token or sep_token)")
    return int(end)


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
