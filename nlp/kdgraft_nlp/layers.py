"""Terms on layers: attention maps, token relations, hidden states, embeddings."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdgraft.adapters import AdapterKind, adapter_label, build_adapter
from kdgraft.batch import Batch
from kdgraft.errors import DistillError, WiringError
from kdgraft.losses import Ratio, attention_distributions, attention_scores, cosine, hint, patient, token_relations
from kdgraft.sources import STUDENT
from kdgraft.taps import Recording, Tap
from kdgraft.terms import Term, check_choice, mean_of
from kdgraft.wiring import Wiring

from .attention import METHOD, AttentionCall, Layer, Stack, attention_call, drops_layers, layer_pairs, stacks
from .packing import first_of_each, per_text
from .registry import TERMS
from .tasks import accepted
from .tokens import Side, Tokens, take, tokens_of

Layers = str | Sequence[Sequence[int]]
STACKS = ("auto", "layers", "encoder", "decoder", "cross")


class LayerTerm(Term):
    """Base of terms that compare layers of two models, found by themselves.

    Args:
        layers: which layer learns from which; see :func:`~kdgraft_nlp.attention.layer_pairs`.
        stack: of a model with an encoder and a decoder: ``"encoder"`` (``"auto"``), ``"decoder"`` or ``"cross"``.
    """

    needs_attention = False

    def __init__(self, layers: Layers = "uniform", *, stack: Stack | Literal["auto"] = "auto", **settings: Any) -> None:
        super().__init__(**settings)
        check_choice(self, "stack", stack, STACKS)
        self.layers, self.stack = layers, stack
        self.pairs: list[tuple[int, int]] = []
        self.drops_layers = False

    def prepare(self, student: nn.Module, teacher: nn.Module) -> None:
        ours, theirs = self._stack(student, "student"), self._stack(teacher, "teacher")
        if self.listener == STUDENT:
            self.pairs = layer_pairs(self.layers, len(ours), len(theirs), self.name)
        else:  # what the user said is of the student and the peer: the same pairs, the other way round
            self.pairs = [(j, i) for i, j in layer_pairs(self.layers, len(theirs), len(ours), self.name)]
        self.student_taps = [self._tap(ours[i]) for i, _ in self.pairs]
        self.teacher_taps = [self._tap(theirs[j]) for _, j in self.pairs]
        self.drops_layers = drops_layers(student, self.student_taps)

    def _stack(self, model: nn.Module, owner: str) -> list[Layer]:
        found = stacks(model)
        if not found:
            raise WiringError(
                f"{self.name}: {type(model).__name__} (the {owner}) has no layers with attention that can be listened to; "
                "use SoftTargets, or FeatureImitation with taps of your own"
            )
        name = self.stack
        if name == "auto":
            name = "layers" if "layers" in found else "encoder"
        if name not in found:
            raise WiringError(f"{self.name}: the {owner} has no stack {name!r}, but {', '.join(map(repr, found))}")
        self._stack_name = name
        return found[name]

    def _tap(self, layer: Layer) -> Tap:
        """Where a layer is read."""
        return Tap.parse(layer.path)

    def _real(self, tokens: Tokens) -> Tensor | None:
        """``(B, L)``: the tokens that count, in the student's positions or those of the pairs."""
        if tokens.pairs is not None:
            return (tokens.pairs >= 0).all(-1)
        return tokens.student.of(self._stack_name)

    def count(self, batch: Batch) -> Tensor | None:
        return None if self.drops_layers else self._count(batch)

    def _count(self, batch: Batch) -> Tensor | None:
        """The denominator of a step in which every layer runs, from the batch alone; ``None`` where only the pass can tell."""
        raise NotImplementedError

    def _ran(self, student: Recording) -> list[int]:
        """The pairs whose layers ran in this step: all of them, unless the student drops layers."""
        return [k for k, tap in enumerate(self.student_taps) if not self.drops_layers or student.calls(tap)]

    def _over_pairs(self, parts: Sequence[Ratio], teacher: Tensor) -> Ratio:
        """The mean over the pairs; where layers are dropped, over the items of the pairs that ran, here and on other processes."""
        if not self.drops_layers:
            return Ratio(torch.stack([part.numerator for part in parts]).mean(), parts[0].denominator)
        alive = [p.flatten()[:0].sum() for p in self.parameters()]  # also of adapters whose layer did not run
        zero = torch.stack(alive).sum() if alive else torch.zeros((), device=teacher.device)
        count = torch.zeros((), device=teacher.device)
        return Ratio(sum((p.numerator for p in parts), zero), sum((p.denominator for p in parts), count))

    def _lengths(self, tokens: Tokens, real: Tensor) -> Tensor:
        """How many tokens of each text count: a value a row, or as many as packed rows hold texts."""
        return per_text(real.long(), tokens.student.texts_of(self._stack_name))


class AttentionTerm(LayerTerm):
    """Base of terms on what attention modules hand to their kernels."""

    def _tap(self, layer: Layer) -> Tap:
        return Tap.parse(f"{layer.attention}.{METHOD}()")

    def calls(self, student: Recording, teacher: Recording) -> list[tuple[AttentionCall, AttentionCall]]:
        """The calls of both models, a pair for each pair of layers that ran."""
        taps = [(self.student_taps[k], self.teacher_taps[k]) for k in self._ran(student)]
        return [(attention_call(student, s), attention_call(teacher, t)) for s, t in taps]

    def _valid(self, s: AttentionCall, t: AttentionCall, tokens: Tokens) -> Tensor | None:
        """``(B, 1 or H, Q, K)``: which pairs of real tokens attend to each other in both models; ``None`` for all."""
        found: Tensor | None = None
        for call, side, place in ((s, tokens.student, 0), (t, tokens.teacher, 1)):
            own = call.allowed()
            queries = side.of(self._stack_name)
            keys = side.real if self._stack_name == "cross" else queries
            if queries is not None and keys is not None:
                real = queries[:, None, :, None] & keys[:, None, None, :]
                own = real if own is None else own & real
            texts = side.texts_of(self._stack_name)
            if texts is not None:  # kernels that are told where texts end get no mask
                together = texts[:, None, :, None] == texts[:, None, None, :]
                own = together if own is None else own & together
            if own is None:
                continue
            if own.ndim == 4 and own.shape[1] > 1:
                own = own.all(1, keepdim=True)
            if tokens.pairs is not None:
                positions = tokens.pairs[..., place]
                own = own.expand(len(positions), 1, *own.shape[-2:])
                own = take(take(own, positions, 2), positions, 3)
            found = own if found is None else found & own
        if tokens.pairs is not None:
            both = (tokens.pairs >= 0).all(-1)
            both = both[:, None, :, None] & both[:, None, None, :]
            found = both if found is None else found & both
        return found

    def _check_samples(self, call: AttentionCall, tap: Tap, owner: str, wiring: Wiring) -> None:
        if call.query.shape[0] not in (1, wiring.facts["samples"]):
            raise WiringError(
                f"{self.name}: the attention at '{tap}' of the {owner} runs on windows, not on whole samples; use HiddenStates or "
                "FeatureImitation"
            )


@TERMS.register
class AttentionMaps(AttentionTerm):
    """Attention maps of layers: scores before the softmax (TinyBERT, arXiv 1909.10351) or distributions (MobileBERT, 2004.02984).

    Read while the models run sdpa or flash attention, before dropout; never needs ``attn_implementation="eager"``.

    Args:
        layers: ``"uniform"``, ``"last"``, ``"skip"``, ``"final"`` or pairs.
        of: ``"scores"`` (squared error) or ``"distributions"`` (KL over the keys).
        heads: ``"equal"`` (head by head), or ``"averaged"`` (the mean over heads of each), for other numbers of heads.
        stack: see :class:`LayerTerm`.
    """

    def __init__(
        self,
        layers: Layers = "uniform",
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
        for (s, t), (i, j), s_tap, t_tap in zip(
            self.calls(wiring.student_recording, wiring.teacher_recording),
            self.pairs,
            self.student_taps,
            self.teacher_taps,
            strict=True,
        ):
            if s.heads != t.heads and self.heads == "equal":
                raise WiringError(
                    f"{self.name}: layer {i} of the student has {s.heads} heads, layer {j} of the teacher {t.heads}; use "
                    "heads='averaged', or Relations, which takes any number of heads"
                )
            if s.causal != t.causal:
                raise WiringError(
                    f"{self.name}: one of student and teacher attends backwards only; maps cannot be compared"
                )
            self._check_samples(s, s_tap, "student", wiring)
            self._check_samples(t, t_tap, "teacher", wiring)
            self.causal = s.causal
            for model in (wiring.student, wiring.teacher):
                if _has_windows(model):
                    self.counts_ahead = False  # how many keys a token sees is known in the pass alone
            self.rows.append(self.row(_shape(s), _shape(t), taps=(s_tap, t_tap), region="valid tokens"))

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
        tokens = tokens_of(batch)
        parts = [self._compare(s, t, tokens) for s, t in self.calls(student, teacher)]
        if not self.counts_ahead and not self.drops_layers:
            return mean_of(parts)  # layers may see windows of their own
        return self._over_pairs(parts, attention_call(teacher, self.teacher_taps[0]).query)

    def _compare(self, s: AttentionCall, t: AttentionCall, tokens: Tokens) -> Ratio:
        scores, targets = s.scores(), t.scores()
        valid = self._valid(s, t, tokens)
        if tokens.pairs is not None:
            ours, theirs = tokens.pairs.unbind(-1)
            scores, targets = (take(take(x, p, 2), p, 3) for x, p in ((scores, ours), (targets, theirs)))
        if self.heads == "averaged":
            # Distributions are averaged as such; the logarithm of their mean has it as its softmax.
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
        if self.of == "scores":
            return scores.mean(1, keepdim=True)
        low = torch.finfo(scores.dtype).min
        shares = (scores if valid is None else scores.masked_fill(~valid, low)).softmax(-1).mean(1, keepdim=True)
        return shares.clamp(min=torch.finfo(scores.dtype).tiny).log()


@TERMS.register
class Relations(AttentionTerm):
    """Relations between tokens: queries, keys, values among themselves (MiniLMv2, arXiv 2012.15828; MiniLM, arXiv 2002.10957).

    Each sequence weighs alike; a sequence's loss is the mean over its tokens and relation heads.

    Args:
        layers: one pair by default: the final layers. MiniLMv2 takes an upper middle layer of a large teacher.
        of: any of ``"query"``, ``"key"``, ``"value"``; with ``"attention"`` the attention distribution itself joins (MiniLM:
            ``("attention", "value")``, which asks for equal numbers of heads).
        heads: number of relation heads, which has to divide both widths; the teacher's number of attention heads by default.
    """

    def __init__(
        self,
        layers: Layers = "final",
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
            raise WiringError(f"{self.name}: of names what is related, and relations of stack 'cross' have no meaning")
        if heads is not None and set(of) == {"attention"}:
            raise DistillError(
                "Relations: heads are those of query, key and value; leave it out of of='attention' alone"
            )
        self.of, self.heads = of, heads

    def wire(self, wiring: Wiring) -> None:
        for (s, t), s_tap, t_tap in zip(
            self.calls(wiring.student_recording, wiring.teacher_recording),
            self.student_taps,
            self.teacher_taps,
            strict=True,
        ):
            self._check_samples(s, s_tap, "student", wiring)
            self._check_samples(t, t_tap, "teacher", wiring)
            if self.heads is None:
                self.heads = t.heads
            for kind in self.of:
                if kind == "attention":
                    if s.heads != t.heads:
                        raise WiringError(
                            f"{self.name}: 'attention' needs equal numbers of heads, got {s.heads} and {t.heads}; use "
                            "of=('query', 'key', 'value')"
                        )
                    continue
                widths = s.vectors(kind).shape[-1], t.vectors(kind).shape[-1]
                if (
                    isinstance(self.heads, bool)
                    or not isinstance(self.heads, int)
                    or self.heads < 1
                    or any(width % self.heads for width in widths)
                ):
                    raise WiringError(
                        f"{self.name}: {self.heads!r} relation heads do not divide the {kind} widths {widths[0]} and "
                        f"{widths[1]}; set heads to a number that does"
                    )
            self.rows.append(self.row(_shape(s), _shape(t), taps=(s_tap, t_tap), region="valid tokens"))

    def _count(self, batch: Batch) -> Tensor | None:
        tokens = tokens_of(batch)
        real = self._real(tokens)
        return torch.tensor(float(tokens.size)) if real is None else (self._lengths(tokens, real) > 0).sum().float()

    def forward(self, student: Recording, teacher: Recording, batch: Batch) -> Ratio:
        tokens = tokens_of(batch)
        parts = []
        for s, t in self.calls(student, teacher):
            kinds = [self._compare(s, t, kind, tokens) for kind in self.of]
            parts.append(Ratio(torch.stack([kind.numerator for kind in kinds]).sum(), kinds[0].denominator))
        return self._over_pairs(parts, attention_call(teacher, self.teacher_taps[0]).query)

    def _compare(self, s: AttentionCall, t: AttentionCall, kind: str, tokens: Tokens) -> Ratio:
        valid = self._valid(s, t, tokens)
        real = self._real(tokens)
        pairs = tokens.pairs
        if kind == "attention":
            scores, targets = s.scores(), t.scores()
            if pairs is not None:
                scores, targets = (
                    take(take(x, pairs[..., k], 2), pairs[..., k], 3) for k, x in enumerate((scores, targets))
                )
            items = attention_distributions(scores, targets, valid=valid, reduction="none")
        else:
            vectors = [x.vectors(kind) for x in (s, t)]
            if pairs is not None:
                vectors = [take(x, pairs[..., k]) for k, x in enumerate(vectors)]
            assert self.heads is not None
            items = token_relations(vectors[0], vectors[1], self.heads, valid=valid, reduction="none")
        rows = items.mean(1)  # (B, L): over heads
        if real is None:
            return Ratio(rows.mean(1).sum(), rows.new_tensor(float(len(rows))))
        lengths = self._lengths(tokens, real)
        sums = per_text(rows.masked_fill(~real, 0), tokens.student.texts_of(self._stack_name))
        return Ratio((sums / lengths.clamp(min=1)).sum(), (lengths > 0).sum().to(rows.dtype))


@TERMS.register
class HiddenStates(LayerTerm):
    """Hidden states of layers through a projection that sizes itself (TinyBERT, arXiv 1909.10351, equation 8).

    The output of each layer, which for models that normalise first is the state before the final normalisation.

    Args:
        layers: ``"uniform"``, ``"last"``, ``"skip"``, ``"final"`` or pairs.
        loss: ``"mse"``, ``"cosine"`` (DistilBERT) or ``"normalized"`` (squared error after a layer normalisation without
            parameters, MobileBERT).
        adapter: ``"auto"`` (linear), ``"linear"`` or ``"none"`` for equal widths.
        stack: see :class:`LayerTerm`.
    """

    def __init__(
        self,
        layers: Layers = "uniform",
        *,
        loss: Literal["mse", "cosine", "normalized"] = "mse",
        adapter: AdapterKind = "auto",
        **settings: Any,
    ) -> None:
        super().__init__(layers, **settings)
        check_choice(self, "loss", loss, tuple(_LOSSES))
        check_choice(self, "stack", self.stack, ("auto", "layers", "encoder", "decoder"))
        self.loss: Callable[..., Tensor] = _LOSSES[loss]
        self.adapter_kind: AdapterKind = adapter
        self.adapters = nn.ModuleList()

    def wire(self, wiring: Wiring) -> None:
        for s_tap, t_tap in zip(self.student_taps, self.teacher_taps, strict=True):
            s, t = self._state(wiring.student_recording, s_tap), self._state(wiring.teacher_recording, t_tap)
            if s.ndim != 3 or t.ndim != 3:
                raise WiringError(
                    f"{self.name}: {s_tap} {tuple(s.shape)} and {t_tap} {tuple(t.shape)} must be (B, L, C)"
                )
            if s.shape[1] != t.shape[1] and "labels" in wiring.fields and _sees_images(wiring.student):
                raise WiringError(
                    f"{self.name}: student and teacher cut images into {s.shape[1]} and {t.shape[1]} positions; use SoftTargets, or "
                    "models of one patch size and image size"
                )
            adapter = build_adapter(self.adapter_kind, s[:, :1], t[:, :1], f"{self.name} ({s_tap} → {t_tap})")
            self.adapters.append(adapter)
            label = adapter_label(adapter, s, t)
            self.rows.append(self.row(s, t, taps=(s_tap, t_tap), adapter=label, region="valid tokens"))

    def _state(self, recording: Recording, tap: Tap) -> Tensor:
        value = recording[tap]
        return value[0] if isinstance(value, (tuple, list)) else value

    def _states(self, student: Recording, teacher: Recording) -> Iterator[tuple[nn.Module, Tensor, Tensor]]:
        """The states of both models, of each pair of layers that ran, with the pair's adapter."""
        for k in self._ran(student):
            yield (
                self.adapters[k],
                self._state(student, self.student_taps[k]),
                self._state(teacher, self.teacher_taps[k]),
            )

    def _count(self, batch: Batch) -> Tensor | None:
        tokens = tokens_of(batch)
        real = self._real(tokens)
        return torch.tensor(float(tokens.size)) if real is None else real.sum().float()

    def forward(self, student: Recording, teacher: Recording, batch: Batch) -> Ratio:
        tokens = tokens_of(batch)
        real = self._real(tokens)
        parts = []
        for adapter, s, t in self._states(student, teacher):
            if tokens.pairs is not None:
                s, t = take(s, tokens.pairs[..., 0]), take(t, tokens.pairs[..., 1])
            if s.shape[1] != t.shape[1]:
                raise WiringError(
                    f"{self.name}: student and teacher see {s.shape[1]} and {t.shape[1]} positions; give the collator "
                    "teacher_tokenizer=… so that it can align them"
                )
            if real is not None:
                s, t = s[real], t[real]
            items = self.loss(adapter(s, t), t, dim=-1, reduction="none")
            total = items.sum() if real is not None else items.mean(1).sum()
            parts.append(Ratio(total, total.new_tensor(float(len(s)))))
        return self._over_pairs(parts, self._state(teacher, self.teacher_taps[0]))


def _normalized(student: Tensor, teacher: Tensor, **settings: Any) -> Tensor:
    width = student.shape[-1:]
    return hint(F.layer_norm(student.float(), width), F.layer_norm(teacher.float(), width), **settings)


_LOSSES: dict[str, Callable[..., Tensor]] = {"mse": hint, "cosine": cosine, "normalized": _normalized}


@TERMS.register
class Embeddings(HiddenStates):
    """The embedding layer's output: what the first layer is given (TinyBERT, arXiv 1909.10351, equation 9).

    Args:
        loss, adapter, stack: as in :class:`HiddenStates`.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__([(0, 0)], **settings)

    def _tap(self, layer: Layer) -> Tap:
        return Tap.parse(f"{layer.path}:input")


@TERMS.register
class PatientStates(HiddenStates):
    """The state of each text's first token, L2-normalised (patient knowledge distillation, arXiv 1908.09355, equation 7).

    Args:
        layers: ``"skip"`` (PKD-Skip), ``"last"``, ``"uniform"``, ``"final"`` or pairs.
        variant: ``"paper"`` sums over channels, the authors' ``"code"`` takes the mean.
        adapter: ``"none"``, the paper's, for equal widths; ``"auto"`` where they differ, a linear map.
    """

    def __init__(
        self,
        layers: Layers = "skip",
        *,
        variant: Literal["paper", "code"] = "paper",
        adapter: AdapterKind | None = None,
        **settings: Any,
    ) -> None:
        if "loss" in settings:
            raise DistillError(
                "PatientStates takes no argument 'loss': it compares normalised states; use HiddenStates"
            )
        super().__init__(layers, adapter=adapter or "none", **settings)
        check_choice(self, "variant", variant, ("paper", "code"))
        self.adapter_given = adapter is not None
        self.variant = variant

    def wire(self, wiring: Wiring) -> None:
        if not self.adapter_given:
            widths = {
                self._state(recording, tap).shape[-1]
                for recording, taps in (
                    (wiring.student_recording, self.student_taps),
                    (wiring.teacher_recording, self.teacher_taps),
                )
                for tap in taps
            }
            self.adapter_kind = "none" if len(widths) == 1 else "linear"
        super().wire(wiring)
        self.rows = [row._replace(region="first token") for row in self.rows]

    def _count(self, batch: Batch) -> Tensor | None:
        tokens = tokens_of(batch)
        if tokens.student.texts_of(self._stack_name) is None:
            return torch.tensor(float(tokens.size))
        real = self._real(tokens)
        assert real is not None
        return (self._lengths(tokens, real) > 0).sum().float()

    def forward(self, student: Recording, teacher: Recording, batch: Batch) -> Ratio:
        tokens = tokens_of(batch)
        parts = []
        for adapter, states, targets in self._states(student, teacher):
            s, t = self._first(states, tokens.student), self._first(targets, tokens.teacher)
            total = patient(adapter(s, t), t, variant=self.variant, reduction="sum")
            parts.append(Ratio(total, total.new_tensor(float(len(t)))))
        return self._over_pairs(parts, self._state(teacher, self.teacher_taps[0]))

    def _first(self, states: Tensor, side: Side) -> Tensor:
        return first_of_each(states, side.of(self._stack_name), side.texts_of(self._stack_name))


def refuse_dropped_layers(student: nn.Module, terms: Sequence[Term]) -> None:
    """Refuse taps on layers that are left out now and then, of terms that need what they tap in every step.

    Raises:
        WiringError: names the term and the tap.
    """
    for term in terms:
        for tap in () if isinstance(term, LayerTerm) else term.student_taps:
            if drops_layers(student, [tap]):
                raise WiringError(
                    f"{term.name}: LayerDrop leaves the layer of tap '{tap}' out of some steps; use HiddenStates, which then skips it, "
                    "or set layerdrop to 0 in the student's config"
                )


def _has_windows(model: nn.Module) -> bool:
    """Whether some layers attend to a neighbourhood alone."""
    config = getattr(model, "config", None)
    names = ("sliding_window", "local_attention", "attention_chunk_size", "attention_window")
    return any(getattr(config, name, None) for name in names)


def _sees_images(model: nn.Module) -> bool:
    return "pixel_values" in accepted(model) and "input_ids" not in accepted(model)


def _shape(call: AttentionCall) -> str:
    batch, heads, length, width = call.query.shape
    groups = call.key.shape[1]
    return f"{batch}×{heads}×{length}×{width}" + ("" if groups == heads else f" ({groups} key heads)")
