"""Distributions over a vocabulary of which only the largest entries are known, and the mass of the rest.

Two distributions whose small entries are joined into one have a smaller divergence than the distributions themselves, by the
data-processing inequality, and the more entries are known the nearer it comes: with all entries known it is the divergence itself.
What is neglected is how the mass of the rest is spread.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .errors import DistillError
from .pairs import Pairs

LEAST = -30.0
"""The smallest logarithm of the mass of the rest, which keeps losses finite where nothing is left."""
RESOLUTION = 1e-6
"""The mass below which the rest of probabilities that add up to 1 is rounding, where their logarithms are of float32."""


@dataclass
class TopK:
    """The largest entries of distributions over V classes.

    Attributes:
        ids: ``(…, k)``: the classes, those with the largest probabilities first.
        logs: ``(…, k)``: the logarithms of their probabilities at temperature 1.
        norms: ``(…, T)``: for each temperature τ, the logarithm of the sum of all p^(1/τ), by which p^(1/τ) is normalised.
        rests: ``(…, T)``: for each temperature, the logarithm of the mass of all other classes.
        temperatures: the temperatures.
        classes: V.
    """

    ids: Tensor
    logs: Tensor
    norms: Tensor
    rests: Tensor
    temperatures: tuple[float, ...]
    classes: int

    @classmethod
    def of(cls, logits: Tensor, k: int, temperatures: Sequence[float] = (1.0,)) -> TopK:
        """Return the k largest entries of distributions given by logits ``(…, V)``; all of them if k ≥ V."""
        scores = logits.float()
        scores = scores - scores.logsumexp(-1, keepdim=True)
        logs, ids = scores.topk(min(k, scores.shape[-1]), dim=-1)
        norms = torch.stack([(scores / one).logsumexp(-1) for one in temperatures], -1)
        rests = []
        others = scores.scatter(-1, ids, -torch.inf)
        for place, one in enumerate(temperatures):
            rest = (others / one).logsumexp(-1) - norms[..., place]
            rests.append(rest.clamp(min=LEAST))
        return cls(ids, logs, norms, torch.stack(rests, -1), tuple(map(float, temperatures)), scores.shape[-1])

    @classmethod
    def of_largest(cls, ids: Tensor, logs: Tensor, classes: int, temperatures: Sequence[float] = (1.0,)) -> TopK:
        """Return distributions of which the k largest entries are given, and nothing else.

        The mass of the rest is what they leave of 1, at most V − k times the smallest of them. Below :data:`RESOLUTION` the
        difference is rounding, and that bound takes its place.

        Args:
            ids: ``(…, k)``: the classes, those with the largest probabilities first.
            logs: ``(…, k)``: the logarithms of their probabilities at temperature 1.
            classes: V.
            temperatures: the temperatures; other than 1 only if k = V, as the probabilities of the rest are not known.

        Raises:
            DistillError: another temperature, and k < V.
        """
        whole, exact = ids.shape[-1] >= classes, logs.double()
        if not whole and any(one != 1 for one in temperatures):
            raise DistillError(
                "the largest probabilities alone say nothing of the others at a temperature other than 1"
            )
        norms = torch.stack(
            [(exact / one).logsumexp(-1) if whole else exact.new_zeros(exact.shape[:-1]) for one in temperatures], -1
        )
        rest = exact.new_full(exact.shape[:-1], LEAST)
        if not whole:
            left, bound = 1 - exact.exp().sum(-1), exact[..., -1] + math.log(classes - ids.shape[-1])
            rest = torch.minimum(left.clamp(min=RESOLUTION).log(), bound).clamp(min=LEAST)
        rests = rest[..., None].expand_as(norms)
        told = tuple(map(float, temperatures))
        return cls(ids, logs.float(), norms.float(), rests.float(), told, classes)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the logits that it stands for, ``(…, V)``."""
        return (*self.ids.shape[:-1], self.classes)

    def __getitem__(self, index: Any) -> TopK:
        """Return some of the distributions, by an index into the leading axes."""
        return self._of_parts(lambda part: part[index])

    def flatten(self) -> TopK:
        """Return the distributions with one leading axis."""
        return self._of_parts(lambda part: part.flatten(0, -2))

    def to(self, device: torch.device | str) -> TopK:
        """Return the distributions on a device."""
        return self._of_parts(lambda part: part.to(device))

    def _of_parts(self, change: Callable[[Tensor], Tensor]) -> TopK:
        ids, logs, norms, rests = map(change, (self.ids, self.logs, self.norms, self.rests))
        return replace(self, ids=ids, logs=logs, norms=norms, rests=rests)

    def at(self, temperature: float) -> Tensor:
        """Return the logarithms ``(…, k + 1)`` of the probabilities at a temperature, that of the rest last; ``(…, k)`` with all known.

        Rounding is taken back: the probabilities add up to 1.

        Raises:
            DistillError: the mass of the rest is not known at this temperature.
        """
        if temperature not in self.temperatures:
            known = ", ".join(f"{one:g}" for one in self.temperatures)
            raise DistillError(
                f"the stored distributions are known at temperature {known}, not at {temperature:g}; fill the store with the terms "
                "that you train with"
            )
        place = self.temperatures.index(temperature)
        found = self.logs / temperature - self.norms[..., place : place + 1]
        if self.ids.shape[-1] < self.classes:
            found = torch.cat([found, self.rests[..., place : place + 1]], -1)
        return found.log_softmax(-1)


def joined(logits: Tensor, known: TopK, temperature: float) -> Tensor:
    """Return the logarithms ``(…, k + 1)`` of a student's probabilities of the known entries and of all others together.

    Args:
        logits: ``(…, V)`` or wider; entries from V on are left out.
        known: which entries are known.
        temperature: the temperature.
    """
    scores = logits[..., : known.classes].float() / temperature
    found = scores.gather(-1, known.ids)
    if known.ids.shape[-1] < known.classes:
        rest = scores.scatter(-1, known.ids, -torch.inf).logsumexp(-1, keepdim=True)
        found = torch.cat([found, rest], -1)
    return found.log_softmax(-1)


def joined_pairs(logits: Tensor, known: TopK, temperature: float, **about: Any) -> Pairs:
    """Return a student's logits ``(n, V)`` and a teacher's known entries as pairs of k + 1 classes, at a temperature.

    Both are multiplied by the temperature, by which terms divide.
    """
    student, teacher = joined(logits, known, temperature), known.at(temperature).to(logits.device)
    return Pairs(student * temperature, teacher * temperature, **about)
