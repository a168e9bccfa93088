"""The sets of a recipe by its task: columns, classes, encoding, collator and metrics."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

from datasets import Dataset
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    DataCollatorForTokenClassification,
    DataCollatorWithFlattening,
    DataCollatorWithPadding,
    PreTrainedTokenizerBase,
)

from kdgraft.errors import DistillError

from .chats import chat_columns, encode_chats
from .columns import TextColumns, check_columns, check_tags, class_names, columns_in, columns_of, own_columns, texts_of
from .data import encode, read_data
from .recipe_tasks import soft_column
from .scores import metrics_of
from .soft_labels import check_soft_labels

Metrics = Callable[[Any], dict[str, float]]
SOFT = "soft_labels"
"""The column of an encoded set with soft labels, and the source that they are beside others."""
LENGTH = 128
"""The number of tokens that are kept of a sample by default."""


class RecipeData:
    """The sets of a recipe; a subclass reads samples of one layout.

    Args:
        task: the recipe's task.
        told: its ``data``.
        sets: its complete sets, ``train`` and perhaps ``eval``.
        kept: keep the texts in the encoded sets, for a teacher that reads texts.

    Attributes:
        names: the classes, once :meth:`read_classes` has read them; ``None`` for tasks without.

    Raises:
        DistillError: a set lacks a column.
    """

    pairs: bool = False
    """True where a sample may be two texts, for which a tokenizer that is trained here gives types of tokens."""

    def __init__(self, task: str, told: Mapping[str, Any], sets: Mapping[str, Dataset], kept: bool = False) -> None:
        self.task, self.told, self.kept = task, told, kept
        self.length = int(told.get("length") or LENGTH)
        self.names: list[str] | None = None
        self.columns: Any = self.find(sets)

    @property
    def text_columns(self) -> TextColumns:
        """The columns of texts that a second tokenizer can read; none where samples have a layout of their own."""
        return []

    @staticmethod
    def sets_of(told: Mapping[str, Any]) -> dict[str, Dataset]:
        """Read the complete sets that a recipe's ``data`` names."""
        return read_data(told)

    def find(self, sets: Mapping[str, Dataset]) -> Any:
        """Return the columns of the samples."""
        raise NotImplementedError

    def read_classes(self, sets: Mapping[str, Dataset]) -> None:
        """Set :attr:`names`, from the complete sets."""

    def texts(self, found: Dataset) -> Iterable[str]:
        """Return all texts of a set, from which a tokenizer is trained."""
        raise NotImplementedError

    def encode(self, split: str, found: Dataset, tokenizer: PreTrainedTokenizerBase) -> Dataset:
        """Encode a set, or a part of it, as token ids and labels.

        Raises:
            DistillError: a sample is malformed; the message has its number.
        """
        raise NotImplementedError

    def collator(self, tokenizer: PreTrainedTokenizerBase, student: Any) -> Callable[..., Any]:
        """Return the collator of the encoded samples."""
        raise NotImplementedError

    def metrics(self) -> Metrics | None:
        """Return the function of an evaluation's metrics; ``None`` for models that have the loss alone."""
        return metrics_of(self.task, self.names)


class TextData(RecipeData):
    """Samples of one text, of two, or of a list of words, with one label each, or texts for language models."""

    columns: tuple[TextColumns, str | None]

    @property
    def text_columns(self) -> TextColumns:
        return self.columns[0]

    def find(self, sets: Mapping[str, Dataset]) -> tuple[TextColumns, str | None]:
        columns = columns_of(self.task, self.told, sets)
        text, label = columns
        self.pairs = not isinstance(text, str)
        self.unlabelled = label is not None and self.told.get("labels") is False
        return columns

    def read_classes(self, sets: Mapping[str, Dataset]) -> None:
        text, label = self.columns
        if label is None or self.task == "regression":
            return
        labelled = sets["eval" if self.unlabelled else "train"]
        if self.task == "tokens":
            check_tags(labelled, text, label)
        self.names = class_names(self.task, labelled, label, self.told.get("classes"))
        soft = soft_column(self.told)
        if soft:
            check_columns("train", sets["train"], {"soft_labels": soft["column"]})
            values, independent = soft.get("values", "probabilities"), self.task == "multi_label"
            rows = sets["train"].with_format(None)[soft["column"]][:]
            check_soft_labels(soft["column"], rows, len(self.names), values, independent)

    def texts(self, found: Dataset) -> Iterable[str]:
        read = texts_of(found, self.columns[0], words=self.task == "tokens")
        return (" ".join(text) if isinstance(text, list) else text for column in read for text in column)

    def encode(self, split: str, found: Dataset, tokenizer: PreTrainedTokenizerBase) -> Dataset:
        columns = (self.columns[0], None if self.unlabelled and split == "train" else self.columns[1])
        joined = self.told.get("joined") is not False and not self.kept and not self.told.get("packed")
        told: dict[str, Any] = dict(joined=joined, kept=self.kept, weights=self.told.get("weights"))
        encoded = encode(self.task, found, tokenizer, columns, self.names, self.length, **told)
        soft = soft_column(self.told)
        if not soft or split != "train":
            return encoded
        return encoded.add_column(SOFT, found.with_format(None)[soft["column"]][:])

    def collator(self, tokenizer: PreTrainedTokenizerBase, student: Any) -> Callable[..., Any]:
        if self.told.get("packed"):
            return DataCollatorWithFlattening()
        if self.task == "tokens":
            return DataCollatorForTokenClassification(tokenizer)
        if self.columns[1] is not None:
            return DataCollatorWithPadding(tokenizer)
        return DataCollatorForLanguageModeling(tokenizer, mlm=self.task == "masked")


class ChatData(RecipeData):
    """Samples of a prompt and its answer, or of a chat."""

    columns: list[str]

    def find(self, sets: Mapping[str, Dataset]) -> list[str]:
        return chat_columns(self.told, sets)

    def texts(self, found: Dataset) -> Iterable[str]:
        return (text for column in texts_of(found, self.columns) for text in column)

    def encode(self, split: str, found: Dataset, tokenizer: PreTrainedTokenizerBase) -> Dataset:
        return encode_chats(found, tokenizer, self.columns, self.length, self.told.get("weights"))

    def collator(self, tokenizer: PreTrainedTokenizerBase, student: Any) -> Callable[..., Any]:
        return DataCollatorWithFlattening() if self.told.get("packed") else DataCollatorForSeq2Seq(tokenizer)


class OwnData(RecipeData):
    """Samples of a layout of their own: the columns by the entry of ``data`` that names each."""

    columns: dict[str, Any]
    read: ClassVar[tuple[str, ...]] = ()
    """The entries of the columns of texts, from which a tokenizer is trained."""

    def find(self, sets: Mapping[str, Dataset]) -> dict[str, Any]:
        return own_columns(self.task, self.told, sets)

    def texts(self, found: Dataset) -> Iterable[str]:
        names = [name for entry in self.read for name in columns_in(self.columns.get(entry) or [])]
        return (text for column in texts_of(found, names) for text in column)

    def room(self, tokenizer: PreTrainedTokenizerBase, *, pair: bool) -> int:
        """Return the number of tokens of a sample beside the special ones.

        Raises:
            DistillError: there is none.
        """
        special = tokenizer.num_special_tokens_to_add(pair=pair)
        if self.length <= special:
            raise DistillError(
                f"data.length is {self.length}, and special tokens take {special} of it; raise data.length"
            )
        return self.length - special
