"""Passes of a student with the host's own loss: the plain pass, and the pass whose losses on logits come in chunks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kdgraft.distributed import sum_over_ranks, world_size
from kdgraft.errors import DistillError
from kdgraft.losses import Ratio
from kdgraft.step import StepInProgress
from kdgraft.terms import ScoreTerm

from .chunked import TokenLoss, chunked_losses, head_of
from .heads import router_loss
from .link import link_of
from .tokens import IGNORED


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


def run_student(student: Any, inputs: dict[str, Any]) -> StudentPass:
    """Run a student with the host's own loss, in chunks where its link asks for them."""
    if link_of(student).chunk is None:
        return StudentPass(student, student.plain_forward(**inputs))
    return _run_in_chunks(student, inputs)


def no_loss(output: Any) -> Tensor:
    """Return a loss of 0 that keeps every parameter of the output in the graph, as DDP needs."""
    parts = [value.flatten()[:0].sum() for value in output.values() if isinstance(value, Tensor)]
    return torch.stack([part.float() for part in parts]).sum()


def _run_in_chunks(student: Any, inputs: dict[str, Any]) -> ChunkedPass:
    """Run the student without logits; :meth:`ChunkedPass.finish` adds the host's loss to its output."""
    labels = inputs.pop("labels", None)
    if labels is None:
        raise DistillError("chunked=True computes the host's loss itself; add labels to the batch")
    items = inputs.pop("num_items_in_batch", None)
    empty = torch.zeros(0, dtype=torch.long, device=labels.device)
    seen: list[Tensor] = []
    hook = student.base_model.register_forward_hook(lambda _, args, output: seen.append(output[0]))
    try:
        output = student.plain_forward(**inputs, logits_to_keep=empty)
    finally:
        hook.remove()
    targets = F.pad(labels, (0, 1), value=IGNORED)[:, 1:].flatten()
    items = (targets != IGNORED).sum().clamp(min=1) if items is None else torch.as_tensor(items)
    return ChunkedPass(student, output, seen[0].flatten(0, 1), targets, items)


@dataclass
class ChunkedPass(StudentPass):
    """A pass of the student without logits.

    Attributes:
        hidden: ``(N, H)``: the states before the output layer.
        targets: ``(N,)``: the token that each state predicts; −100 for none.
        items: the host's denominator of the sum of cross-entropies.
    """

    hidden: Tensor
    targets: Tensor
    items: Tensor

    def finish(self, step: StepInProgress) -> dict[str, Tensor]:
        """Return the terms' losses, from chunks of logits, and add the host's loss to the output."""
        terms = [term for term in step.active if isinstance(term, ScoreTerm)]
        whole, hard, sums = self._total(step, terms)
        ready = {
            term.name: Ratio(value.float(), _items(term, step).to(value.device).float())
            for term, value in zip(terms, sums[1:], strict=True)
        }
        losses = step.losses(computed=ready)
        if step.dropped:
            whole, hard, sums = self._total(step, [term for term in terms if term.name not in step.dropped])
        # The terms' values are reported by name; their gradients come with the host's loss.
        self.output["loss"] = (sums[0] * hard).float() + (whole - whole.detach())
        router = router_loss(self.student, self.output)
        if router is not None:
            share = link_of(self.student).host_weight * step.host_share()
            own = router * share if share else router.flatten()[:0].sum()
            self.output["loss"] = self.output["loss"] + own.to(whole)
        return losses

    def _total(self, step: StepInProgress, terms: list[ScoreTerm]) -> tuple[Tensor, Tensor, Tensor]:
        """Return the total of all losses, the factor of the cross-entropy, and the sums over tokens."""
        link, device = link_of(self.student), self.hidden.device
        hard = link.host_weight * step.host_share() / self.items.to(device).float()
        parts, states, head = [], None, None
        for term in terms:
            count = step.denominator(term)
            if count is None:
                count = sum_over_ranks(_items(term, step).to(device)) * step.parts
            factor = term.weight_at(step.at) * world_size() / count.clamp(min=1).to(device) / link.last.host_factor
            scores: Any = term.scores
            parts.append(TokenLoss(_on_chunk(term), scores.counted(step.batch).flatten().to(device), factor.float()))
        if terms:
            teacher = self.student.distiller.teacher
            states = step.recordings[teacher.name][terms[0].teacher_taps[0]].flatten(0, 1)
            head = head_of(teacher.model, link.transforms[1])
        whole, sums = chunked_losses(
            self.hidden,
            head_of(self.student, link.transforms[0]),
            self.targets,
            hard,
            states,
            head,
            parts,
            link.chunk or 1,
        )
        return whole, hard, sums


def _items(term: ScoreTerm, step: StepInProgress) -> Tensor:
    """Return the number of tokens that a term compares in this process's part of the batch."""
    count = term.count(step.batch)
    assert count is not None
    return count


def _on_chunk(term: ScoreTerm) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Return the function from logits ``(n, V)`` of both models, and the tokens that they predict, to the term's loss per token."""
    scores: Any = term.scores
    return lambda student, teacher, labels: term.compare(term.ready(scores.on_chunk(student, teacher, labels)))
