"""Prompts with their answers, and chats, as tokens of which the answers alone have labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from kdgraft.errors import DistillError

from .checks import one_line
from .tokens import IGNORED

Row = tuple[list[int], list[int]]
"""The tokens of a sample, and their labels."""


def is_chat(data: Mapping[str, Any]) -> bool:
    """Return true if the ``data`` of a recipe names columns of prompts and answers, or of chats."""
    return any(data.get(name) is not None for name in ("prompt", "completion", "messages"))


def chat_columns(data: Mapping[str, Any], sets: Mapping[str, Dataset]) -> list[str]:
    """Return the columns of a recipe's chats; a :class:`DistillError` is raised where a set lacks one."""
    entries = ["messages"] if data.get("messages") is not None else ["prompt", "completion"]
    for split, found in sets.items():
        for entry in entries:
            if data[entry] not in found.column_names:
                owner = "training" if split == "train" else "evaluation"
                raise DistillError(
                    f"the {owner} set has no column {data[entry]!r} but {', '.join(found.column_names)}; name it with data.{entry}"
                )
    return [str(data[entry]) for entry in entries]


def encode_chats(
    found: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    columns: Sequence[str],
    length: int,
    weights: str | None = None,
) -> Dataset:
    """Encode prompts and their answers, or chats, whose answers (the assistant's turns) have labels.

    Texts are joined and end with the end-of-text token; messages go through the tokenizer's chat template.

    Args:
        found: the set.
        tokenizer: the tokenizer.
        columns: the column of messages, or those of prompts and answers: texts, or lists of messages.
        length: the number of tokens that are kept of a sample; samples that lose their whole answer are left out.
        weights: a column with the weights of samples to keep, where the set has it.

    Raises:
        DistillError: a sample is malformed, the tokenizer has no chat template or one that changes what came before, or no sample
            has an answer.
    """
    rows, places = [], []
    for place, values in enumerate(zip(*(found[column][:] for column in columns), strict=True)):
        where = f"sample {place} of {' and '.join(map(repr, columns))}"
        row = _of_messages(tokenizer, values[0], where) if len(columns) == 1 else _of_pair(tokenizer, values, where)
        ids, labels = (each[:length] for each in row)
        if any(label != IGNORED for label in labels[1:]):
            rows.append((ids, labels))
            places.append(place)
    if not rows:
        raise DistillError(
            f"no sample of {' and '.join(columns)} has an answer within {length} tokens; raise data.length"
        )
    columns_of = {"input_ids": [ids for ids, _ in rows], "labels": [labels for _, labels in rows]}
    if weights in found.column_names:
        columns_of[str(weights)] = found.select(places)[weights][:]
    return Dataset.from_dict({**columns_of, "attention_mask": [[1] * len(ids) for ids, _ in rows]})


def _of_pair(tokenizer: Any, values: Sequence[Any], where: str) -> Row:
    prompt, answer = values
    if isinstance(prompt, str) and isinstance(answer, str):
        before, after = tokenizer([prompt, answer], add_special_tokens=False)["input_ids"]
        before = begun(tokenizer, prompt, before)
        end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
        after = after if end is None else [*after, end]
        return [*before, *after], [IGNORED] * len(before) + after
    if not _are_messages(prompt) or not _are_messages(answer):
        raise DistillError(f"{where} must be two texts, or two lists of messages {{role: …, content: …}}")
    before, whole = _templated(tokenizer, prompt, True), _templated(tokenizer, [*prompt, *answer], False)
    _check_prefix(before, whole, where)
    return whole, [IGNORED] * len(before) + whole[len(before) :]


def begun(tokenizer: Any, text: str, ids: list[int]) -> list[int]:
    """Return the tokens of a text with the one that its tokenizer begins a text with, if any."""
    first = tokenizer.bos_token_id
    if first is not None and tokenizer(text)["input_ids"][:1] == [first] != ids[:1]:
        return [first, *ids]
    return ids


def _of_messages(tokenizer: Any, messages: Any, where: str) -> Row:
    if not _are_messages(messages):
        raise DistillError(f"{where} must be a list of messages {{role: …, content: …}}")
    whole = _templated(tokenizer, messages, False)
    labels = [IGNORED] * len(whole)
    for place, message in enumerate(messages):
        if message["role"] == "assistant":
            before, after = (
                _templated(tokenizer, messages[:place], True),
                _templated(tokenizer, messages[: place + 1], False),
            )
            _check_prefix(before, whole, where)
            _check_prefix(after, whole, where)
            labels[len(before) : len(after)] = whole[len(before) : len(after)]
    return whole, labels


def _are_messages(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(one, Mapping) and {"role", "content"} <= set(one) for one in value)
    )


def _templated(tokenizer: Any, messages: Sequence[Mapping[str, Any]], opened: bool) -> list[int]:
    if not messages:
        return []
    if not tokenizer.chat_template:
        raise DistillError(
            "messages need a tokenizer with a chat template; set tokenizer.chat_template and save it, or give texts"
        )
    with one_line("the chat template cannot write these messages"):
        found: list[int] = tokenizer.apply_chat_template(
            list(messages), tokenize=True, add_generation_prompt=opened, return_dict=False
        )
    return found


def _check_prefix(before: list[int], whole: list[int], where: str) -> None:
    if whole[: len(before)] != before:
        raise DistillError(
            f"{where}: the chat template changes what came before an answer, so that its tokens cannot be told apart; take another "
            "template, or give prompts and answers as texts"
        )
