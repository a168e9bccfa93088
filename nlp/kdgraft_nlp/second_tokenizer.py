"""Recipes whose teacher has another tokenizer: both models read the same texts, each as tokens of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from datasets import Dataset
from transformers import AutoTokenizer

from kdgraft.errors import DistillError

from .checks import one_line
from .collator import DistillCollator

TEXTS = ("text", "second_text")
"""The columns of an encoded set that hold its texts, or both texts of its pairs."""
WORDS = "words"
"""The column of an encoded set that holds its lists of words."""


def teacher_tokenizer(config: Mapping[str, Any]) -> Any:
    """Return the tokenizer that a recipe names as the teacher's, with a padding token; ``None`` where it names none."""
    given = config.get("teacher_tokenizer")
    if not given:
        return None
    with one_line("teacher_tokenizer"):
        return able_to_pad(AutoTokenizer.from_pretrained(config["teacher"] if given is True else given), "teacher's")


def able_to_pad(tokenizer: Any, owner: str) -> Any:
    """Return a tokenizer that pads with its end-of-text token where it has no other.

    Raises:
        DistillError: it has neither.
    """
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise DistillError(
                f"the {owner} tokenizer has no padding token; set its pad_token or eos_token and save it"
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def second_view(
    collator: Any, tokenizer: Any, columns: str | Sequence[str], *, words: bool, texts: bool = False
) -> DistillCollator:
    """Wrap a collator so that the teacher is given the kept texts, as tokens of its own tokenizer, if it has one.

    Args:
        collator: the collator of the student's tokens.
        tokenizer: the teacher's tokenizer, or ``None``.
        columns: the column of texts, or the two columns of pairs.
        words: texts are lists of words.
        texts: a teacher reads the kept texts as they are.
    """
    where: dict[str, Any] = dict(words=WORDS) if words else dict(text=TEXTS[:1] if isinstance(columns, str) else TEXTS)
    if tokenizer is None:
        return DistillCollator(collator, **(where if texts else {}))
    return DistillCollator(collator, tokenizer, **where)


def kept_columns(texts: Sequence[list[Any]], *, words: bool) -> dict[str, list[Any]]:
    """Return the columns in which an encoded set keeps its texts."""
    return {WORDS: texts[0]} if words else dict(zip(TEXTS, texts, strict=False))


def cut(texts: Sequence[list[Any]], tokenizer: Any, length: int, *, words: bool) -> list[list[Any]]:
    """Cut texts after the last token that a tokenizer keeps of them, so that another one reads the same.

    Args:
        texts: the texts of each column, or the lists of words of the only one.
        tokenizer: a fast tokenizer.
        length: the number of tokens that it keeps.
        words: texts are lists of words, of which those stay that have a token.

    Returns:
        The texts of each column.

    Raises:
        DistillError: the tokenizer leaves out the beginning of a text, not its end.
    """
    encoded = tokenizer(
        *texts, truncation=True, max_length=length, is_split_into_words=words, return_offsets_mapping=True
    )
    found = [list(column) for column in texts]
    for i, sample in enumerate(encoded.encodings):
        if not sample.overflowing:
            continue
        if tokenizer.truncation_side != "right":
            raise DistillError(
                "the student's tokenizer cuts texts at their beginning; save it with truncation_side='right', or raise data.length"
            )
        for k, column in enumerate(found):
            ends = [
                (sample.word_ids[place] + 1 if words else sample.offsets[place][1])
                for place, part in enumerate(sample.sequence_ids)
                if part == k
            ]
            column[i] = column[i][: max(ends, default=0)]
    return found


def read_by_teacher(collator: DistillCollator, sets: Mapping[str, Dataset]) -> dict[str, Dataset]:
    """Encode the kept texts with the teacher's tokenizer, and let the collator keep all tokens of the longest.

    Returns:
        Sets with the columns that the tokenizer makes.
    """
    settings = dict(is_split_into_words=bool(collator.words), verbose=False)
    found = {}
    for split, kept in sets.items():
        texts = [list(kept[name][:]) for name in collator.columns]
        found[split] = Dataset.from_dict({**collator.teacher_tokenizer(*texts, **settings)})
    collator.max_length = max(len(row) for one in found.values() for row in one["input_ids"][:])
    return found
