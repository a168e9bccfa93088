"""Multiple choice: samples of a context and its choices, of which one is right."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

from datasets import Dataset
from transformers import DataCollatorForMultipleChoice, PreTrainedTokenizerBase

from kdgraft.errors import DistillError

from .columns import short, texts_of
from .recipe_data import OwnData


class ChoiceData(OwnData):
    """Samples of a context, an optional question that each choice continues, and choices, with the number of the right one.

    The columns are those of ``run_swag``: ``context: sent1``, ``question: sent2``, ``choices: [ending0, ending1, ending2, ending3]``. A
    choice may also be an entry of a list, ``choices: endings``. The model reads each choice as a pair of texts: the context, and the
    question with the choice.
    """

    pairs = True
    read: ClassVar = ("context", "question")

    def find(self, sets: Mapping[str, Dataset]) -> dict[str, Any]:
        columns = super().find(sets)
        counts = {len(found[0]) for found in (self._choices(one, columns["choices"]) for one in sets.values())}
        if len(counts) > 1:
            raise DistillError(
                f"the sets have {' and '.join(map(str, sorted(counts)))} choices a sample; give each as many"
            )
        return columns

    def texts(self, found: Dataset) -> Iterable[str]:
        yield from super().texts(found)
        for choices in self._choices(found, self.columns["choices"]):
            yield from choices

    def encode(self, split: str, found: Dataset, tokenizer: PreTrainedTokenizerBase) -> Dataset:
        self.room(tokenizer, pair=True)
        (contexts,) = texts_of(found, self.columns["context"])
        choices = self._choices(found, self.columns["choices"])
        if "question" in self.columns:
            (questions,) = texts_of(found, self.columns["question"])
            choices = [[f"{asked} {one}" for one in row] for asked, row in zip(questions, choices, strict=True)]
        count = len(choices[0])
        labels = _right_ones(found, self.columns["label"], count)
        flat = [context for context in contexts for _ in range(count)], [one for row in choices for one in row]
        encoded = tokenizer(*flat, truncation=True, max_length=self.length)
        nested = {name: [rows[i : i + count] for i in range(0, len(rows), count)] for name, rows in encoded.items()}
        return Dataset.from_dict({**nested, "labels": labels})

    def collator(self, tokenizer: PreTrainedTokenizerBase, student: Any) -> Callable[..., Any]:
        return DataCollatorForMultipleChoice(tokenizer)

    @staticmethod
    def _choices(found: Dataset, columns: str | list[str]) -> list[list[str]]:
        """Return the choices of each sample, as many of each.

        Raises:
            DistillError: a sample has no list of two or more texts, or another number of them than the first one.
        """
        if not isinstance(columns, str):
            return [list(row) for row in zip(*texts_of(found, columns), strict=True)]
        (rows,) = texts_of(found, columns, words=True)
        for i, row in enumerate(rows):
            if len(row) < 2 or len(row) != len(rows[0]):
                wanted = "two choices or more" if len(row) < 2 else f"{len(rows[0])} choices, as the first sample has"
                raise DistillError(f"sample {i} of column {columns!r} must have {wanted}, got {len(row)}")
        return rows


def _right_ones(found: Dataset, column: str, count: int) -> list[int]:
    """Return the number of the right choice of each sample, from 0 on."""
    rights = []
    for i, value in enumerate(found[column][:]):
        whole = isinstance(value, (int, float)) and not isinstance(value, bool) and value in range(count)
        if not whole:
            raise DistillError(
                f"sample {i} of column {column!r} must be the number of the right choice, from 0 to {count - 1}, got {short(value)}"
            )
        rights.append(int(value))
    return rights
