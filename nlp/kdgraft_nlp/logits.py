"""Terms on language models of different vocabularies: universal logit distillation (ULD), and GOLD."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdgraft.balance import Weight
from kdgraft.errors import WiringError, check_share
from kdgraft.losses import gold, universal_logits, upcast
from kdgraft.losses.gold import FLOOR
from kdgraft.pairs import Pairs
from kdgraft.terms import ScoreTerm, check_choice
from kdgraft.wiring import Wiring

from .reader import CountedTokens, OutputScores
from .registry import RECIPES, TERMS
from .tasks import LANGUAGE_MODELS
from .tokens import ModelTokens, Tokens, take

Align = Literal["position", "text", "groups"]
Merge = Literal["bayesian", "observed"]


@TERMS.register
@RECIPES.register("uld")
class UniversalLogits(ScoreTerm):
    """L1 distance of the sorted probabilities, for different vocabularies (ULD, Boizard et al. 2024, arXiv 2402.12030).

    The authors add it with weight 1.5 to the cross-entropy of the student's own tokens.

    Args:
        align: ``"position"`` (the paper) pairs the n-th counted token of both models, up to the shorter sequence; ``"text"`` pairs
            tokens that end at the same character, which the collator finds; ``"groups"`` compares the groups of tokens between
            two such pairs, for causal models, see :class:`GOLD`.
        merge: the distribution of a group of tokens: ``"bayesian"`` or ``"observed"``, see :class:`GOLD`.
        tokens: see :meth:`kdgraft_nlp.reader.HFReader.scores`.
        weight: λ, 1.5 in the paper.
    """

    in_chunks = False

    def __init__(
        self,
        align: Align = "position",
        *,
        merge: Merge = "bayesian",
        tokens: CountedTokens = "auto",
        weight: Weight = 1.5,
        **settings: Any,
    ) -> None:
        super().__init__(weight=weight, **settings)
        check_choice(self, "align", align, ("position", "text", "groups"))
        check_choice(self, "merge", merge, ("bayesian", "observed"))
        self.align, self.merge, self.tokens = align, merge, tokens

    def read(self, student: nn.Module, teacher: nn.Module) -> OutputScores:
        return SortedScores(student, teacher, self.name, self.tokens, self.align, self.merge)

    def compare(self, pairs: Pairs) -> Tensor:
        return universal_logits(pairs.student, pairs.teacher, **shares_of(pairs), reduction="none")


@TERMS.register
@RECIPES.register("gold")
class GOLD(UniversalLogits):
    """GOLD: groups of tokens that cover the same text; shared entries by divergence, the others by ULD (Hugging Face 2025, TRL).

    The tokens of both models between two places at which both have the end of a token form a group. Its distribution is that of
    its last token times the probability of the tokens before (``"bayesian"``), which is the chain rule. TRL's default,
    ``"observed"``, multiplies the distribution of the first token by the probabilities of those after it, which it reads one
    position late, at the tokens themselves. Groups whose tokens all count have equal weight, where TRL takes the mean of a text
    first. Texts end inside a character nowhere, so that groups are at times coarser than TRL's groups of bytes.

    The batch needs ``DistillCollator(…, teacher_tokenizer=…, text=…)``. Probabilities of entries that both tokenizers write alike
    are compared by a generalised Jensen-Shannon divergence, the others by the sorted distance. TRL trains on texts that the
    student wrote, with weight 1.

    Args:
        beta: β of the divergence: 0 is the forward, 1 the reverse KL.
        shared_weight: the weight w of the shared entries, and 1 − w of the others; by default the shared part of the teacher's
            vocabulary.
        align, merge, tokens: see :class:`UniversalLogits`.
        weight: the weight beside the host's loss.
    """

    def __init__(
        self,
        align: Align = "groups",
        *,
        beta: float = 0.5,
        shared_weight: float | None = None,
        weight: Weight = 1.0,
        **settings: Any,
    ) -> None:
        super().__init__(align, weight=weight, **settings)
        check_share("GOLD", "beta", beta)
        if shared_weight is not None:
            check_share("GOLD", "shared_weight", shared_weight)
        self.beta, self.shared_weight = beta, shared_weight
        self.register_buffer("shared", torch.zeros(0, 2, dtype=torch.long), persistent=False)

    def wire(self, wiring: Wiring) -> None:
        super().wire(wiring)
        shared = wiring.facts.get("shared_tokens")
        if shared is None:
            raise WiringError(
                f"{self.name} compares entries that both vocabularies share, and needs both tokenizers; give the trainer "
                "processing_class=… and DistillCollator(…, teacher_tokenizer=…), or use UniversalLogits"
            )
        found: Tensor = shared() if callable(shared) else shared
        sizes = [wiring.student_recording[self.student_taps[0]], wiring.teacher_recording[self.teacher_taps[0]]]
        inside = found < torch.tensor([logits.shape[-1] for logits in sizes])
        self.shared = found[inside.all(1)].to(sizes[0].device)

    def compare(self, pairs: Pairs) -> Tensor:
        settings = dict(beta=self.beta, shared_weight=self.shared_weight, reduction="none")
        return gold(pairs.student, pairs.teacher, self.shared, **shares_of(pairs), **settings)  # type: ignore[arg-type]


@dataclass
class GroupPairs(Pairs):
    """The logits of groups of tokens, and the probability of the group's other tokens, ``(n,)``, for each model."""

    student_share: Tensor | None = None
    teacher_share: Tensor | None = None


def shares_of(pairs: Pairs) -> dict[str, Tensor | None]:
    """Return the shares of groups of tokens as arguments of losses."""
    if not isinstance(pairs, GroupPairs):
        return {}
    return {"student_share": pairs.student_share, "teacher_share": pairs.teacher_share}


class SortedScores(OutputScores):
    """The logits of two language models with any vocabularies, token by token, or group by group."""

    same_vocabulary = False

    def __init__(
        self, student: nn.Module, teacher: nn.Module, term: str, tokens: CountedTokens, align: Align, merge: Merge
    ) -> None:
        super().__init__(student, teacher, term, tokens, chunked=False)
        self.align, self.merge = align, merge
        if align == "groups" and self.task != "causal":
            raise WiringError(
                f"{term}: a group's probability is a product for causal models only, and {type(student).__name__} is none; "
                "use UniversalLogits with align='text'"
            )

    def check(self, student: Tensor, teacher: Tensor, wiring: Wiring) -> None:
        if student.ndim != 3 or teacher.ndim != 3 or self.task not in LANGUAGE_MODELS:
            raise WiringError(f"{self.name} compares the tokens of language models; use SoftTargets for {self.task}")

    def pair_weight(self, tokens: Tokens) -> Tensor | None:
        if self.align == "groups" and tokens.pairs is not None:
            return self._groups(tokens)
        if self.align != "position":
            return super().pair_weight(tokens)
        ours, theirs = (self.weight(tokens, side) for side in (tokens.student, tokens.teacher))
        if ours is None or theirs is None:
            return ours
        count = torch.minimum(ours.sum(1), theirs.sum(1))
        return torch.arange(int(count.max()) if len(count) else 0, device=count.device)[None] < count[:, None]

    def _groups(self, tokens: Tokens) -> Tensor:
        """Return the groups ``(B, P)`` of which all student's tokens count, and whose first tokens have predictions."""
        if tokens.starts is None or tokens.pairs is None or tokens.paired is None:
            raise WiringError(
                f"{self.name}: align='groups' needs the text of both tokenizers; use DistillCollator(…, teacher_tokenizer=…, text=…)"
            )
        weight = self.weight(tokens, tokens.student)
        predicted = (tokens.starts > 0).all(-1) & tokens.paired
        if weight is None:
            return predicted
        # The prediction of a token is at the token before it.
        left_out = F.pad((~weight).long().cumsum(1), (1, 0))
        start, end = tokens.starts[..., 0], tokens.pairs[..., 0]
        return predicted & (take(left_out, end) == take(left_out, start - 1))

    def per_token(self, student: Tensor, teacher: Tensor, tokens: Tokens) -> Pairs:
        if self.align == "groups" and tokens.pairs is not None:
            return self._merged(student, teacher, tokens)
        if self.align != "position":
            return super().per_token(student, teacher, tokens)
        weight = self.pair_weight(tokens)
        ours, theirs = (self.weight(tokens, side) for side in (tokens.student, tokens.teacher))
        if weight is None or ours is None or theirs is None:
            return Pairs(student, teacher)
        both = _first(student, ours, weight), _first(teacher, theirs, weight)
        return Pairs(*both, count=weight.sum().to(torch.float32))

    def _merged(self, student: Tensor, teacher: Tensor, tokens: Tokens) -> Pairs:
        """Return the logits of each group that counts, and the probability of its other tokens."""
        weight = self._groups(tokens)
        assert tokens.starts is not None and tokens.pairs is not None
        rows = weight.nonzero()[:, 0]
        (s, s_share), (t, t_share) = (
            self._of_groups(logits, side, rows, tokens.starts[..., k][weight], tokens.pairs[..., k][weight])  # type: ignore[index]
            for k, (logits, side) in enumerate(((student, tokens.student), (teacher, tokens.teacher)))
        )
        return GroupPairs(s, t, count=weight.sum().float(), student_share=s_share, teacher_share=t_share)

    def _of_groups(
        self, logits: Tensor, side: ModelTokens, rows: Tensor, start: Tensor, end: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the logits ``(n, V)`` of groups, and the probability ``(n,)`` of their other tokens, at least 1e-8 each."""
        assert side.ids is not None
        late = self.merge == "observed"  # as TRL's default, see GOLD
        base, others = (start, start + 1) if late else (end - 1, start)
        lengths = end - start
        group = torch.arange(len(rows), device=rows.device).repeat_interleave(lengths)
        step = torch.arange(len(group), device=rows.device) - (lengths.cumsum(0) - lengths)[group]
        place = others[group] + step
        logs = upcast(logits[rows[group], place if late else place - 1]).log_softmax(-1)
        chosen = logs.gather(-1, side.ids[rows[group], place][:, None])[:, 0].clamp(min=math.log(FLOOR))
        return logits[rows, base], chosen.new_zeros(len(rows)).index_add(0, group, chosen).exp()


def _first(logits: Tensor, counted: Tensor, weight: Tensor) -> Tensor:
    """Return the logits ``(n, V)`` of the first counted tokens of each sequence, as many as ``weight`` selects."""
    order = (~counted).to(torch.int8).sort(dim=1, stable=True).indices[:, : weight.shape[1]]
    return take(logits, order)[weight]
