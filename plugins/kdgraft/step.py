"""A step in progress: the recordings of its models, and finally the losses of its terms."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .balance import AutoWeight, gradient_norms, own_loss
from .batch import Batch
from .distributed import kept_in_graph, sum_over_ranks, world_size
from .errors import DistillError, nearest
from .losses.reduction import Ratio, divide
from .passes import Passes
from .schedules import Step
from .sources import STUDENT, Ensemble, Source
from .taps import Recording
from .terms import Term
from .terms.base import Examiner

logger = logging.getLogger("kdgraft")
LARGEST = 1e30
"""The largest sum of a term's losses: float32 may not hold the gradient of a larger one."""


class StepInProgress:
    """The recordings of one step, and finally its losses.

    Attributes:
        active: the terms whose weight is not 0.
        at: the position in training.
        recordings: the recording of each model by its name.
        outputs: the result of running each peer.
        dropped: the names of terms that were not finite, after :meth:`losses`.
        examiners: for each term a function that runs its teacher on the host's own loss, if the host can.
        passes: further passes of the models, for each term that asks for them.
        figures: values for the log, after :meth:`losses`: ``distill.<term>.weight``, on the CPU, and, for each active term that
            is finite, ``distill.<term>.raw``, the loss before its weight; where the term's share of the gradient was measured,
            ``distill.<term>.share``.
        unweighted: losses of which the weight is not known yet, as it depends on the host's own loss; see :meth:`settle`.
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
        parts: float,
        dropped: MutableMapping[str, int],
    ) -> None:
        self._sources, self._terms, self._student, self.device = sources, terms, student, device
        self._batch, self._batches = batch, dict[int, Batch]()
        self.active, self.at, self._totals, self._parts = active, at, totals, parts
        self.recordings: dict[str, Recording] = {}
        self.outputs: dict[str, Any] = {}
        self.dropped: set[str] = set()
        self.examiners: dict[str, Examiner] = {}
        self.passes: dict[str, Passes] = {}
        self.figures: dict[str, Tensor] = {}
        self.unweighted: dict[str, Tensor] = {}
        self._ever_dropped = dropped

    @property
    def batch(self) -> Batch:
        """The student's batch."""
        return self.batch_of(self._student)

    def batch_of(self, model: nn.Module) -> Batch:
        """Return a model's batch; that of a peer may differ from the student's, for instance by its own anchors."""
        if not callable(self._batch):
            return self._batch
        if id(model) not in self._batches:
            self._batches[id(model)] = self._batch(model)
        return self._batches[id(model)]

    def heard(self, source: str, *, live: bool = False) -> Recording:
        """Return the recording of a source in this step, without gradient to the source.

        Args:
            source: the name of the source.
            live: keep the graph, for a term that differentiates the source's predictions by its input.
        """
        if source != STUDENT and isinstance(ensemble := self._sources[source], Ensemble):
            return ensemble.of([self.heard(member) for member in ensemble.members])
        (model,) = (STUDENT,) if source == STUDENT else self._sources[source].members
        recording = self.recordings[model]
        has_graph = model == STUDENT or self._sources[model].trains or recording.live
        return recording.heard_as("teacher", detached=has_graph and not live)

    def denominator(self, term: Term) -> Tensor | None:
        """Return a term's denominator over all parts of the batch and all processes; ``None`` if it is not known beforehand."""
        return self._totals.get(term.name)

    @property
    def parts(self) -> float:
        """The number of parts (accumulated batches) of this step's batch."""
        return self._parts

    def losses(
        self,
        host: MutableMapping[str, Any] | None = None,
        computed: Mapping[str, Ratio] | None = None,
        *,
        own: Tensor | None = None,
        later: bool = False,
    ) -> dict[str, Tensor]:
        """Return the weighted losses, ``{"distill.<term>.loss": scalar}``; all processes must call this.

        Each term's sum is divided by its count over *all* processes and multiplied by their number, so that DDP's mean of the
        gradients is the gradient of one big batch. Terms with weight 0 give 0 and keep their parameters in the graph; so do terms
        whose weighted value is not finite, or above :data:`LARGEST`, on any process, which all processes drop, count and report.

        Args:
            host: the host's own losses by name; each is multiplied in place by the share that active terms leave to it.
            computed: the sum and count of terms that the host computed itself, by name.
            own: the host's own loss, for hosts that have one alone; terms whose share of the gradient is measured need it.
            later: the host's own loss is not known yet: these terms give 0, and their losses are those of :meth:`settle`.

        Raises:
            DistillError: a weight depends on the host's own loss, and there is none.
        """
        ready = computed or {}
        ratios = {
            term.name: _flat(ready[term.name] if term.name in ready else self._run(term))
            for term in self.active
            if not term.alone
        }
        self.dropped, denominators = self._agree(ratios)
        raw = {
            name: self._mean(name, ratio, denominators[name])
            for name, ratio in ratios.items()
            if name not in self.dropped
        }
        self.unweighted = {name: value for name, value in raw.items() if self._is_due(name)}
        settled = {} if later or not self.unweighted else self.settle(own if host is None else own_loss(host))
        result: dict[str, Tensor] = {}
        for term in self._terms:
            key = f"distill.{term.name}.loss"
            if key in settled:
                result[key] = settled[key]
            elif term.name in raw and term.name not in self.unweighted:
                result[key] = self._weighted(term, raw[term.name])
            elif not term.alone:
                result[key] = kept_in_graph(term.parameters(), self.device)
            self.figures[f"distill.{term.name}.weight"] = torch.tensor(term.weight_at(self.at))
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

    def settle(self, own: Tensor | None) -> dict[str, Tensor]:
        """Measure the shares of the gradient of :attr:`unweighted` terms, and return their losses; all processes must call this.

        Args:
            own: the host's own loss, before terms leave it a share; ``None`` if there is none, so that nothing is measured.

        Raises:
            DistillError: there is none, and a weight depends on it.
        """
        due = [term for term in self.active if term.name in self.unweighted]
        auto = next((term.name for term in due if isinstance(term.balance, AutoWeight)), None)
        if own is None and auto is not None:
            raise DistillError(
                f"{auto}: weight='auto' compares with the host's own loss, and this batch has none; add labels, or set weight to a number"
            )
        parameters = [p for p in self._student.parameters() if p.requires_grad]
        norms = {} if own is None else gradient_norms(own, self.unweighted, parameters)
        found: dict[str, Tensor] = {}
        for term in due:
            term.weigh(norms.get(term.name))
            found[f"distill.{term.name}.loss"] = self._weighted(term, self.unweighted[term.name])
            self.figures[f"distill.{term.name}.weight"] = torch.tensor(term.weight_at(self.at))
            ratio = norms[term.name].ratio if term.name in norms else None
            if ratio is not None:
                self.figures[f"distill.{term.name}.share"] = torch.tensor(ratio * term.weight)
        return found

    def _mean(self, name: str, ratio: Ratio, denominator: Tensor) -> Tensor:
        """Return a term's loss before its weight."""
        whole = self._totals.get(name)
        divisor = denominator * self._parts if whole is None else whole.to(denominator)
        return divide(ratio.numerator, divisor).sum() * world_size()

    def _weighted(self, term: Term, raw: Tensor) -> Tensor:
        """Return a term's weighted loss, and note its value before the weight for the log."""
        self.figures[f"distill.{term.name}.raw"] = raw.detach()
        if term.name not in self.unweighted and term.balance is not None:
            term.weigh(None)
        return raw * term.weight_at(self.at)

    def _is_due(self, name: str) -> bool:
        """Return true if a term's share of the gradient is to be measured in this step."""
        balance = next(term.balance for term in self.active if term.name == name)
        return balance is not None and balance.due

    def share_out(self, host: MutableMapping[str, Any], listener: str = STUDENT) -> None:
        """Multiply the host's own losses of the student, or of a peer, by the shares that active terms leave to them."""
        for term in self.active:
            absent = [
                name for name in term.host_losses if term.alone and term.listener == listener and name not in host
            ]
            if absent:
                raise DistillError(f"{term.name}: the host has no loss {absent[0]!r}{nearest(absent[0], host)}")
        for name in host:
            _scale(host, name, self.host_share(name, listener))

    def _count_dropped(self, name: str) -> None:
        """Count a dropped term, and warn about it the 1st, 2nd, 4th, 8th … time."""
        self._ever_dropped[name] += 1
        count = self._ever_dropped[name]
        if count & (count - 1) == 0:
            logger.warning(
                "distillation term %s was not finite or above %g, and was dropped from this step (%d so far)",
                name,
                LARGEST,
                count,
            )

    def _run(self, term: Term) -> Ratio:
        listener = self.recordings[term.listener].heard_as("student")
        model = self._student if term.listener == STUDENT else self._sources[term.listener].model
        term.examiner, term.passes = self.examiners.get(term.name), self.passes.get(term.name)
        try:
            return term(listener, self.heard(term.source, live=term.takes_gradients), self.batch_of(model))
        finally:
            term.examiner = term.passes = None

    def host_share(self, name: str = "loss", listener: str = STUDENT) -> float:
        """Return the factor that active terms leave to one of the host's losses; see :attr:`kdgraft.Term.host_share`.

        Terms that :meth:`losses` dropped do not reduce it. While a schedule reduces the weight of a term, the host's loss is
        reduced less in proportion.
        """
        taken: dict[str, list[float]] = {}  # by the user's term, whose parts take their parts of what it takes
        for term in self.active:
            if term.name in self.dropped or term.listener != listener or term.host_share == 1:
                continue
            if not term.host_losses or name in term.host_losses:
                whole = (1 - term.host_share) * min(term.weight_at(self.at) / term.weight, 1)
                taken.setdefault(term.origin or term.name, []).append(term.part * whole)
        return math.prod((_left(math.fsum(parts)) for parts in taken.values()), start=1.0)

    def _agree(self, ratios: Mapping[str, Ratio]) -> tuple[set[str], dict[str, Tensor]]:
        """Return the terms that are not finite, or too large, on some rank, and all denominators over all ranks, in one communication."""
        if not ratios:
            return set(), {}
        weights = {term.name: term.weight_at(self.at) for term in self.active}
        parts = []
        for name, ratio in ratios.items():
            # Check the weighted value, as a finite value may overflow when it is multiplied by its weight.
            weighted = ratio.numerator.detach() * weights[name]
            finite = (weighted.float().abs() <= LARGEST).all() & torch.isfinite(ratio.denominator).all()
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


def _left(taken: float) -> float:
    """Return what is left of 1; parts of a whole, such as three thirds, need not add up to exactly 1."""
    return 0.0 if taken > 1 - 1e-9 else 1 - taken


def _scale(losses: MutableMapping[str, Any], name: str, share: float) -> None:
    """Multiply one of the host's losses, a tensor or a list of tensors, in place; leave other figures unchanged."""
    if share != 1 and "loss" in name:
        value = losses[name]
        losses[name] = [scaled(part, share) for part in value] if isinstance(value, list) else scaled(value, share)


def scaled(loss: Tensor, share: float) -> Tensor:
    """Return a host's loss times its share; for a share of 0 it is 0 even where the loss is infinite."""
    return loss * share if share else torch.zeros_like(loss) + loss.flatten()[:0].sum()


def _flat(ratio: Ratio) -> Ratio:
    return Ratio(ratio.numerator.reshape(-1), ratio.denominator.detach().reshape(-1).to(ratio.numerator.device))
