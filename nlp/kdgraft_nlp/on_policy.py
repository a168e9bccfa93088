"""The settings of on-policy distillation, and its choice of steps and random numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kdgraft.errors import DistillError, check_number, check_share
from kdgraft.registry import call

COIN, TEXTS = 0, 1
"""The streams of random numbers: of whether a step is on-policy, and, from 1 on, of each text of a step."""


@dataclass(frozen=True, kw_only=True)
class OnPolicy:
    """Settings of on-policy distillation of a causal language model.

    In the chosen steps the student continues the prompts of the data set, and the terms compare it with the teacher on what it
    wrote (GKD, Agarwal et al. 2024, arXiv 2306.13649, algorithm 1). The host's own loss has weight 0 in these steps, as the
    student's texts are no labels; in the others nothing changes.

    A sample's prompt is its text before the first label that is not −100: where no label is left, the whole text.

    Args:
        share: λ in [0, 1]: the share of the steps that are on-policy; every process and every part of an accumulated batch agrees.
        max_new_tokens: the length of a continuation, at most; it ends with the end-of-text token.
        temperature: T > 0 of the distribution that tokens are drawn from.
        top_k, top_p: draw from the k most probable tokens, from the most probable ones that together have the probability p.
        mix: α in [0, 1): tokens are drawn from α·teacher + (1 − α)·student, which keeps a weak student from texts that no teacher
            would write (MiniLLM, Gu et al. 2024, arXiv 2306.08543, equation 4, with 0.2). :class:`~kdgraft_nlp.MiniLLM` weighs
            tokens for it; other terms do not.
        prompt: the number of tokens that are the prompt of a sample with labels from its first token on, or without any.
        eos_token_id: the end-of-text token, or several; by default the tokenizer's (``processing_class``), or the model's.
        seed: the seed of the choice of steps and of all texts; that of the training arguments by default.

    Raises:
        DistillError: a setting makes no sense.

    Example:
        >>> from kdgraft_nlp import OnPolicy
        >>> OnPolicy(share=0.25).chooses(7, 3), OnPolicy(share=1.0).chooses(7, 3)
        (False, True)
    """

    share: float = 0.5
    max_new_tokens: int = 64
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    mix: float = 0.0
    prompt: int = 8
    eos_token_id: int | Sequence[int] | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        check_share("on_policy", "share", self.share)
        check_share("on_policy", "mix", self.mix)
        if self.mix == 1:
            raise DistillError("on_policy: mix must be below 1, where the teacher would write alone")
        for name in ("max_new_tokens", "prompt"):
            check_number("on_policy", name, getattr(self, name), 1, whole=True)
        check_number("on_policy", "temperature", self.temperature, above=True)
        if self.top_k is not None:
            check_number("on_policy", "top_k", self.top_k, 1, whole=True)
        if self.top_p is not None:
            check_number("on_policy", "top_p", self.top_p, above=True)
            check_share("on_policy", "top_p", self.top_p)
        if self.seed is not None:
            check_number("on_policy", "seed", self.seed, whole=True)
        if self.mix and self.cuts:
            raise DistillError("on_policy: mix draws from whole distributions; leave out top_k and top_p, or mix")
        for token in self.ends or ():
            check_number("on_policy", "eos_token_id", token, whole=True)

    @property
    def cuts(self) -> bool:
        """True if tokens are drawn from a part of the distribution."""
        return self.top_k is not None or self.top_p is not None

    @property
    def ends(self) -> list[int] | None:
        """The end-of-text tokens that were given; ``None`` for those of the tokenizer or the model."""
        if self.eos_token_id is None or isinstance(self.eos_token_id, int):
            return None if self.eos_token_id is None else [self.eos_token_id]
        return list(self.eos_token_id)

    def chooses(self, seed: int, step: int) -> bool:
        """Return whether a step is on-policy: a function of the seed and the step alone."""
        return bool(_numbers(seed, step, COIN, 1)[0] < self.share)

    def numbers(self, seed: int, step: int, row: int) -> np.ndarray:
        """Return the random numbers in [0, 1) that draw the tokens of a text, ``(max_new_tokens,)``.

        Args:
            seed: the seed of the run.
            step: the step.
            row: the text's place among those of all processes and parts of the step's batch, so that the division does not matter.
        """
        return _numbers(seed, step, TEXTS + row, self.max_new_tokens)


def _numbers(seed: int, step: int, stream: int, count: int) -> np.ndarray:
    return np.random.default_rng([seed, step, stream]).random(count)


def read_on_policy(given: Any) -> OnPolicy | None:
    """Return the settings that were given as such or as a mapping; a :class:`DistillError` names what is wrong."""
    if given is None or isinstance(given, OnPolicy):
        return given
    if not isinstance(given, Mapping):
        raise DistillError(f"on_policy is OnPolicy(share=0.5, …) or a mapping of its arguments, got {given!r}")
    found: OnPolicy = call(OnPolicy, dict(given), "on_policy")
    return found
