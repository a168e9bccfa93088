"""One step in progress: what its models gave, and in the end the losses of its terms."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .batch import Batch
from .distributed import sum_over_ranks, world_size
from .losses.reduction import Ratio, divide
from .schedules import Step
from .sources import STUDENT, Ensemble, Source
from .taps import Recording
from .terms import Term

logger = logging.getLogger("kdgraft")


class StepInProgress:
    """One step: what was recorded, and in the end its losses.

    Attributes:
        active: the terms whose weight is not 0.
        at: where training stands.
        recordings: of each model by its name.
        outputs: what the run of each peer returned.
        dropped: the names of terms that were not finite, after :meth:`losses`.
        figures: for the log, after :meth:`losses`: ``distill.<term>.weight``, on the CPU, and ``distill.<term>.raw``, the loss
            before its weight, of each term that counts.
    """

    def __init__(
        self,
        sources: Mapping[str, Source],
        terms: Sequence[Term],
        active: Sequence[Term],
        batch: Batch | Callable[[nn.Module], Batch],
        student: nn.Module,
        at: Step,
        device: torch.device,
        totals: Mapping[str, Tensor],
        parts: int,
        dropped: MutableMapping[str, int],
    ) -> None:
        self._sources, self._terms, self._student, self.device = sources, terms, student, device
        self._batch, self._batches = batch, dict[int, Batch]()
        self.active, self.at, self._totals, self._parts = active, at, totals, parts
        self.recordings: dict[str, Recording] = {}
        self.outputs: dict[str, Any] = {}
        self.dropped: set[str] = set()
        self.figures: dict[str, Tensor] = {}
        self._ever_dropped = dropped

    @property
    def batch(self) -> Batch:
        """What is known of the student's batch."""
        return self.batch_of(self._student)

    def batch_of(self, model: nn.Module) -> Batch:
        """What is known of a model's batch; of one that trains by itself it may differ (its own anchors)."""
        if not callable(self._batch):
            return self._batch
        if id(model) not in self._batches:
            self._batches[id(model)] = self._batch(model)
        return self._batches[id(model)]

    def heard(self, source: str) -> Recording:
        """What a source gave in this step, without gradient to it."""
        if source != STUDENT and isinstance(ensemble := self._sources[source], Ensemble):
            return ensemble.of([self.heard(member) for member in ensemble.members])
        (model,) = (STUDENT,) if source == STUDENT else self._sources[source].members
        trains = model == STUDENT or self._sources[model].trains
        return self.recordings[model].heard_as("teacher", detached=trains)

    def denominator(self, term: Term) -> Tensor | None:
        """A term's denominator over all parts of the batch and all processes; ``None`` where it is not known beforehand."""
        return self._totals.get(term.name)

    @property
    def parts(self) -> int:
        """How many parts (accumulated batches) this step's batch has."""
        return self._parts

    def losses(
        self, host: MutableMapping[str, Any] | None = None, computed: Mapping[str, Ratio] | None = None
    ) -> dict[str, Tensor]:
        """The weighted losses, ``{"distill.<term>.loss": scalar}``; on several processes call it on all of them.

        Each term's sum is divided by its count over *all* processes and multiplied by their number, so that the mean of
        gradients that DDP takes is the gradient of the one big batch. Terms at weight 0, and terms whose weighted value is not
        finite (on any process: dropped by all, counted, reported), give 0 and keep their parameters in the graph.

        Args:
            host: the host's own losses by name; each is multiplied by the share that active terms leave to it, in place.
            computed: the sum and count of terms that the host computed itself, by name.
        """
        ready = computed or {}
        ratios = {term.name: _flat(ready[term.name] if term.name in ready else self._run(term)) for term in self.active}
        self.dropped, denominators = self._agree(ratios)
        result: dict[str, Tensor] = {}
        for term in self._terms:
            key, weight = f"distill.{term.name}.loss", term.weight_at(self.at)
            self.figures[f"distill.{term.name}.weight"] = torch.tensor(weight)
            if term.name in ratios and term.name not in self.dropped:
                whole = self._totals.get(term.name)
                denominator = (
                    denominators[term.name] * self._parts if whole is None else whole.to(denominators[term.name])
                )
                share = divide(ratios[term.name].numerator, denominator).sum()
                result[key] = share * (weight * world_size())
                self.figures[f"distill.{term.name}.raw"] = share.detach() * world_size()
            else:
                result[key] = _idle(term, self.device)
        for name in self.dropped:
            self._count_dropped(name)
        for term in self.active:
            result.update({f"distill.{term.name}.{key}": value.detach() for key, value in term.monitor.items()})
        result.update(
            {
                f"distill.{name}.dropped": torch.tensor(float(n), device=self.device)
                for name, n in self._ever_dropped.items()
                if n
            }
        )
        if host is not None:
            self.share_out(host)
        return result

    def share_out(self, host: MutableMapping[str, Any], listener: str = STUDENT) -> None:
        """Multiplies the host's own losses of the student, or of a peer, by the shares that active terms leave to them."""
        for name in host:
            _scale(host, name, self.host_share(name, listener))

    def _count_dropped(self, name: str) -> None:
        """Counts a term that was dropped, and says so the 1st, 2nd, 4th, 8th … time."""
        self._ever_dropped[name] += 1
        count = self._ever_dropped[name]
        if count & (count - 1) == 0:
            logger.warning(
                "distillation term %s was not finite and was dropped from this step (%d so far)", name, count
            )

    def _run(self, term: Term) -> Ratio:
        listener = self.recordings[term.listener].heard_as("student")
        model = self._student if term.listener == STUDENT else self._sources[term.listener].model
        return term(listener, self.heard(term.source), self.batch_of(model))

    def host_share(self, name: str = "loss", listener: str = STUDENT) -> float:
        """The share of its own weight that active terms leave to one of the host's losses; see :class:`~kdgraft.Term`.

        A term that :meth:`losses` dropped takes none. While a schedule keeps a term small, the host's loss keeps what the
        term does not take.
        """
        share = 1.0
        for term in self.active:
            if term.name in self.dropped or term.listener != listener or term.host_share == 1:
                continue
            if not term.host_losses or name in term.host_losses:
                share *= 1 - (1 - term.host_share) * min(term.weight_at(self.at) / term.weight, 1)
        return share

    def _agree(self, ratios: Mapping[str, Ratio]) -> tuple[set[str], dict[str, Tensor]]:
        """Over all ranks: which terms are not finite somewhere, and each term's denominator. One exchange for all terms."""
        if not ratios:
            return set(), {}
        weights = {term.name: term.weight_at(self.at) for term in self.active}
        parts = []
        for name, ratio in ratios.items():
            # What is added to the loss: a finite value may overflow under its weight.
            weighted = ratio.numerator.detach() * weights[name]
            finite = torch.isfinite(weighted).all() & torch.isfinite(ratio.denominator).all()
            parts += [(~finite).double().reshape(1), torch.nan_to_num(ratio.denominator).double()]
        total = sum_over_ranks(torch.cat(parts))
        sizes = [size for ratio in ratios.values() for size in (1, ratio.denominator.numel())]
        pieces = total.split(sizes)
        bad = torch.cat(pieces[0::2]).tolist()
        dropped = {name for name, flag in zip(ratios, bad, strict=True) if flag}
        totals = {
            name: piece.to(ratio.denominator.dtype)
            for (name, ratio), piece in zip(ratios.items(), pieces[1::2], strict=True)
        }
        return dropped, totals


def _scale(losses: MutableMapping[str, Any], name: str, share: float) -> None:
    """Multiplies one of the host's losses, a tensor or a list of them; a figure that is no loss stays."""
    if share != 1 and "loss" in name:
        value = losses[name]
        losses[name] = [part * share for part in value] if isinstance(value, list) else value * share


def _flat(ratio: Ratio) -> Ratio:
    return Ratio(ratio.numerator.reshape(-1), ratio.denominator.detach().reshape(-1).to(ratio.numerator.device))


def _idle(term: nn.Module, device: torch.device | str) -> Tensor:
    """0 that keeps the term's parameters in the graph, for DDP; also when they are infinite, so no ``0 *``."""
    parameters = [p for p in term.parameters() if p.requires_grad]
    if not parameters:
        return torch.zeros((), device=device)
    return torch.stack([p.flatten()[:0].sum() for p in parameters]).sum()
