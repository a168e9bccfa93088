"""Dual-space distillation of language models, for the same tokens or, by cross-model attention, for any two tokenizers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kdgraft.adapters import LinearAdapter
from kdgraft.batch import Batch
from kdgraft.distributed import sum_over_ranks
from kdgraft.errors import DistillError, WiringError
from kdgraft.losses import Ratio, cross_model_attention, dual_space, upcast
from kdgraft.losses.dual_space import DIVERGENCES
from kdgraft.losses.soft_targets import check_temperature
from kdgraft.sources import STUDENT
from kdgraft.taps import Recording, Tap
from kdgraft.terms import Term, check_choice
from kdgraft.wiring import Wiring

from .chunked import IDENTITY, Head, LogitTransform, head_of
from .heads import transform_of
from .link import link_of
from .registry import RECIPES, TERMS
from .tasks import LANGUAGE_MODELS, task_of
from .tokens import ModelTokens, Tokens, take, tokens_of


class Taps(NamedTuple):
    """The taps of one model: the states before its output layer, and its embeddings and logits, where they are read."""

    states: Tap
    embeddings: Tap | None
    logits: Tap | None


class Side(NamedTuple):
    """Tensors of one model at the tokens that count, as the term reads them.

    Attributes:
        states: ``(B, L, H)``, the input of the output layer.
        logits: ``(B, L, V)``; ``None`` where the host computes none.
        embeddings: ``(B, L, E)`` of the input tokens; ``None`` for equal tokens.
        counted: ``(B, L)``.
    """

    states: Tensor
    logits: Tensor | None
    embeddings: Tensor | None
    counted: Tensor


@TERMS.register
@RECIPES.register("dskd")
class DSKD(Term):
    """Dual-space distillation (DSKD): states projected into each other's space, KL in both (Zhang et al. 2024, 2406.17328).

    The teacher's states before its output layer are projected into the student's space, where the student's own output layer
    reads them, and the student's states into the teacher's space. In the student's space the projection learns to predict the
    labels, and the student imitates it; in the teacher's space the projected student imitates the teacher's own predictions, by
    the forward KL. For different tokenizers each token attends to the other model's tokens by the embeddings of the token and
    the next one (cross-model attention, CMA), and the student imitates the projection only where it predicts the right token.

    The sums over labelled tokens are divided by the number of the student's. The authors weigh the cross-entropy and this loss by ½
    each, which is this weight of 1 at half the learning rate; their projections learn at 1e-3 where the student has 5e-4. The
    attention divides the teacher's states and embeddings by their standard deviation over the tokens that count (the authors
    include padding), in all processes, but not over accumulated batches. With ``chunked`` its logits come in chunks, too.

    Args:
        temperature: T > 0 of both KLs, without the factor T².
        attention: align tokens by cross-model attention; by default where the tokenizers differ. Causal models only.
        divergence: that in the student's space: ``"forward_kl"``, ``"reverse_kl"``, ``"jsd"``, ``"skewed_kl"`` or
            ``"skewed_reverse_kl"``.
    """

    needs = ("classes",)

    def __init__(
        self,
        temperature: float = 2.0,
        *,
        attention: bool | None = None,
        divergence: str = "forward_kl",
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        check_temperature(temperature)
        check_choice(self, "divergence", divergence, tuple(DIVERGENCES))
        if attention not in (None, True, False):
            raise DistillError(f"DSKD: attention must be True, False or None, got {attention!r}")
        self.temperature, self.attention, self.divergence = float(temperature), attention, divergence
        self.chunk: int | None = None
        self.transforms: tuple[LogitTransform, LogitTransform] = (IDENTITY, IDENTITY)
        self._models: tuple[Any, Any] = (None, None)
        self._taps: list[Taps] = []

    def prepare(self, student: nn.Module, teacher: nn.Module) -> None:
        self.task, other = task_of(student), task_of(teacher)
        if self.task not in LANGUAGE_MODELS or other != self.task:
            raise WiringError(
                f"{self.name} needs two language models of one kind, got {type(student).__name__} and {type(teacher).__name__}"
            )
        attends = self.task == "causal" and self.attention is not False
        chunked = getattr(self.reader, "chunked", False)
        self._taps = [_taps_of(model, self.name, attends, chunked) for model in (student, teacher)]
        self.student_taps, self.teacher_taps = ([tap for tap in taps if tap is not None] for taps in self._taps)

    def wire(self, wiring: Wiring) -> None:
        different = wiring.facts.get("vocabulary") == "different"
        if self.attention is None:
            self.attention = different
        if different and not self.attention:
            raise WiringError(
                f"{self.name}: the tokenizers differ, and attention=False compares token by token; leave it out"
            )
        if self.attention and self.task != "causal":
            raise WiringError(
                f"{self.name}: the attention between two tokenizers reads the next token, so that both models must be causal"
            )
        models, recordings = (wiring.student, wiring.teacher), (wiring.student_recording, wiring.teacher_recording)
        states = [recording[taps.states] for recording, taps in zip(recordings, self._taps, strict=True)]
        for model in models:
            if head_of(model).weight.device.type == "meta":
                raise WiringError(
                    f"{self.name} reads the output layer of the teacher, which a cache lacks; give teacher=…"
                )
        if self._taps[0].logits is None:
            link = link_of(wiring.student)
            assert wiring.holder is not None
            self.chunk, self.transforms = link.chunk, (link.transforms[STUDENT], link.transforms[wiring.holder.name])
        else:
            first, second = (
                transform_of(model, own, recording[taps.logits])  # type: ignore[index]
                for model, own, recording, taps in zip(models, states, recordings, self._taps, strict=True)
            )
            self.transforms = (first, second)
        s, t = (own.shape[-1] for own in states)
        self.to_student, self.to_teacher = LinearAdapter(t, s), LinearAdapter(s, t)
        label = f"{t}→{s}, {s}→{t}"
        if self.attention:
            e_s, e_t = (
                recording[taps.embeddings].shape[-1]  # type: ignore[index]
                for recording, taps in zip(recordings, self._taps, strict=True)
            )
            if e_t != t:
                raise WiringError(f"{self.name}: the teacher adds embeddings of width {e_t} to states of width {t}")
            self.query = LinearAdapter(2 * e_s, 2 * e_t)
            label += ", attention"
        self.to(states[0].device)
        self._models = models
        read = (self._taps[0].states, self._taps[1].states)
        self.rows.append(self.row(*states, taps=read, adapter=label, region="labelled tokens"))

    def count(self, batch: Batch) -> Tensor | None:
        return self._counted(tokens_of(batch).student).sum().float()

    def _counted(self, side: ModelTokens) -> Tensor:
        """Return the tokens that predict a label, ``(B, L)``."""
        if side.labelled is None:
            raise DistillError(f"{self.name} needs the labels of tokens; add labels to the batch")
        return side.labelled

    def _side(self, recording: Recording, taps: Taps, side: ModelTokens) -> Side:
        logits = None if taps.logits is None else recording[taps.logits]
        embeddings, counted = None, self._counted(side)
        if self.attention and taps.embeddings is not None:
            embeddings = recording[taps.embeddings].detach()
            if side.real is not None:  # labels that were carried over may be at the last token, which none follows
                counted = counted & F.pad(side.real[:, 1:], (0, 1), value=False)
        return Side(recording[taps.states], logits, embeddings, counted)

    def forward(self, student: Recording, teacher: Recording, batch: Batch) -> Ratio:
        tokens = tokens_of(batch)
        ours = self._side(student, self._taps[0], tokens.student)
        theirs = self._side(teacher, self._taps[1], tokens.teacher)
        assert tokens.student.targets is not None
        targets = tokens.student.targets[ours.counted]
        if self.attention:
            to_student, to_teacher, heard, taught = self._attended(ours, theirs)
        else:
            self._check_tokens(ours, theirs, tokens)
            heard = taught = ours.counted[ours.counted]
            to_student = self.to_student(theirs.states[ours.counted], ours.states)
            to_teacher = self.to_teacher(ours.states[ours.counted], theirs.states)
            theirs = theirs._replace(counted=ours.counted)
        heads = [head_of(model) for model in self._models]  # once, as all processes gather layers that are in parts
        in_students, in_teachers = (partial(f, heads) for f in (self._in_students_space, self._in_teachers_space))
        whole = self._summed(in_students, heard, self._own(ours), to_student, targets)
        whole = whole + self._summed(in_teachers, taught, to_teacher, self._own(theirs))
        return Ratio(whole, ours.counted.sum().to(whole.dtype))

    def _check_tokens(self, ours: Side, theirs: Side, tokens: Tokens) -> None:
        if tokens.pairs is not None or ours.states.shape[:2] != theirs.states.shape[:2]:
            raise WiringError(
                f"{self.name}: the batch has other tokens for the teacher, which it compares one by one; use attention=True"
            )

    def _own(self, side: Side) -> Tensor:
        """Return a model's logits ``(n, V)`` at the tokens that count, or, in chunks, the states that give them."""
        return (side.states if side.logits is None else side.logits)[side.counted]

    def _logits(self, heads: Sequence[Head], k: int, states: Tensor) -> Tensor:
        """Return the logits of states ``(n, H)`` through the output layer of the student (0) or the teacher (1)."""
        head = heads[k]
        layer = Head(head.weight.detach(), None if head.bias is None else head.bias.detach())
        logits = layer(states.to(layer.weight.device, layer.weight.dtype)).to(states.device)
        return self.transforms[k](upcast(logits))

    def _students(self, heads: Sequence[Head], given: Tensor) -> Tensor:
        """Return the student's own logits, with gradients to its output layer."""
        if self.chunk is None:
            return given
        return self.transforms[0](upcast(heads[0](given)))

    def _in_students_space(self, heads: Sequence[Head], own: Tensor, projected: Tensor, targets: Tensor) -> Tensor:
        logits, correct = self._logits(heads, 0, projected), bool(self.attention)
        settings: dict[str, Any] = dict(divergence=self.divergence, correct_only=correct, reduction="none")
        return dual_space(self._students(heads, own), logits, targets, self.temperature, **settings)

    def _in_teachers_space(self, heads: Sequence[Head], projected: Tensor, own: Tensor) -> Tensor:
        with torch.no_grad():
            given = own if self.chunk is None else self._logits(heads, 1, own)
        return DIVERGENCES["forward_kl"](self._logits(heads, 1, projected), given, self.temperature, reduction="none")

    def _summed(self, compare: Callable[..., Tensor], weight: Tensor, *rows: Tensor) -> Tensor:
        """Return the sum of a loss over rows, in chunks whose logits the backward pass computes anew."""
        if self.chunk is None:
            return compare(*rows).masked_fill(~weight, 0).sum()
        total = sum((row.flatten()[:0].sum().float() for row in rows if row.is_floating_point()), torch.zeros(()))
        for index in torch.arange(len(weight), device=weight.device).split(self.chunk):
            items: Any = checkpoint(compare, *(row[index] for row in rows), use_reentrant=False)
            total = total + items.masked_fill(~weight[index], 0).sum()
        return total

    def _attended(self, ours: Side, theirs: Side) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the projected states at the tokens that count in each space, and which of these have tokens to attend to."""
        (s, s_index, s_valid), (t, t_index, t_valid) = (self._indexed(side) for side in (ours, theirs))
        t_next = t_index[..., t_index.shape[-1] // 2 :]
        scaled = t / _deviation(t, t_valid) + t_next / _deviation(t_next, t_valid)
        key = t_index / _deviation(t_index, t_valid)
        of_student, of_teacher = cross_model_attention(self.query(s_index, key), key, s_valid, t_valid)
        values = self.to_student(scaled, s), self.to_teacher(s, t)
        with torch.autocast(s.device.type, enabled=False):
            to_student, to_teacher = (
                weights @ upcast(value).to(weights.dtype)
                for weights, value in ((of_student, values[0]), (of_teacher, values[1]))
            )
        heard, taught = (a & b.any(1, keepdim=True) for a, b in ((s_valid, t_valid), (t_valid, s_valid)))
        return to_student[s_valid], to_teacher[t_valid], heard[s_valid], taught[t_valid]

    def _indexed(self, side: Side) -> tuple[Tensor, Tensor, Tensor]:
        """Return the states ``(B, M, H)`` and the embeddings of token and next token ``(B, M, 2E)`` of the M tokens that count."""
        assert side.embeddings is not None
        number = side.counted.sum(1)
        most = int(number.max()) if len(number) else 0
        order = (~side.counted).to(torch.int8).sort(dim=1, stable=True).indices[:, :most]
        valid = torch.arange(most, device=number.device)[None] < number[:, None]
        last = side.embeddings.shape[1] - 1
        places = (take(side.embeddings, place) for place in (order, (order + 1).clamp(max=last)))
        blank = ~valid[..., None]
        index = upcast(torch.cat(list(places), -1)).masked_fill(blank, 0)
        return upcast(take(side.states, order)).masked_fill(blank, 0), index, valid


def _deviation(values: Tensor, valid: Tensor) -> Tensor:
    """Return the standard deviation of all numbers at the tokens that count, in all processes; 1 where there is none."""
    numbers = values.detach()[valid].double()
    sums = torch.stack([numbers.new_tensor(float(numbers.numel())), numbers.sum(), numbers.square().sum()])
    count, first, second = sum_over_ranks(sums)
    variance = (second - first.square() / count.clamp(min=1)) / (count - 1).clamp(min=1)
    return torch.where(variance > 0, variance, torch.ones_like(variance)).sqrt().to(values.dtype)


def _taps_of(model: Any, term: str, attends: bool, chunked: bool) -> Taps:
    """Return the taps of a language model; with chunked losses the host computes no logits."""
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    paths = {id(module): path for path, module in model.named_modules()}
    if id(head) not in paths or id(embeddings) not in paths:
        raise WiringError(f"{term} needs an output layer and embeddings of tokens, which {type(model).__name__} lacks")
    states = f"{model.base_model_prefix}[0]" if chunked else f"{paths[id(head)]}:input"
    return Taps(
        Tap.parse(states),
        Tap.parse(paths[id(embeddings)]) if attends else None,
        None if chunked else Tap.parse("[logits]"),
    )
