"""Terms on attention: attention maps, and relations of queries, keys and values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from kdgraft.batch import Batch
from kdgraft.errors import DistillError, WiringError, is_number
from kdgraft.losses import Ratio, attention_distributions, attention_scores, token_relations
from kdgraft.taps import Recording, Tap
from kdgraft.terms import check_choice, mean_of
from kdgraft.wiring import Wiring

from .attention import METHOD, AttentionCall, Layer, attention_call
from .layers import LayerPairs, LayerTerm
from .packing import per_text
from .registry import TERMS
from .tokens import Tokens, take, tokens_of


class AttentionTerm(LayerTerm):
    """Base of terms on the inputs of attention kernels."""

    def _tap(self, layer: Layer) -> Tap:
        return Tap.parse(f"{layer.attention}.{METHOD}()")

    def calls(self, student: Recording, teacher: Recording) -> list[tuple[AttentionCall, AttentionCall]]:
        """Return the attention calls of both models, one pair for each pair of layers that ran."""
        taps = [(self.student_taps[k], self.teacher_taps[k]) for k in self._ran(student)]
        return [(attention_call(student, s), attention_call(teacher, t)) for s, t in taps]

    def _valid(self, s: AttentionCall, t: AttentionCall, tokens: Tokens) -> Tensor | None:
        """Return the pairs of tokens that attend to each other in both models, ``(B, 1 or H, Q, K)``; ``None`` for all."""
        found: Tensor | None = None
        for k, (call, side) in enumerate(((s, tokens.student), (t, tokens.teacher))):
            queries, texts = side.of(self._stack_name), side.texts_of(self._stack_name)
            keys = side.real if self._stack_name == "cross" else queries
            own = call.allowed()
            if queries is not None and keys is not None:
                own = _both(own, queries[:, None, :, None] & keys[:, None, None, :])
            if texts is not None:  # kernels that are given the ends of texts get no mask
                own = _both(own, texts[:, None, :, None] == texts[:, None, None, :])
            if own is None:
                continue
            if own.ndim == 4 and own.shape[1] > 1:
                own = own.all(1, keepdim=True)
            if tokens.pairs is not None:
                own = _take_square(own.expand(len(tokens.pairs), 1, *own.shape[-2:]), tokens.pairs[..., k])
            found = _both(found, own)
        if tokens.paired is not None:
            found = _both(found, tokens.paired[:, None, :, None] & tokens.paired[:, None, None, :])
        return found

    def wire(self, wiring: Wiring) -> None:
        calls = self.calls(wiring.student_recording, wiring.teacher_recording)
        for (s, t), pair, *taps in zip(calls, self.pairs, self.student_taps, self.teacher_taps, strict=True):
            for call, tap, owner in zip((s, t), taps, ("student", "teacher"), strict=True):
                if call.query.shape[0] not in (1, wiring.facts["samples"]):
                    raise WiringError(
                        f"{self.name}: the attention at '{tap}' of the {owner} runs on windows of the samples; use HiddenStates"
                    )
            self.check(s, t, pair)
            self.rows.append(self.row(_shape(s), _shape(t), taps=(taps[0], taps[1]), region="valid tokens"))

    def check(self, s: AttentionCall, t: AttentionCall, pair: tuple[int, int]) -> None:
        """Raise a :class:`WiringError` unless the term can compare the attention of these two layers."""
        raise NotImplementedError

    def _scores(
        self, s: AttentionCall, t: AttentionCall, tokens: Tokens, *, averaged: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Return the scores of both models, ``(B, H, Q, K)``, at the paired tokens, or their mean over heads."""
        scores, targets = (call.mean_scores() if averaged else call.scores() for call in (s, t))
        if tokens.pairs is None:
            return scores, targets
        ours, theirs = tokens.pairs.unbind(-1)
        return _take_square(scores, ours), _take_square(targets, theirs)


@TERMS.register
class AttentionMaps(AttentionTerm):
    """Attention maps of layers: scores before the softmax (TinyBERT, arXiv 1909.10351) or distributions (MobileBERT, 2004.02984).

    They are read before dropout while the models run sdpa or flash attention; ``attn_implementation="eager"`` is not needed.

    Args:
        layers: ``"uniform"``, ``"last"``, ``"skip"``, ``"final"`` or pairs.
        of: ``"scores"`` (squared error) or ``"distributions"`` (KL over the keys).
        heads: ``"equal"`` (head by head), or ``"averaged"`` (the mean over heads), where the numbers of heads differ.
        stack: see :class:`LayerTerm`.
    """

    def __init__(
        self,
        layers: LayerPairs = "uniform",
        *,
        of: Literal["scores", "distributions"] = "scores",
        heads: Literal["equal", "averaged"] = "equal",
        **settings: Any,
    ) -> None:
        super().__init__(layers, **settings)
        check_choice(self, "of", of, ("scores", "distributions"))
        check_choice(self, "heads", heads, ("equal", "averaged"))
        self.of, self.heads = of, heads
        self.causal = False
        self.counts_ahead = True

    def wire(self, wiring: Wiring) -> None:
        super().wire(wiring)
        # Where layers attend to windows, the number of keys of a token depends on the pass.
        self.counts_ahead = not (_has_windows(wiring.student) or _has_windows(wiring.teacher))

    def check(self, s: AttentionCall, t: AttentionCall, pair: tuple[int, int]) -> None:
        if s.heads != t.heads and self.heads == "equal":
            raise WiringError(
                f"{self.name}: layer {pair[0]} of the student has {s.heads} heads, layer {pair[1]} of the teacher {t.heads}; use "
                "heads='averaged', or Relations, which takes any numbers of heads"
            )
        if s.causal != t.causal:
            raise WiringError(
                f"{self.name}: only one of student and teacher is causal, so that maps cannot be compared; use HiddenStates"
            )
        self.causal = s.causal

    def _count(self, batch: Batch) -> Tensor | None:
        tokens = tokens_of(batch)
        real = self._real(tokens)
        if real is None:
            return torch.tensor(float(tokens.size))
        if not self.counts_ahead or (
            self._stack_name == "cross" and self.of == "scores" and tokens.student.real is None
        ):
            return None
        lengths = self._lengths(tokens, real).double()
        if self.of == "distributions":
            return lengths.sum().float()
        if self._stack_name == "cross":
            keys = tokens.student.real
            return None if keys is None else (lengths * keys.sum(1)).sum().float()
        return (lengths * (lengths + 1) / 2 if self.causal else lengths.square()).sum().float()

    def forward(self, student: Recording, teacher: Recording, batch: Batch) -> Ratio:
        tokens = self.tokens(batch)
        parts = [self._compare(s, t, tokens) for s, t in self.calls(student, teacher)]
        if not self.counts_ahead and not self.drops_layers:
            return mean_of(parts)  # layers may have different windows
        return self._over_pairs(parts, attention_call(teacher, self.teacher_taps[0]).query)

    def _compare(self, s: AttentionCall, t: AttentionCall, tokens: Tokens) -> Ratio:
        added = self.heads == "averaged" and self.of == "scores"
        scores, targets = self._scores(s, t, tokens, averaged=added)
        valid = self._valid(s, t, tokens)
        if self.heads == "averaged" and not added:
            # Distributions are averaged after the softmax; the softmax of the mean's logarithm is the mean.
            scores, targets = (self._averaged(x, valid) for x in (scores, targets))
        if self.of == "scores":
            items = attention_scores(scores, targets, reduction="none").mean(1)
            weight = None if valid is None else valid[:, 0]
        else:
            items = attention_distributions(scores, targets, valid=valid, reduction="none").mean(1)
            weight = None if valid is None else valid.any(-1)[:, 0]
        if self._real(tokens) is None:
            return Ratio(items.flatten(1).mean(1).sum(), items.new_tensor(float(len(items))))
        weight = (torch.ones_like(items, dtype=torch.bool) if weight is None else weight).expand_as(items)
        return Ratio(items.masked_fill(~weight, 0).sum(), weight.sum().to(items.dtype))

    def _averaged(self, scores: Tensor, valid: Tensor | None) -> Tensor:
        low = torch.finfo(scores.dtype).min
        shares = (scores if valid is None else scores.masked_fill(~valid, low)).softmax(-1).mean(1, keepdim=True)
        return shares.clamp(min=torch.finfo(scores.dtype).tiny).log()


@TERMS.register
class Relations(AttentionTerm):
    """Relations among tokens' queries, keys or values (MiniLMv2, arXiv 2012.15828; MiniLM, arXiv 2002.10957).

    All sequences have equal weight; a sequence's loss is the mean over its tokens and relation heads.

    Args:
        layers: the pair of final layers by default. MiniLMv2 uses an upper middle layer of a large teacher.
        of: any of ``"query"``, ``"key"``, ``"value"``; ``"attention"`` adds the attention distribution (MiniLM:
            ``("attention", "value")``, which needs equal numbers of heads).
        heads: the number of relation heads, which must divide both widths; the teacher's number of attention heads by default.
    """

    def __init__(
        self,
        layers: LayerPairs = "final",
        *,
        of: Sequence[str] = ("query", "key", "value"),
        heads: int | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(layers, **settings)
        of = (of,) if isinstance(of, str) else tuple(of)
        for kind in of:
            check_choice(self, "of", kind, ("query", "key", "value", "attention"))
        if not of or self.stack == "cross":
            raise WiringError(
                f"{self.name}: of must name at least one of query, key, value, and stack 'cross' has no relations"
            )
        if heads is not None and set(of) == {"attention"}:
            raise DistillError("Relations: heads applies to query, key and value; leave it out with of='attention'")
        self.of, self.heads = of, heads

    def check(self, s: AttentionCall, t: AttentionCall, pair: tuple[int, int]) -> None:
        if "attention" in self.of and s.heads != t.heads:
            raise WiringError(
                f"{self.name}: 'attention' needs equal numbers of heads, got {s.heads} and {t.heads}; use of=('query', 'key', 'value')"
            )
        self.heads = t.heads if self.heads is None else self.heads
        for kind in self.of:
            if kind == "attention":
                continue
            widths = s.vectors(kind).shape[-1], t.vectors(kind).shape[-1]
            if not is_number(self.heads, whole=True) or self.heads < 1 or any(width % self.heads for width in widths):
                raise WiringError(
                    f"{self.name}: {self.heads!r} relation heads do not divide the {kind} widths {widths[0]} and {widths[1]}; set heads to a common divisor"
                )

    def _count(self, batch: Batch) -> Tensor | None:
        tokens = tokens_of(batch)
        real = self._real(tokens)
        return torch.tensor(float(tokens.size)) if real is None else (self._lengths(tokens, real) > 0).sum().float()

    def forward(self, student: Recording, teacher: Recording, batch: Batch) -> Ratio:
        tokens = self.tokens(batch)
        parts = []
        for s, t in self.calls(student, teacher):
            kinds = [self._compare(s, t, kind, tokens) for kind in self.of]
            parts.append(Ratio(torch.stack([kind.numerator for kind in kinds]).sum(), kinds[0].denominator))
        return self._over_pairs(parts, attention_call(teacher, self.teacher_taps[0]).query)

    def _compare(self, s: AttentionCall, t: AttentionCall, kind: str, tokens: Tokens) -> Ratio:
        valid = self._valid(s, t, tokens)
        real = self._real(tokens)
        if kind == "attention":
            items = attention_distributions(*self._scores(s, t, tokens), valid=valid, reduction="none")
        else:
            assert self.heads is not None
            vectors = tokens.align(s.vectors(kind), t.vectors(kind))
            items = token_relations(*vectors, self.heads, valid=valid, reduction="none")
        rows = items.mean(1)  # (B, L): over heads
        if real is None:
            return Ratio(rows.mean(1).sum(), rows.new_tensor(float(len(rows))))
        lengths = self._lengths(tokens, real)
        sums = per_text(rows.masked_fill(~real, 0), tokens.student.texts_of(self._stack_name))
        return Ratio((sums / lengths.clamp(min=1)).sum(), (lengths > 0).sum().to(rows.dtype))


def _both(mask: Tensor | None, other: Tensor) -> Tensor:
    return other if mask is None else mask & other


def _take_square(values: Tensor, positions: Tensor) -> Tensor:
    """Return the values ``(B, H, Q, K)`` at positions ``(B, P)`` of both queries and keys: ``(B, H, P, P)``."""
    return take(take(values, positions, 2), positions, 3)


def _has_windows(model: nn.Module) -> bool:
    """Return whether some layers attend to a neighbourhood only."""
    config = getattr(model, "config", None)
    names = ("sliding_window", "local_attention", "attention_chunk_size", "attention_window")
    return any(getattr(config, name, None) for name in names)


def _shape(call: AttentionCall) -> str:
    batch, heads, length, width = call.query.shape
    groups = call.key.shape[1]
    return f"{batch}×{heads}×{length}×{width}" + ("" if groups == heads else f" ({groups} key heads)")
