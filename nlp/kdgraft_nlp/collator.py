"""``DistillCollator``: the same view of a batch for both models, even where the teacher has another tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kdgraft.errors import DistillError

from .cache import TeacherCache
from .tokens import SAMPLE_IDS, TEACHER_INPUTS, TEXTS_OF_SAMPLES, TOKEN_PAIRS, TOKEN_STARTS, WEIGHTS
from .weighing import weights_in

PREFIX = "teacher_"


class DistillCollator:
    """A wrapper of any collator: both models are given the batch that it makes, with the same random masking.

    Columns that start with ``teacher_`` (``teacher_pixel_values``, ``teacher_token_type_ids`` …) are stacked and passed to
    the teacher only, without that prefix. With a second tokenizer the text is also tokenised for the teacher, with its own
    padding and special tokens, and tokens are paired: those that end at the same character, or the first ones of each word. The
    tokens between two pairs form groups, which stand for the same part of the text.

    Args:
        collator: any collator, such as ``DataCollatorWithPadding(tokenizer)``.
        teacher_tokenizer: the teacher's tokenizer, where it differs from the student's; both must be fast tokenizers.
        tokenizer: the student's tokenizer; the wrapped collator's by default.
        text: the column with the text (or the two columns of a pair) that the second tokenizer reads, or a teacher that reads texts,
            such as :class:`~kdgraft_nlp.LabelWords`.
        words: a column with the text as a list of words, instead of ``text``.
        max_length: the maximum number of the teacher's tokens; the tokenizer's own limit by default.
        cache: stores the teacher's outputs, so that it runs once for each sample; not for random views of the samples.
        id: the column that identifies the samples, for terms that remember them; the cache's by default.
        weights: the column with a weight for each sample, or a list with one for each of its tokens; see ``weights`` of
            :class:`~kdgraft_nlp.DistillTrainer`.
    """

    def __init__(
        self,
        collator: Callable[[list[Any]], Any],
        teacher_tokenizer: Any = None,
        *,
        tokenizer: Any = None,
        text: str | Sequence[str] | None = None,
        words: str | None = None,
        max_length: int | None = None,
        cache: TeacherCache | None = None,
        id: str | None = None,
        weights: str | None = None,
    ) -> None:
        if not callable(collator):
            raise DistillError(f"DistillCollator wraps a collator, got {type(collator).__name__}")
        self.collator = collator
        self.teacher_tokenizer: Any = teacher_tokenizer
        self.tokenizer: Any = tokenizer if tokenizer is not None else getattr(collator, "tokenizer", None)
        self.text = [text] if isinstance(text, str) else list(text or [])
        self.words = words
        self.max_length = max_length
        self.cache, self.weights = cache, weights
        if cache is not None and id not in (None, cache.id):
            raise DistillError(
                f"the cache identifies samples by {cache.id!r}, not by {id!r}; leave out id, or set TeacherCache(id=…)"
            )
        self.id = id if id is not None else None if cache is None else cache.id
        if cache is not None and getattr(collator, "mlm", False):
            raise DistillError(
                "random masking changes the inputs in every epoch, so that outputs cannot be cached; leave out cache"
            )
        if teacher_tokenizer is None:
            return
        if getattr(collator, "mlm", False):
            raise DistillError(
                "the same random mask cannot be drawn for two tokenizers; distil masked models with one tokenizer"
            )
        if bool(self.text) == bool(words):
            raise DistillError("a second tokenizer needs the text; name its column with text='text' or words='tokens'")
        if self.tokenizer is None:
            raise DistillError("the wrapped collator has no tokenizer; pass the student's as tokenizer=…")
        for owner, found in (("student's", self.tokenizer), ("teacher's", teacher_tokenizer)):
            if not getattr(found, "is_fast", False):
                raise DistillError(f"the {owner} tokenizer must be a fast one, which returns the offsets of tokens")

    @property
    def columns(self) -> list[str]:
        """The columns of the data set that it reads beside the models' own and those that start with ``teacher_``."""
        return [*self.text, *(name for name in (self.words, self.id, self.weights) if name is not None)]

    def __call__(self, features: list[Any]) -> dict[str, Any]:
        """Return the wrapped collator's batch, with ``teacher_inputs``, ``texts``, ``token_pairs`` and ``token_starts`` where needed."""
        if not features or not isinstance(features[0], Mapping):
            return self.collator(features)
        extra = set(self.columns)
        plain = [
            {name: value for name, value in feature.items() if name not in extra and not name.startswith(PREFIX)}
            for feature in features
        ]
        batch = dict(self.collator(plain))
        if "input_ids" in batch and len(batch["input_ids"]) != len(features):
            self._refuse_packed(features[0])
        teacher = {
            name.removeprefix(PREFIX): _stacked(features, name) for name in features[0] if name.startswith(PREFIX)
        }
        if self.teacher_tokenizer is not None:
            encoded, found = self._second_view(features, batch)
            teacher.update(encoded)
            batch.update(found)
        texts = {name: [feature[name] for feature in features] for name in self.text if name in features[0]}
        if texts:
            batch[TEXTS_OF_SAMPLES] = texts
        if teacher:
            batch[TEACHER_INPUTS] = teacher
        if self.weights is not None and self.weights in features[0]:  # sets to evaluate on need none
            batch[WEIGHTS] = weights_in(features, self.weights, batch)
        if self.id is not None:
            if self.id not in features[0]:
                who, remedy = (
                    ("the cache", "TeacherCache(id=…)") if self.cache is not None else ("id", "id to a column")
                )
                raise DistillError(
                    f"{who} needs column {self.id!r}, not in {', '.join(features[0])}; keep it, or set {remedy}"
                )
            batch[SAMPLE_IDS] = [str(feature[self.id]) for feature in features]
        return batch

    def _refuse_packed(self, feature: Mapping[str, Any]) -> None:
        own = [name for name in feature if name.startswith(PREFIX)]
        for reason, found in (
            ("a second tokenizer", self.teacher_tokenizer is not None),
            ("a cache", self.cache is not None),
            (f"id={self.id!r}", self.id is not None),
            (f"weights={self.weights!r}", self.weights is not None),
            (f"column {', '.join(own)!r}", bool(own)),
        ):
            if found:
                raise DistillError(f"{reason} needs one row per sample; use a collator that pads, not one that packs")

    def _second_view(
        self, features: list[Any], batch: Mapping[str, Any]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        columns = [self.words] if self.words else self.text
        for column in columns:
            if column not in features[0]:
                raise DistillError(
                    f"there is no column {column!r} for the collator in {', '.join(features[0])}; keep it in the data set"
                )
        texts = [[feature[column] for feature in features] for column in columns]
        settings = dict(truncation=True, return_offsets_mapping=True, is_split_into_words=bool(self.words))
        theirs = self.teacher_tokenizer(
            *texts, **settings, **({"max_length": self.max_length} if self.max_length else {})
        )
        ours = self.tokenizer(*texts, **settings)
        fields = [name for name in theirs if name != "offset_mapping"]
        padded = self.teacher_tokenizer.pad({name: theirs[name] for name in fields}, return_tensors="pt")
        mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
        pairs, starts = [], []
        for i in range(len(features)):
            place = mask[i].nonzero().flatten().tolist()
            found = batch["input_ids"][i][place].tolist()
            own = ours
            if ours["input_ids"][i] != found:  # perhaps truncated to another length
                one = [[text[i]] for text in texts]
                own = self.tokenizer(*one, **{**settings, "max_length": len(found)})
            sample = i if own is ours else 0
            if own["input_ids"][sample] != found:
                raise DistillError(
                    f"{', '.join(columns)!r} does not tokenise to the student's input_ids; use the tokenizer and text of the data set"
                )
            there = padded["attention_mask"][i].nonzero().flatten().tolist()
            found_pairs = align(own, theirs, sample, i, words=bool(self.words))
            pairs.append([(place[a], there[b]) for a, b in found_pairs])
            if not self.words:
                both = zip(*found_pairs, strict=True) if found_pairs else ((), ())
                ends = zip((own, theirs), (sample, i), both, (place, there), strict=True)
                sides = [[where[k] for k in group_starts(encoding, n, at)] for encoding, n, at, where in ends]
                starts.append(list(zip(*sides, strict=True)))
        views = {TOKEN_PAIRS: _padded(pairs), **({TOKEN_STARTS: _padded(starts)} if starts else {})}
        return dict(padded), views


def take_weights(trainer: Any, column: str, distils: bool) -> str:
    """Have a trainer's collator return the weights in a column, and return its name.

    Args:
        trainer: the trainer, whose collator is wrapped unless it is a :class:`DistillCollator`.
        column: the name of the column.
        distils: whether the trainer has terms.

    Raises:
        DistillError: it has none, or the collator has the weights of another column.
    """
    if not distils:
        raise DistillError("weights is for distillation only; give terms or a recipe, or leave it out")
    if not isinstance(column, str):
        raise DistillError(f"weights must be the name of a column of the training set, got {column!r}")
    collator = trainer.data_collator
    if not isinstance(collator, DistillCollator):
        collator = trainer.data_collator = DistillCollator(collator)
    if collator.weights not in (None, column):
        raise DistillError(f"weights={column!r}, and the collator has those of {collator.weights!r}; name one column")
    collator.weights = column
    return column


def _padded(rows: list[list[tuple[int, int]]]) -> Tensor:
    """Return pairs of positions as ``(B, P, 2)``, padded with −1."""
    found = torch.full((len(rows), max(map(len, rows), default=0), 2), -1)
    for i, row in enumerate(rows):
        if row:
            found[i, : len(row)] = torch.tensor(row)
    return found


def _stacked(features: list[Any], name: str) -> Tensor:
    values = [torch.as_tensor(feature[name]) for feature in features]
    if len({value.shape for value in values}) > 1:
        raise DistillError(
            f"column {name!r} has values of different lengths; pad the column, or give the collator teacher_tokenizer=… and the text"
        )
    return torch.stack(values)


def align(student: Any, teacher: Any, ours: int, theirs: int, *, words: bool = False) -> list[tuple[int, int]]:
    """Pair the positions of corresponding tokens of one sample that two fast tokenizers encoded.

    Args:
        student, teacher: the encodings, with offsets.
        ours, theirs: the index of the sample in each encoding.
        words: pair the first tokens of each word, instead of tokens that end at the same character.
    """
    sides = ((student, ours), (teacher, theirs))
    keys = [_words(encoding, sample) if words else _ends(encoding, sample) for encoding, sample in sides]
    return [(place, keys[1][key]) for key, place in keys[0].items() if key in keys[1]]


def _words(encoding: Any, sample: int) -> dict[Any, int]:
    found: dict[Any, int] = {}
    for place, (word, part) in enumerate(zip(encoding.word_ids(sample), encoding.sequence_ids(sample), strict=True)):
        if word is not None:
            found.setdefault((part, word), place)
    return found


def _ends(encoding: Any, sample: int) -> dict[Any, int]:
    parts = encoding.sequence_ids(sample)
    found: dict[Any, int] = {}
    for place, ((start, end), part) in enumerate(zip(encoding["offset_mapping"][sample], parts, strict=True)):
        if part is not None and end > start:
            found[part, end] = place  # the last token of a character replaces the others
    return found


def group_starts(encoding: Any, sample: int, ends: Sequence[int]) -> list[int]:
    """Return the first token of each group of tokens: those after the end of the group before, without special tokens.

    Args:
        encoding: the encoding of a fast tokenizer.
        sample: the index of the sample in it.
        ends: the last token of each group, ascending.
    """
    found: list[int] = []
    start = before = None
    for place, part in enumerate(encoding.sequence_ids(sample)):
        if part is None:
            continue
        start = place if start is None or part != before else start
        before = part
        if len(found) < len(ends) and place == ends[len(found)]:
            found.append(start)
            start = None
    return found
