"""What servers of language models say of the tokens of a prompt: requests and answers of vLLM and SGLang.

Each gives, for every token of the prompt, the largest log-probabilities of what may stand at its place, given the tokens before it.
The distribution after the last token is that of the one token which is generated.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kdgraft.errors import DistillError

NEUTRAL = {
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": -1,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}
"""Sampling that changes no probability, in place of the defaults that a model's ``generation_config.json`` may bring."""
MARK = "token_id:"
"""The beginning of a token in vLLM's answers under ``return_tokens_as_token_ids``."""
IMPOSSIBLE = -9999.0
"""vLLM's number for the logarithm of 0."""
Entries = Mapping[int, float]


class Known(NamedTuple):
    """The largest entries of the distribution after each of L tokens.

    Attributes:
        ids: ``(L, k)``: the entries, the most probable first.
        logs: ``(L, k)``: their log-probabilities.
    """

    ids: NDArray[np.int64]
    logs: NDArray[np.float64]


class Api(NamedTuple):
    """A way to ask a server.

    Attributes:
        path: the path of its requests.
        body: makes a request of ``(token ids, k, model)``.
        read: reads an answer, given the token ids that were sent: the tokens that the server says it read, ``None`` where it says
            nothing, and the entries at each of their places but the first, and after the last.
        field: where its answers have the log-probabilities, for messages.
    """

    path: str
    body: Callable[[Sequence[int], int, str], dict[str, Any]]
    read: Callable[[Any, Sequence[int]], tuple[list[int | None], list[Entries]]]
    field: str


def _completion(ids: Sequence[int], k: int, model: str) -> dict[str, Any]:
    """Return a request of vLLM's completions that gives the log-probabilities of the generated token."""
    told = {"model": model, "prompt": list(ids), "max_tokens": 1, "logprobs": k, **NEUTRAL}
    return {**told, "return_tokens_as_token_ids": True, "return_token_ids": True}


def _numbered(entries: Mapping[str, float]) -> Entries:
    return {int(token.removeprefix(MARK)): float(log) for token, log in entries.items()}


def _read_vllm(answer: Any, ids: Sequence[int]) -> tuple[list[int | None], list[Entries]]:
    (choice,) = answer["choices"]
    first, *given = choice["prompt_logprobs"]
    if first is not None:
        raise ValueError("the first token has probabilities")
    (last,) = choice["logprobs"]["top_logprobs"]
    found = [{int(token): float(told["logprob"]) for token, told in entries.items()} for entries in given]
    # Each token of the prompt is among the entries at its place, whatever its probability.
    seen = [None, *(token if token in entries else -1 for token, entries in zip(ids[1:], found, strict=False))]
    if choice.get("prompt_token_ids") is not None:  # newer versions repeat them
        repeated = choice["prompt_token_ids"]
        seen = [-1 if own == -1 else int(token) for own, token in zip(seen, repeated, strict=False)]
    return seen, [*found, _numbered(last)]


def _read_echo(answer: Any, ids: Sequence[int]) -> tuple[list[int | None], list[Entries]]:
    (choice,) = answer["choices"]
    tokens, entries = choice["logprobs"]["tokens"], choice["logprobs"]["top_logprobs"]
    if entries[0] is not None or len(tokens) != len(entries):
        raise ValueError("the first token has probabilities")
    return [int(token.removeprefix(MARK)) for token in tokens[:-1]], [_numbered(one) for one in entries[1:]]


def _read_sglang(answer: Any, ids: Sequence[int]) -> tuple[list[int | None], list[Entries]]:
    told = answer["meta_info"]
    first, *given = told["input_top_logprobs"]
    if first is not None:
        raise ValueError("the first token has probabilities")
    tokens = [int(token) for _, token, *_ in told["input_token_logprobs"]]
    after = told["output_top_logprobs"][:1]
    return list(tokens), [{int(token): float(log) for log, token, *_ in entries} for entries in (*given, *after)]


def _generation(ids: Sequence[int], k: int, model: str) -> dict[str, Any]:
    sampling = {**NEUTRAL, "max_new_tokens": 1}
    whole = {"return_logprob": True, "logprob_start_len": 0, "top_logprobs_num": k}
    return {"input_ids": list(ids), "sampling_params": sampling, **whole}


APIS: dict[str, Api] = {
    "vllm": Api(
        "/v1/completions",
        lambda ids, k, model: {**_completion(ids, k, model), "prompt_logprobs": k},
        _read_vllm,
        "choices[].prompt_logprobs",
    ),
    "echo": Api(
        "/v1/completions",
        lambda ids, k, model: {**_completion(ids, k, model), "echo": True},
        _read_echo,
        "choices[].logprobs with tokens as 'token_id:…'",
    ),
    "sglang": Api("/generate", _generation, _read_sglang, "meta_info.input_top_logprobs"),
}
"""``vllm``: its own field ``prompt_logprobs``; ``echo``: the completions of OpenAI's API that repeat the prompt, as vLLM has them;
``sglang``: SGLang's own ``/generate``."""


def known_of(api: str, answer: Any, ids: Sequence[int], k: int, classes: int) -> Known:
    """Return the k largest entries after each token of a prompt.

    Args:
        api: one of :data:`APIS`.
        answer: the answer of the server.
        ids: the token ids that were sent.
        k: the number of entries that were asked for.
        classes: the number of entries of the student's vocabulary.

    Raises:
        DistillError: the answer has another form, is of other tokens, has fewer entries, or numbers that are no log-probabilities
            of the student's vocabulary.
    """
    how = APIS[api]
    try:
        seen, entries = how.read(answer, ids)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError):
        raise DistillError(
            f"the server's answer has no {how.field} for each token, as api={api!r} needs; take another api ({', '.join(APIS)}), or a server "
            "that gives the log-probabilities of a prompt"
        ) from None
    if len(seen) != len(ids) or len(entries) != len(ids):
        read = len(entries) if len(entries) != len(ids) else len(seen)
        raise DistillError(
            f"the server read {read} tokens, and {len(ids)} were sent; it may cut prompts, or add tokens to them"
        )
    other = [place for place, (mine, own) in enumerate(zip(ids, seen, strict=True)) if own is not None and own != mine]
    if other:
        raise DistillError(
            f"the server read another token than {ids[other[0]]}, which was sent as token {other[0]} of {len(ids)}"
        )
    fewest = min(map(len, entries))
    if fewest < k:
        raise DistillError(too_few(fewest, k))
    return _largest(entries, k, classes)


def too_few(given: int | str, k: int) -> str:
    """Return the message for a server that gives fewer log-probabilities than were asked for."""
    return (
        f"the server gives {given} log-probabilities of a token, and top_k is {k}; start it with --max-logprobs {k} (vLLM's default is "
        "20), or lower top_k"
    )


def _largest(entries: Sequence[Entries], k: int, classes: int) -> Known:
    ids, logs = np.zeros((len(entries), k), np.int64), np.zeros((len(entries), k))
    for place, one in enumerate(entries):
        own, values = np.fromiter(one.keys(), np.int64, len(one)), np.fromiter(one.values(), np.float64, len(one))
        order = np.argsort(-values, kind="stable")[:k]
        ids[place], logs[place] = own[order], values[order]
    mass = np.exp(np.minimum(logs, 1.0)).sum(1)
    if np.isnan(logs).any() or (mass > 1.01).any() or (k >= classes and (mass < 0.99).any()):
        raise DistillError(
            "the server's numbers are no log-probabilities, as they do not add up to 1; start vLLM with --logprobs-mode raw_logprobs, "
            "its default"
        )
    if (ids >= classes).any() or (ids < 0).any():
        raise DistillError(
            f"the server gives token {int(ids.max())} among the most probable ones, and the student has {classes} entries; the two "
            "vocabularies are not the same"
        )
    return Known(ids, np.maximum(logs, IMPOSSIBLE))
