"""Universal logit distillation: language models of different vocabularies, compared by their sorted probabilities."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from kdgraft.errors import WiringError
from kdgraft.losses import universal_logits
from kdgraft.pairs import Pairs
from kdgraft.terms import ScoreTerm, check_choice
from kdgraft.wiring import Wiring

from .reader import CountedTokens, OutputScores
from .registry import TERMS
from .tasks import LANGUAGE_MODELS
from .tokens import Tokens, take

Align = Literal["position", "text"]


@TERMS.register
class UniversalLogits(ScoreTerm):
    """L1 distance of the sorted probabilities, for different vocabularies (ULD, Boizard et al. 2024, arXiv 2402.12030).

    Args:
        align: ``"position"`` (the paper) pairs the n-th counted token of both models, up to the shorter sequence; ``"text"`` pairs
            tokens that end at the same character, which the collator finds.
        tokens: see :meth:`kdgraft_nlp.reader.HFReader.scores`.
    """

    in_chunks = False

    def __init__(self, align: Align = "position", *, tokens: CountedTokens = "auto", **settings: Any) -> None:
        super().__init__(**settings)
        check_choice(self, "align", align, ("position", "text"))
        self.align, self.tokens = align, tokens

    def read(self, student: nn.Module, teacher: nn.Module) -> OutputScores:
        return SortedScores(student, teacher, self.name, self.tokens, self.align)

    def compare(self, pairs: Pairs) -> Tensor:
        return universal_logits(pairs.student, pairs.teacher, reduction="none")


class SortedScores(OutputScores):
    """The logits of two language models with any vocabularies, token by token."""

    same_vocabulary = False

    def __init__(self, student: nn.Module, teacher: nn.Module, term: str, tokens: CountedTokens, align: Align) -> None:
        super().__init__(student, teacher, term, tokens, chunked=False)
        self.align = align

    def check(self, student: Tensor, teacher: Tensor, wiring: Wiring) -> None:
        if student.ndim != 3 or teacher.ndim != 3 or self.task not in LANGUAGE_MODELS:
            raise WiringError(f"{self.name} compares the tokens of language models; use SoftTargets for {self.task}")

    def pair_weight(self, tokens: Tokens) -> Tensor | None:
        if self.align == "text":
            return super().pair_weight(tokens)
        ours, theirs = (self.weight(tokens, side) for side in (tokens.student, tokens.teacher))
        if ours is None or theirs is None:
            return ours
        count = torch.minimum(ours.sum(1), theirs.sum(1))
        return torch.arange(int(count.max()) if len(count) else 0, device=count.device)[None] < count[:, None]

    def per_token(self, student: Tensor, teacher: Tensor, tokens: Tokens) -> Pairs:
        if self.align == "text":
            return super().per_token(student, teacher, tokens)
        weight = self.pair_weight(tokens)
        ours, theirs = (self.weight(tokens, side) for side in (tokens.student, tokens.teacher))
        if weight is None or ours is None or theirs is None:
            return Pairs(student, teacher)
        both = _first(student, ours, weight), _first(teacher, theirs, weight)
        return Pairs(*both, count=weight.sum().to(torch.float32))


def _first(logits: Tensor, counted: Tensor, weight: Tensor) -> Tensor:
    """Return the logits ``(n, V)`` of the first counted tokens of each sequence, as many as ``weight`` selects."""
    order = (~counted).to(torch.int8).sort(dim=1, stable=True).indices[:, : weight.shape[1]]
    return take(logits, order)[weight]
