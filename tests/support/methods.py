"""Every registered term trains a small real model of every host on one batch: ``tests/{plugins,det,seg,nlp}/test_methods.py``.

A new term is in the registry, and so in these tests. Where its defaults do not fit the small models, say so in :data:`SETTINGS`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from kdgraft import Reader, Registry, TapTerm, Term
from kdgraft.distributed import SharedRandom

OF_ITSELF = ("BYOT", "ONE")
"""Terms in which the student teaches itself, so that their source is ``Itself``."""

SETTINGS: dict[str, dict[str, Any]] = {
    "FSP": dict(pairs=[[0, 0]]),  # of one layer with itself, as these tests tap one
    "SoftTargets": dict(temperature=2.0),
    "FactorTransfer": dict(pretrain=2),
    "MasKD": dict(pretrain=2),
    "FreeKD": dict(pretrain=2),
    "BoundedRegression": dict(margin=1e6),  # no student is better than its teacher by so much
    "MarginMSE": dict(tap=None, candidates=5),  # the output of a model: classes are the candidates of an image
    # The loss is a sum over remembered samples: it rises until the memory is full.
    "CRD": dict(memory=4),
}
"""Settings of a term in every host. Tests of a host override them by their own."""


def own_terms(terms: Registry) -> dict[str, type[Term]]:
    """The terms of a registry that this project brings, by name; other tests register terms of their own."""
    classes = {name: terms.get(name) for name in terms}
    return {name: one for name, one in classes.items() if one.__module__.partition(".")[0].startswith("kdgraft")}


def split(terms: Registry, reader: type[Reader]) -> tuple[list[str], list[str]]:
    """The names of the terms that a host can use, and of those that need what the host lacks.

    Terms without a loss of their own, which change the host's, are in neither; :func:`sharing` has them.
    """
    found = {name: one for name, one in own_terms(terms).items() if not one.alone}
    lacking = [name for name, one in found.items() if set(one.needs) & set(reader.lacks)]
    return [name for name in found if name not in lacking], lacking


def sharing(terms: Registry) -> list[str]:
    """The names of the terms that only take a share of the host's own loss."""
    return [name for name, one in own_terms(terms).items() if one.alone]


def assert_shared(found: Mapping[str, Tensor], plain: Mapping[str, Tensor], share: float) -> None:
    """Every loss of the plain host is there, times its share, and the term that takes the share has no loss of its own."""
    own = {name: value for name, value in found.items() if not name.startswith("distill.")}
    assert own.keys() == plain.keys() and any("loss" in name for name in plain)
    for name, value in plain.items():
        expected = value * share if "loss" in name else value
        torch.testing.assert_close(own[name], expected, msg=name)
    assert "distill.term.loss" not in found and any(name.endswith(".loss") for name in found.keys() - own.keys())


def spec(kind: type[Term], place: str, **settings: Any) -> dict[str, Any]:
    """A term's entry in a config: a tap for terms that tap modules, and settings."""
    taps = dict(tap=place) if issubclass(kind, TapTerm) else {}
    return {"type": kind.__name__, "name": "term", **taps, **SETTINGS.get(kind.__name__, {}), **settings}


def trained(
    losses: Callable[[], dict[str, Tensor]], parameters: Iterable[nn.Parameter], *, steps: int = 4, lr: float = 2e-3
) -> list[float]:
    """Train on one batch by the distillation loss of the term alone; return its values.

    Args:
        losses: runs a step of the host, and returns its losses by name.
        parameters: the parameters of the student and of the term.
        steps: number of steps.
        lr: the step size of Adam.
    """
    trained = [p for p in parameters if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=lr)
    values = []
    for _ in range(steps):
        torch.manual_seed(0)  # samplers and dropout draw numbers; some terms draw them from a generator of their own
        drawn = torch.Generator().manual_seed(0)
        with mock.patch.object(SharedRandom, "of_all_ranks", lambda _, drawn=drawn: drawn):
            value = losses()["distill.term.loss"]
        values.append(value.item())
        optimizer.zero_grad()
        value.backward()
        assert all(p.grad is None or torch.isfinite(p.grad).all() for p in trained)
        optimizer.step()
    return values


def assert_falls(values: list[float]) -> None:
    """The first value that is not 0 (of terms that first train a network of their own) is above the last one."""
    begun = [value for value in values if value != 0]
    assert len(begun) > 1 and begun[-1] < begun[0], values
