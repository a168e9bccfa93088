"""Gradient shares of terms, and weights that are set so that the share is a given one.

The gradient share of a term is the norm of its gradient over the norm of the gradient of the host's own loss, on those parameters of
the student that both reach. The host's own loss is taken as the host computes it, before terms leave it a share.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .distributed import sum_over_ranks, world_size
from .errors import DistillError, check_number, check_share

Weight = float | str | Mapping[str, Any]
"""A number, ``"auto"``, or ``dict(type="auto", …)`` with the arguments of :class:`AutoWeight`."""

SHARE = 1.0
"""A term that pulls as strongly as the labels; with a tenth of it, four of seven methods lost most of what they bring."""
SMALLEST = 1e-20
"""A norm below it counts as no gradient: a weight that makes up for it would overflow."""
LITTLE, MUCH = 0.01, 10.0
"""Shares outside are worth a remark."""


class Norms(NamedTuple):
    """The norms of the gradients of a term, without its weight, and of the host's own loss.

    Attributes:
        term, host: the norms, over all processes.
        tensors: the number of parameters that both reach.

    Example:
        >>> from kdgraft.balance import Norms
        >>> Norms(term=0.2, host=0.8, tensors=3).ratio, Norms(term=0.0, host=0.8, tensors=3).ratio
        (0.25, None)
    """

    term: float
    host: float
    tensors: int

    @property
    def ratio(self) -> float | None:
        """The share at weight 1; ``None`` where one of the norms is 0 or not finite."""
        measured = all(math.isfinite(norm) and norm > SMALLEST for norm in (self.term, self.host))
        return self.term / self.host if measured else None


class Gauge:
    """The shares of a term in the batches that were measured; its weight stays.

    Example:
        >>> from kdgraft.balance import Gauge
        >>> gauge = Gauge()
        >>> for ratio in (0.1, 0.3): gauge.count(ratio)
        >>> gauge.share(weight=2.0)
        0.4
    """

    due = True
    """True if the next step is to be measured."""
    weight: float | None = None
    """The weight that was found; ``None`` leaves that of the term alone."""

    def __init__(self) -> None:
        self.ratios: list[float] = []

    def count(self, ratio: float | None) -> str | None:
        """Count a step in which the term is active.

        Args:
            ratio: the share at weight 1 in this step, if it was measured.

        Returns:
            A line for the log, if the step changed something.
        """
        if ratio is not None:
            self.ratios.append(ratio)
        return None

    def share(self, weight: float) -> float | None:
        """Return the mean share at a weight; ``None`` before anything was measured."""
        return weight * statistics.fmean(self.ratios) if self.ratios else None


class AutoWeight(Gauge):
    """A weight that is set once, from the first steps, so that the term's gradient has a given share of the host's own.

    In each of the first ``batches`` steps the weight is ``share`` divided by the mean ratio of the norms so far, that step's
    included; then it stays. Steps in which one of the two gradients is 0 or not finite do not count. Accumulated batches are
    measured one by one. A measured step takes a backward pass more for the host's loss and for each such term.

    With ``every`` the weight follows the share from then on, by the rule of the Gradient-guided Adaptive Modulation of RT-DETRv4
    (arXiv 2510.25257): after each ``every`` steps, such as those of an epoch, the mean share s of the last ``batches`` of them
    is compared with the band share · (1 ± ``band``); if it lies below, the weight is multiplied by share · (1 + band) / s, if above
    by share · (1 − band) / s, in both cases by 0.1 at least and 10 at most. The paper measures another share, p: that of the L1 norm
    of one module's gradient (the encoder layer before the distilled map) in the norm of all gradients, of which the term is a part;
    it compares the odds p / (1 − p), where this compares s.

    Args:
        share: the target > 0; 1 by default.
        batches: number of steps to measure, >= 1.
        every: number of steps from one correction to the next, >= ``batches``; ``None`` never corrects.
        band: half the width of the band, relative to the target, in [0, 1]; 0.1 by default. The paper's configs have 0.05 to 0.125.

    Example:
        >>> from kdgraft.balance import AutoWeight
        >>> auto = AutoWeight(share=0.5, batches=2)
        >>> for ratio in (0.1, 0.4): told = auto.count(ratio)
        >>> auto.weight, auto.due
        (2.0, False)
    """

    def __init__(
        self, share: float = SHARE, *, batches: int = 10, every: int | None = None, band: float | None = None
    ) -> None:
        super().__init__()
        check_number("weight='auto'", "share", share, above=True)
        check_number("weight='auto'", "batches", batches, 1, whole=True)
        if every is None and band is not None:
            raise DistillError(
                "weight='auto': band belongs to every, which corrects the weight; give both or leave it out"
            )
        if every is not None:
            check_number("weight='auto'", "every", every, batches, whole=True)
        if band is not None:
            check_share("weight='auto'", "band", band)
        self.target, self.batches, self.every = float(share), batches, every
        self.band = 0.1 if band is None else float(band)
        self.set, self.steps = False, 0

    @property
    def due(self) -> bool:  # type: ignore[override]
        """True during the first steps, and during the last ones before a correction."""
        return not self.set or (self.every is not None and self.steps >= self.every - self.batches)

    def count(self, ratio: float | None) -> str | None:
        super().count(ratio)
        if not self.set:
            return self._set()
        if self.every is None:
            return None
        self.steps += 1
        return self._corrected() if self.steps == self.every else None

    def _set(self) -> str | None:
        if not self.ratios:
            return None
        self.weight = self.target / statistics.fmean(self.ratios)
        if len(self.ratios) < self.batches:
            return None
        said = (
            f"weight set to {self.weight:.4g}: its gradient is {self.target:g} of the host's own on average over "
            f"{self.batches} batches, {self.weight * min(self.ratios):.2g} to {self.weight * max(self.ratios):.2g} in one"
        )
        self.set, self.ratios = True, []
        return said

    def _corrected(self) -> str | None:
        before = self.weight or 1.0
        found, self.steps, self.ratios = self.share(before), 0, []
        low, high = (self.target * (1 + sign * self.band) for sign in (-1, 1))
        if found is None or low <= found <= high:
            return None
        self.weight = before * min(max((high if found < low else low) / found, 0.1), 10.0)
        return f"weight {before:.4g} → {self.weight:.4g}: its gradient was {found:.3g} of the host's own, the target is {self.target:g}"

    def state(self) -> dict[str, Any]:
        """Return the state that a resumed run needs."""
        return {"weight": self.weight, "ratios": list(self.ratios), "set": self.set, "steps": self.steps}

    def load(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state`."""
        self.weight, self.ratios = state["weight"], list(state["ratios"])
        self.set, self.steps = bool(state["set"]), int(state["steps"])

    def __repr__(self) -> str:
        return f"auto (share {self.target:g}{f' every {self.every}' if self.every else ''})"


def gradient_norms(own: Tensor, losses: Mapping[str, Tensor], parameters: Sequence[nn.Parameter]) -> dict[str, Norms]:
    """Return the norms of the gradients of losses and of the host's own loss, for each on the parameters that both reach.

    The gradients are the means over all processes, which must call this together, as DDP's are. The graphs are kept.

    Args:
        own: the host's own loss, a scalar.
        losses: the losses by name, scalars.
        parameters: the trained parameters of the student.

    Raises:
        DistillError: a part of the model cannot be differentiated twice (reentrant checkpointing).
    """
    if not losses:
        return {}
    theirs, reached = _gradients(own, parameters)
    found = {}
    for name, loss in losses.items():
        ours, also = _gradients(loss, parameters)
        both = [i for i, pair in enumerate(zip(reached, also, strict=True)) if all(pair)]
        found[name] = Norms(_norm(ours, both), _norm(theirs, both), len(both))
    return found


def _gradients(loss: Tensor, parameters: Sequence[nn.Parameter]) -> tuple[list[Tensor | None], list[bool]]:
    """Return the gradients by the parameters, summed over processes, and for each parameter if it is reached on any process."""
    found: list[Tensor | None] = [None] * len(parameters)
    if loss.requires_grad:
        try:
            found = list(torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True))
        except RuntimeError as error:
            if "heckpoint" not in str(error):
                raise
            raise DistillError(
                "a gradient share cannot be measured through reentrant checkpointing (with_cp, gradient_checkpointing with "
                "use_reentrant=True); give weight a number, or checkpoint without reentry"
            ) from error
    if world_size() == 1:
        return found, [gradient is not None for gradient in found]
    flags = torch.tensor([float(gradient is not None) for gradient in found], device=loss.device)
    filled = [torch.zeros_like(p) if g is None else g for g, p in zip(found, parameters, strict=True)]
    flat = sum_over_ranks(torch.cat([flags, *(gradient.flatten().float() for gradient in filled)]))
    pieces = flat[len(flags) :].split([p.numel() for p in parameters])
    return list(pieces), (flat[: len(flags)] > 0).tolist()


def _norm(gradients: Sequence[Tensor | None], places: Sequence[int]) -> float:
    squares = [gradient.float().square().sum() for i in places if (gradient := gradients[i]) is not None]
    return math.sqrt(torch.stack(squares).sum().item()) if squares else 0.0


def own_loss(losses: Mapping[str, Any]) -> Tensor | None:
    """Return the sum of a host's own losses by name, tensors or lists of tensors; ``None`` if it has none."""
    found = [
        part.mean()
        for name, value in losses.items()
        if "loss" in name
        for part in (value if isinstance(value, list) else [value])
    ]
    return torch.stack([part.float() for part in found]).sum() if found else None


def remark(name: str, share: float) -> str | None:
    """Return a line about a share that is very small or very large."""
    if LITTLE <= share <= MUCH:
        return None
    said = f"{100 * share:.2g} %" if share < LITTLE else f"{share:.3g} times that"
    effect = "it hardly teaches" if share < LITTLE else "it outweighs the task"
    return f"{name}: the norm of its gradient is {said} of the host's own, so that {effect}; change its weight, or set weight='auto'"
