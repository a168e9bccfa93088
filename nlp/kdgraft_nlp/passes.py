"""Passes of a student with the host's own loss: the plain pass, and the pass whose losses on logits come in chunks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kdgraft.batch import Batch
from kdgraft.distributed import sum_over_ranks, world_size
from kdgraft.errors import DistillError
from kdgraft.losses import Ratio
from kdgraft.sources import STUDENT, Ensemble
from kdgraft.step import StepInProgress
from kdgraft.terms import ScoreTerm
from kdgraft.topk import TopK

from .adapters import AdaptersOff
from .chunked import Given, LogitTransform, TokenLoss, chunked_losses, head_of
from .heads import router_loss
from .link import link_of
from .tasks import STORED
from .tokens import IGNORED, Tokens, tokens_of
from .weighing import SMALLEST, weighted_loss


@dataclass
class StudentPass:
    """A finished pass of the student.

    Attributes:
        student: the grafted model.
        output: its output.
    """

    student: Any
    output: Any

    def finish(self, step: StepInProgress) -> dict[str, Tensor]:
        """Return the terms' losses."""
        own = self.output.get("loss") if isinstance(self.output, Mapping) else None
        return step.losses(own=None if own is None else own * link_of(self.student).last.host_factor)


def run_student(student: Any, inputs: dict[str, Any], batch: Batch) -> StudentPass:
    """Run a student with the host's own loss, in chunks where its link asks for them, and weighted where the batch has weights."""
    link, tokens = link_of(student), tokens_of(batch)
    if link.chunk is not None:
        return _run_fused(student, inputs) if link.fused else _run_in_chunks(student, inputs, tokens)
    output = student.plain_forward(**inputs)
    if tokens.weights is not None and tokens.student.targets is not None:
        items = inputs.get("num_items_in_batch")
        output["loss"] = weighted_loss(student, output, tokens.student.targets, tokens.weights, items)
    return StudentPass(student, output)


def no_loss(output: Any) -> Tensor:
    """Return a loss of 0 that keeps every parameter of the output in the graph, as DDP needs."""
    parts = [value.flatten()[:0].sum() for value in output.values() if isinstance(value, Tensor)]
    return torch.stack([part.float() for part in parts]).sum()


@contextmanager
def _last_states(student: Any) -> Iterator[list[Tensor]]:
    """Collect the states ``(B, L, H)`` before the output layer while the body runs the student."""
    seen: list[Tensor] = []
    hook = student.base_model.register_forward_hook(lambda _, args, output: seen.append(output[0]))
    try:
        yield seen
    finally:
        hook.remove()


def _following(labels: Tensor) -> Tensor:
    """Return the token that each state predicts, ``(N,)``; −100 for none."""
    return F.pad(labels, (0, 1), value=IGNORED)[:, 1:].flatten()


def _run_fused(student: Any, inputs: dict[str, Any]) -> FusedPass:
    """Run the student with the host's loss, which its replaced forward computes without logits."""
    with _last_states(student) as seen:
        output = student.plain_forward(**inputs)
    return FusedPass(student, output, seen[0].flatten(0, 1))


def _run_in_chunks(student: Any, inputs: dict[str, Any], tokens: Tokens) -> ChunkedPass:
    """Run the student without logits; :meth:`ChunkedPass.finish` adds the host's loss to its output."""
    labels = inputs.pop("labels", None)
    if labels is None:
        raise DistillError("chunked=True computes the host's loss itself; add labels to the batch")
    items = inputs.pop("num_items_in_batch", None)
    empty = torch.zeros(0, dtype=torch.long, device=labels.device)
    with _last_states(student) as seen:
        output = student.plain_forward(**inputs, logits_to_keep=empty)
    targets = _following(labels)
    if items is None:
        items = tokens.amount((targets != IGNORED).view_as(labels)).clamp(min=1 if tokens.weights is None else SMALLEST)
    items = torch.as_tensor(items)
    return ChunkedPass(student, output, seen[0].flatten(0, 1), targets, items)


@dataclass
class StatesPass(StudentPass):
    """A pass of the student whose terms on logits are computed from states, in chunks.

    Attributes:
        hidden: ``(N, H)``: the states before the output layer.
    """

    hidden: Tensor

    def _total(
        self,
        step: StepInProgress,
        terms: list[ScoreTerm],
        targets: Tensor,
        hard: Tensor | None = None,
        host_factor: float = 1.0,
    ) -> tuple[Tensor, Tensor]:
        """Return the total of all losses, and the sums over tokens.

        Args:
            step: the step.
            terms: the terms on logits.
            targets: ``(N,)``: the token that each state predicts; −100 for none.
            hard: the factor of the cross-entropy; ``None`` where the host computes it itself.
            host_factor: the factor by which the Trainer will multiply the total.
        """
        link, device = link_of(self.student), self.hidden.device
        engine, given = self.student.distiller, dict[str, Given]()
        parts = []
        for term in terms:
            count = step.denominator(term)
            if count is None:
                count = sum_over_ranks(_items(term, step).to(device)) * step.parts
            factor = term.weight_at(step.at) * world_size() / count.clamp(min=1).to(device) / host_factor
            scores: Any = term.scores
            counted, names = scores.counted(step.batch).flatten().to(device), engine.members(term.source)
            mean = _mean(engine.sources[term.source], scores)
            parts.append(TokenLoss(_on_chunk(term), counted, factor.float(), names, mean))
            for name in names:
                if name not in given:
                    found = step.recordings[name][term.teacher_taps[0]]
                    given[name] = _given(found, engine.sources[name], link.transforms)
        own = head_of(self.student, link.transforms[STUDENT])
        weights = tokens_of(step.batch).weights
        weights = None if weights is None else weights.flatten().to(device)
        return chunked_losses(self.hidden, own, targets, hard, given, parts, link.chunk or 1, weights)


@dataclass
class FusedPass(StatesPass):
    """A pass of the student whose own loss the host computes without logits."""

    def finish(self, step: StepInProgress) -> dict[str, Tensor]:
        """Return the terms' losses; the gradients of all those in chunks come with the first of these."""
        terms = _on_logits(step)
        if not terms:
            return super().finish(step)
        labels = step.batch.labels
        targets = (
            _following(labels) if isinstance(labels, Tensor) else self.hidden.new_full((len(self.hidden),), IGNORED)
        )
        whole, sums = self._total(step, terms, targets.long())
        losses = step.losses(computed=_ratios(terms, sums, step))
        if step.dropped:
            kept = [term for term in terms if term.name not in step.dropped]
            whole = self._total(step, kept, targets.long())[0] if kept else self.hidden.flatten()[:0].sum()
        first = f"distill.{terms[0].name}.loss"
        return {**losses, first: losses[first] + (whole - whole.detach())}


@dataclass
class ChunkedPass(StatesPass):
    """A pass of the student without logits.

    Attributes:
        targets: ``(N,)``: the token that each state predicts; −100 for none.
        items: the host's denominator of the sum of cross-entropies.
    """

    targets: Tensor
    items: Tensor

    def finish(self, step: StepInProgress) -> dict[str, Tensor]:
        """Return the terms' losses, from chunks of logits, and add the host's loss to the output."""
        link, terms = link_of(self.student), _on_logits(step)
        hard = self._hard(step, terms)
        whole, sums = self._total(step, terms, self.targets, hard, link.last.host_factor)
        losses = step.losses(computed=_ratios(terms, sums, step))
        if step.dropped:
            kept = [term for term in terms if term.name not in step.dropped]
            hard = self._hard(step, kept)
            whole, sums = self._total(step, kept, self.targets, hard, link.last.host_factor)
        # The terms' values are reported by name; their gradients come with the host's loss.
        own = torch.zeros_like(whole) if hard is None else (sums[0] * hard).float()
        self.output["loss"] = own + (whole - whole.detach())
        router = router_loss(self.student, self.output)
        if router is not None:
            share = link.host_weight * step.host_share()
            own = router * share if share else router.flatten()[:0].sum()
            self.output["loss"] = self.output["loss"] + own.to(whole)
        return losses

    def _hard(self, step: StepInProgress, terms: list[ScoreTerm]) -> Tensor | None:
        """Return the factor of the sum of cross-entropies; ``None`` where it has no share beside terms, and is not computed."""
        share = link_of(self.student).host_weight * step.host_share()
        return share / self.items.to(self.hidden.device).float() if share or not terms else None


def _on_logits(step: StepInProgress) -> list[ScoreTerm]:
    return [term for term in step.active if isinstance(term, ScoreTerm)]


def _ratios(terms: list[ScoreTerm], sums: Tensor, step: StepInProgress) -> dict[str, Ratio]:
    """Return the sum and the count of each term, from the sums of chunks."""
    return {
        term.name: Ratio(value.float(), _items(term, step).to(value.device).float())
        for term, value in zip(terms, sums[1:], strict=True)
    }


def _items(term: ScoreTerm, step: StepInProgress) -> Tensor:
    """Return the number of tokens that a term compares in this process's part of the batch."""
    count = term.count(step.batch)
    assert count is not None
    return count


def _given(found: Tensor | TopK, source: Any, transforms: Mapping[str, LogitTransform]) -> Given:
    """Return what a teacher's pass tells of its logits."""
    if isinstance(found, TopK):
        return Given(found.flatten())
    if getattr(source.model, STORED, False):
        return Given(found.flatten(0, 1))
    head = head_of(source.model, transforms[source.name], adapted=not isinstance(source, AdaptersOff))
    return Given(found.flatten(0, 1), head)


def _mean(source: Any, scores: Any) -> Callable[[Sequence[Tensor]], Tensor] | None:
    """Return the mean of an ensemble's logits, over the entries that all vocabularies have; ``None`` for a single teacher."""
    if not isinstance(source, Ensemble):
        return None
    return lambda logits: source.average([one[:, : scores.common] for one in logits], "softmax")


def _on_chunk(term: ScoreTerm) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Return the function from logits ``(n, V)`` of both models, and the tokens that they predict, to the term's loss per token."""
    scores: Any = term.scores
    return lambda student, teacher, labels: term.compare(term.ready(scores.on_chunk(student, teacher, labels)))
