"""Question answering: an answer is a part of a context, which is read in overlapping windows where it is long."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
from datasets import Dataset
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase

from kdgraft.errors import DistillError

from .columns import short, texts_of
from .recipe_data import Metrics, OwnData

ANSWER_LENGTH = 30
"""The number of tokens of the longest answer that an evaluation considers, by default; that of ``run_qa``."""


class Answers(NamedTuple):
    """The true answers of a sample: texts and the places of their first characters, none where the context has no answer."""

    texts: tuple[str, ...]
    starts: tuple[int, ...]


class Window(NamedTuple):
    """A part of a context beside its question, as one row of tokens.

    Attributes:
        sample: the number of the sample.
        first: the place of the context's first token in the row.
        spans: ``(n, 2)``: the characters of the context that each of its tokens covers.
        null: the place that stands for no answer, the first special token.
    """

    sample: int
    first: int
    spans: np.ndarray
    null: int

    def place(self, start: int, end: int) -> tuple[int, int]:
        """Return the tokens of an answer of characters ``start`` to ``end``; ``null`` twice where the window lacks part of it."""
        spans = self.spans
        if not len(spans) or spans[0, 0] > start or spans[-1, 1] < end:
            return self.null, self.null
        first = int(np.searchsorted(spans[:, 0], start, side="right")) - 1
        last = int(np.searchsorted(spans[:, 1], end, side="left"))
        return self.first + first, self.first + last

    def best(self, start: np.ndarray, end: np.ndarray, longest: int) -> tuple[float, int, int]:
        """Return the highest sum of a start's and an end's logit, and the answer's characters.

        Args:
            start, end: the logits of the row's tokens.
            longest: the number of tokens of the longest answer.
        """
        count = len(self.spans)
        place = slice(self.first, self.first + count)
        starts, ends = start[place].astype(float), end[place].astype(float)
        found = (-np.inf, 0, 0)
        for apart in range(min(longest, count)):
            sums = starts[: count - apart] + ends[apart:]
            at = int(sums.argmax())
            if sums[at] > found[0]:
                found = (float(sums[at]), int(self.spans[at, 0]), int(self.spans[at + apart, 1]))
        return found


class QuestionData(OwnData):
    """Samples of a question, a context and the answers in it, in the columns of SQuAD.

    ``answers`` holds ``{text: [...], answer_start: [...]}``. A model learns the first answer; a question without any (SQuAD 2.0) is
    answered by the row's first special token, as are windows that lack the answer. Windows have ``length`` tokens, of which ``stride``
    (a third by default) are those of the window before.
    """

    pairs = True
    read: ClassVar = ("question", "context")

    def find(self, sets: Mapping[str, Dataset]) -> dict[str, Any]:
        columns = super().find(sets)
        answers = [one for found in sets.values() for one in _answers(found, columns["answers"], columns["context"])]
        self.empty = any(not one.texts for one in answers)
        if all(not one.texts for one in answers):
            raise DistillError(f"column {columns['answers']!r} has no answer at all; training needs some")
        self.evaluated: tuple[list[Window], list[str], list[Answers]] = ([], [], [])
        return columns

    def encode(self, split: str, found: Dataset, tokenizer: PreTrainedTokenizerBase) -> Dataset:
        questions, contexts = texts_of(found, [self.columns["question"], self.columns["context"]])
        self._check_room(questions, tokenizer)
        encoded = tokenizer(
            questions,
            contexts,
            truncation="only_second",
            max_length=self.length,
            stride=self.stride,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        answers = _answers(found, self.columns["answers"], self.columns["context"])
        windows = [_window(encoded, row, tokenizer) for row in range(len(encoded["input_ids"]))]
        if split == "eval":
            self.evaluated = (windows, contexts, answers)
        places = []
        for window in windows:
            own = answers[window.sample]
            start = own.starts[0] if own.texts else 0
            places.append(window.place(start, start + len(own.texts[0])) if own.texts else (window.null,) * 2)
        inputs = {name: encoded[name] for name in tokenizer.model_input_names if name in encoded}
        labels = {f"{side}_positions": [place[i] for place in places] for i, side in enumerate(("start", "end"))}
        return Dataset.from_dict({**inputs, **labels})

    @property
    def stride(self) -> int:
        """The number of tokens of the window before that a window has too."""
        told = self.told.get("stride")
        return self.length // 3 if told is None else int(told)

    def _check_room(self, questions: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> None:
        if not tokenizer.is_fast:
            raise DistillError("question_answering needs a fast tokenizer, which returns the offsets of tokens")
        room = self.room(tokenizer, pair=True)
        for i, row in enumerate(tokenizer(list(questions), add_special_tokens=False)["input_ids"]):
            if room - len(row) <= self.stride:
                raise DistillError(
                    f"the question of sample {i} has {len(row)} tokens and leaves {max(room - len(row), 0)} of data.length for the context, "
                    f"which must be more than data.stride, {self.stride}; raise data.length, or lower data.stride"
                )

    def collator(self, tokenizer: PreTrainedTokenizerBase, student: Any) -> Callable[..., Any]:
        return DataCollatorWithPadding(tokenizer)

    def metrics(self) -> Metrics | None:
        longest = int(self.told.get("answer_length") or ANSWER_LENGTH)

        def computed(found: Any) -> dict[str, float]:
            windows, contexts, answers = self.evaluated
            starts, ends = found.predictions[:2]
            if len(starts) != len(windows):
                raise DistillError(f"there are logits of {len(starts)} windows, and the set has {len(windows)}")
            said = best_answers(windows, starts, ends, contexts, longest, null=self.empty)
            return answer_scores(said, [one.texts for one in answers])

        return computed


def _answers(found: Dataset, column: str, context: str) -> list[Answers]:
    """Return the answers of each sample.

    Raises:
        DistillError: they are malformed, or an answer is not in the context at the place that is given.
    """
    answers = []
    for i, (value, text) in enumerate(zip(found[column][:], found[context][:], strict=True)):
        where = f"sample {i} of column {column!r}"
        fine = isinstance(value, Mapping) and all(isinstance(value.get(key), list) for key in ("text", "answer_start"))
        if not fine or len(value["text"]) != len(value["answer_start"]):
            raise DistillError(f"{where} must be {{text: [...], answer_start: [...]}}, got {short(value)}")
        for said, start in zip(value["text"], value["answer_start"], strict=True):
            if not isinstance(said, str) or not said.strip() or not isinstance(start, int):
                raise DistillError(f"{where} must have texts and places of characters, got {short(value)}")
            if not isinstance(text, str) or start < 0 or text[start : start + len(said)] != said:
                raise DistillError(f"{where}: {short(said)} is not at character {start} of {context!r}")
        answers.append(Answers(tuple(value["text"]), tuple(value["answer_start"])))
    return answers


def _window(encoded: Any, row: int, tokenizer: Any) -> Window:
    parts = encoded.sequence_ids(row)
    places = [place for place, part in enumerate(parts) if part == 1]
    first = places[0] if places else 0
    spans = np.array(encoded["offset_mapping"][row][first : first + len(places)]).reshape(-1, 2)
    ids = encoded["input_ids"][row]
    special = next((token for token in (tokenizer.cls_token_id, tokenizer.bos_token_id) if token in ids), None)
    return Window(
        encoded["overflow_to_sample_mapping"][row], first, spans, 0 if special is None else ids.index(special)
    )


def best_answers(
    windows: Sequence[Window],
    starts: np.ndarray,
    ends: np.ndarray,
    contexts: Sequence[str],
    longest: int,
    *,
    null: bool,
) -> list[str]:
    """Return the best answer of each sample over all of its windows, by the sum of the logits of its first and last token.

    Args:
        windows: the windows of all samples.
        starts, ends: ``(windows, tokens)``: the logits.
        contexts: the context of each sample.
        longest: the number of tokens of the longest answer.
        null: answer a question with an empty text where that scores higher: in every window, by the logits of its null place.
    """
    best = [(-np.inf, 0, 0)] * len(contexts)
    empty = [np.inf] * len(contexts)
    for window, start, end in zip(windows, starts, ends, strict=True):
        best[window.sample] = max(best[window.sample], window.best(start, end, longest), key=lambda one: one[0])
        empty[window.sample] = min(empty[window.sample], float(start[window.null]) + float(end[window.null]))
    return [
        "" if null and none > score else text[first:last]
        for (score, first, last), none, text in zip(best, empty, contexts, strict=True)
    ]


def normalised(text: str) -> str:
    """Return a text as SQuAD compares it: in lower case, without punctuation and articles, with single spaces."""
    bare = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())


def answer_scores(said: Sequence[str], truth: Sequence[Sequence[str]]) -> dict[str, float]:
    """Return SQuAD's exact match and F1 of words, as shares of 1, each towards the closest of a sample's true answers.

    Args:
        said: the answer of each sample, empty for none.
        truth: the true answers of each sample; none where the context has no answer.
    """
    exact, overlap = [], []
    for own, texts in zip(said, truth, strict=True):
        true = [normalised(text) for text in texts if normalised(text)] or [""]
        exact.append(max(float(normalised(own) == one) for one in true))
        overlap.append(max(_overlap(normalised(own).split(), one.split()) for one in true))
    return {"exact_match": float(np.mean(exact)), "f1": float(np.mean(overlap))}


def _overlap(said: list[str], true: list[str]) -> float:
    if not said or not true:
        return float(said == true)
    shared = sum((Counter(said) & Counter(true)).values())
    return 2 * shared / (len(said) + len(true))
