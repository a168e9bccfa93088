"""A causal language model as a teacher of classes: the probabilities of words that stand for them, after a filled template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Formatter
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import AutoTokenizer
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from kdgraft.errors import DistillError, WiringError, nearest
from kdgraft.isolation import eval_mode
from kdgraft.sources.teacher import is_placed

from .chats import begun
from .checks import check_folder, one_line
from .class_teachers import ClassTeacher, Scorer
from .columns import columns_in, texts_of
from .loading import load_whole
from .pen import room_of
from .predictions import MULTI_LABEL
from .registry import SOURCES
from .second_tokenizer import TEXTS
from .tasks import accepted, task_of
from .tokens import TEXTS_OF_SAMPLES

Words = Mapping[str, Sequence[str] | str]
_PLACE = "a text"
"""The text that fills a template to find the tokens of its words."""


def read_template(template: Any, columns: Sequence[str] | None = None) -> list[tuple[str, str | None]]:
    """Return a template as pieces of text, each with the column that follows it, or ``None``.

    Args:
        template: the template, with ``{column}`` in the place of a text; ``{{`` and ``}}`` are braces.
        columns: the columns that it must have; by default at least one.

    Raises:
        DistillError: it lacks one of them, or has another one.
    """
    if not isinstance(template, str):
        raise DistillError(f"LabelWords: template must be a text with {{text}} in it, got {template!r}")
    try:
        pieces = [(text, name) for text, name, _, _ in Formatter().parse(template)]
    except ValueError as error:
        raise DistillError(f"LabelWords: cannot read template {template!r}: {error}") from None
    named = [name for _, name in pieces if name is not None]
    wanted = ["text"] if columns is None else list(columns)
    missing = [name for name in wanted if name not in named] if columns is not None or not named else []
    if missing:
        raise DistillError(
            f"LabelWords: template lacks {{{missing[0]}}}, where the sample's text belongs; got {template!r}"
        )
    other = [name for name in named if not name or (columns is not None and name not in wanted)]
    if other:
        takes = " and ".join(f"{{{name}}}" for name in wanted)
        raise DistillError(f"LabelWords: template has {{{other[0]}}}, and the texts are {takes}; got {template!r}")
    return pieces


def read_words(words: Any) -> dict[str, list[str]]:
    """Return the words of each class.

    Raises:
        DistillError: there are fewer than two classes, one has no word, or two share one.
    """
    if not isinstance(words, Mapping) or len(words) < 2:
        raise DistillError(
            f"LabelWords: words must have two classes or more, such as {{positive: [' good'], negative: [' bad']}}; got {words!r}"
        )
    found = {str(name): [given] if isinstance(given, str) else given for name, given in words.items()}
    owners: dict[str, str] = {}
    for name, own in found.items():
        if not isinstance(own, (list, tuple)) or not own or not all(isinstance(word, str) and word for word in own):
            raise DistillError(f"LabelWords: class {name!r} needs a list of one word or more, got {own!r}")
        for word in own:
            if word in owners:
                which = f"twice for {name!r}" if owners[word] == name else f"for {owners[word]!r} and {name!r}"
                raise DistillError(f"LabelWords: the word {word!r} is given {which}; give it once")
            owners[word] = name
    return {name: list(own) for name, own in found.items()}


def check_label_words(entry: str, spec: Mapping[str, Any], recipe: Mapping[str, Any]) -> None:
    """Check a recipe's ``{type: LabelWords, …}`` before its model is loaded.

    Args:
        entry: the name of the source in the recipe.
        spec: what the recipe says.
        recipe: the recipe.

    Raises:
        DistillError: its template, words or folder cannot be used, or the task is another one.
    """
    if recipe.get("task") != "classification":
        raise DistillError(f"{entry}: LabelWords gives classes of texts (task: classification); leave it out")
    known = ("type", "model", "template", "words", "tokenizer")
    for key in spec:
        if key not in known:
            raise DistillError(f"{entry}: LabelWords takes no argument {key!r}{nearest(str(key), known)}")
    if not isinstance(spec.get("model"), (str, Path)):
        raise DistillError(
            f"{entry}: LabelWords needs model: the folder of a causal language model, got {spec.get('model')!r}"
        )
    read_template(spec.get("template"), columns_in((recipe.get("data") or {}).get("text") or "text"))
    read_words(spec.get("words"))
    check_folder(entry, spec["model"])
    check_folder(f"tokenizer of the {entry}", spec.get("tokenizer") or spec["model"], "tokenizer_config.json")


class _WordScorer(Scorer):
    """The logarithm of the probability of each class's words.

    Several words of which some have the same beginning are read in one row of tokens: of the prompt, and of the longest beginnings
    without their last tokens.
    """

    def __init__(self, model: Any, tokenizer: Any, template: str, words: Mapping[str, Sequence[str]]) -> None:
        super().__init__([TEXTS_OF_SAMPLES], list(words))
        self.model, self.tokenizer = model, tokenizer
        self.pieces = read_template(template)
        self.words = [(k, self._tokens(word)) for k, own in enumerate(words.values()) for word in own]
        heads = {tokens[:-1] for _, tokens in self.words}
        self.tails = sorted(one for one in heads if not any(one == other[: len(one)] for other in heads - {one}))
        self.rows = [
            next(row for row, tail in enumerate(self.tails) if tail[: len(tokens) - 1] == tokens[:-1])
            for _, tokens in self.words
        ]

    def prompt(self, texts: Mapping[str, str]) -> str:
        """Return the template, filled with the texts of a sample."""
        return "".join(text + ("" if name is None else texts[name]) for text, name in self.pieces)

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return begun(self.tokenizer, text, ids)

    def _tokens(self, word: str) -> tuple[int, ...]:
        """Return the tokens of a word where it follows the template."""
        before = self.prompt({name: _PLACE for _, name in self.pieces if name is not None})
        ids, whole = self._ids(before), self._ids(before + word)
        if whole[: len(ids)] != ids or len(whole) == len(ids):
            raise DistillError(
                f"LabelWords: the tokens of {word!r} cannot be told from those of the template's end; begin the word with a space, and end "
                "the template without one"
            )
        return tuple(whole[len(ids) :])

    def distill_example(self, device: torch.device) -> dict[str, Any]:
        names = {name for _, name in self.pieces if name is not None}
        return {TEXTS_OF_SAMPLES: {name: [_PLACE, f"{_PLACE} of words"] for name in names}}

    def scores(self, batch: dict[str, Any]) -> Tensor:
        texts = batch[TEXTS_OF_SAMPLES]
        for name in (name for _, name in self.pieces if name is not None):
            if name not in texts:
                raise DistillError(
                    f"LabelWords reads the text {name!r}, and the batch has {', '.join(texts)}; give the collator text={name!r}"
                )
        samples = [dict(zip(texts, row, strict=True)) for row in zip(*texts.values(), strict=True)]
        prompts = [self._ids(self.prompt(sample)) for sample in samples]
        longest, room = max(map(len, prompts)) + max(map(len, self.tails)), room_of(self.model)
        if room is not None and longest > room:
            raise DistillError(
                f"LabelWords: a filled template has {longest} tokens, and the model {room} positions; lower data.length, or shorten it"
            )
        return self._of_classes(self._of_tokens(prompts))

    def _of_tokens(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Return log-probabilities of all tokens after each prompt and its tails, ``(B, rows, positions, V)``."""
        device = self.model.get_input_embeddings().weight.device
        rows = [[*prompt, *tail] for prompt in prompts for tail in self.tails]
        width, pad = max(map(len, rows)), self.tokenizer.pad_token_id or 0
        # Padding on the right: a causal model's logits before it, and its positions, are those without.
        inputs: dict[str, Any] = {
            "input_ids": torch.tensor([row + [pad] * (width - len(row)) for row in rows], device=device),
            "attention_mask": torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device),
        }
        takes = accepted(self.model)
        steps = 1 + max(map(len, self.tails))
        last = torch.tensor([len(prompt) - 1 for prompt in prompts for _ in self.tails], device=device)
        places = (last[:, None] + torch.arange(steps, device=device)).clamp(max=width - 1)
        if "logits_to_keep" in takes:  # the logits of whole texts would be large
            kept, places = places.unique(return_inverse=True)
            inputs["logits_to_keep"] = kept
        if "use_cache" in takes:
            inputs["use_cache"] = False
        logits = self.model(**inputs)["logits"]
        found = logits.gather(1, places[..., None].to(logits.device).expand(-1, -1, logits.shape[-1]))
        return found.float().log_softmax(-1).unflatten(0, (len(prompts), len(self.tails)))

    def _of_classes(self, tokens: Tensor) -> Tensor:
        """Return the logarithm of the probability of each class, ``(B, C)``."""
        each: list[list[Tensor]] = [[] for _ in self.config.id2label]
        for (owner, word), row in zip(self.words, self.rows, strict=True):
            each[owner].append(torch.stack([tokens[:, row, place, token] for place, token in enumerate(word)]).sum(0))
        return torch.stack([torch.stack(own).logsumexp(0) for own in each], 1)


@SOURCES.register
class LabelWords(ClassTeacher):
    r"""A causal language model that teaches a classifier by the words that it expects after a filled template.

    The score of a class is the logarithm of the probability of its words: that of a word of several tokens is the sum of its tokens'
    log-probabilities, and several words of a class are alternatives, whose probabilities are added. A term's softmax over the classes
    then normalises them (pattern and verbalizer, Schick & Schütze 2021, arXiv 2001.07676, section 3.1). The model reads the texts with its
    own tokenizer, so that the collator must keep them: ``DistillCollator(…, text="text")``. Recipe files do so by themselves.

    Args:
        model: a causal language model, or its folder.
        template: the prompt, with ``{column}`` in the place of each text: ``"{text}\nIt is"``, or for pairs
            ``"{premise}\nQuestion: {hypothesis} True or false?\nAnswer:"``.
        words: the words of each class, as they follow the template, mostly with a space before them.
        tokenizer: the model's tokenizer, or its folder; that in the model's folder by default.
        columns: for each column in the template, the name under which the collator keeps its texts, where that is another one.

    Raises:
        DistillError: the template or the words cannot be used, or the model is no causal language model.

    Example:
        >>> LabelWords("nowhere", "It is", {"positive": [" good"], "negative": [" bad"]})  # doctest: +IGNORE_EXCEPTION_DETAIL
        Traceback (most recent call last):
        DistillError: LabelWords: template lacks {text}, where the sample's text belongs; got 'It is'
    """

    def __init__(
        self,
        model: str | Path | nn.Module,
        template: str,
        words: Words,
        tokenizer: Any = None,
        columns: Mapping[str, str] | None = None,
    ) -> None:
        read_template(template, None if columns is None else list(columns))
        found = read_words(words)
        given = model if tokenizer is None else tokenizer
        if isinstance(given, nn.Module):
            given = getattr(given, "name_or_path", "")
        if isinstance(given, (str, Path)):
            check_folder("tokenizer", given, "tokenizer_config.json")
            with one_line("LabelWords: tokenizer"):
                given = AutoTokenizer.from_pretrained(given)
        causal: Any = load_whole(AutoModelForCausalLM, model) if isinstance(model, (str, Path)) else model
        if not isinstance(causal, nn.Module) or task_of(causal) != "causal":
            raise DistillError(
                f"LabelWords: model must be a causal language model or its folder, got {type(causal).__name__}"
            )
        self.scorer = _WordScorer(causal, given, template, found)
        super().__init__(self.scorer)
        if columns is not None:
            self.scorer.pieces = [(text, name and columns[name]) for text, name in self.scorer.pieces]

    @property
    def placed(self) -> bool:
        return is_placed(self.scorer.model)

    def fit_to(self, student: Any) -> None:
        super().fit_to(student)
        if student.config.problem_type == MULTI_LABEL:
            raise WiringError(
                "LabelWords gives one class of several, and the student has independent ones; use SoftLabels"
            )

    def labelled(self, found: Dataset, column: str = "soft_labels", batch_size: int = 16) -> Dataset:
        """Return a data set with a column of the classes' probabilities, for :class:`~kdgraft_nlp.SoftLabels`.

        The order of the classes is that of ``words``. The model then need not run in training.

        Args:
            found: a data set with the template's columns.
            column: the name of the new column.
            batch_size: the number of samples that are read at once.
        """
        names = list(dict.fromkeys(name for _, name in self.scorer.pieces if name is not None))
        texts, rows = texts_of(found, names), []
        self.scorer.config.id2label = dict(enumerate(self.scorer.classes or []))
        with torch.no_grad(), eval_mode(self.scorer):
            for start in range(0, len(found), batch_size):
                part = {name: own[start : start + batch_size] for name, own in zip(names, texts, strict=True)}
                rows += self.scorer.scores({TEXTS_OF_SAMPLES: part}).softmax(-1).tolist()
        return found.add_column(column, rows)


def fill_columns(spec: Any, text: Any) -> Any:
    """Return a recipe's source with the columns of its texts, as the recipe's collator keeps them, if it reads texts."""
    if not reads_texts(spec):
        return spec
    return {**spec, "columns": dict(zip(columns_in(text), TEXTS, strict=False))}


def reads_texts(spec: Any) -> bool:
    """Return whether a source of a recipe reads texts."""
    return isinstance(spec, Mapping) and spec.get("type") == "LabelWords"
