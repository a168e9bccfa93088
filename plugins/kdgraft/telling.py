"""The log line that summarises a run, and the terms' shares of the gradient."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from .balance import AutoWeight, Gauge, remark
from .engine import Engine
from .schedules import Constant
from .sources import Ensemble, Source
from .tables import print_rows

MEASURED = 4
"""Number of batches on which ``kdgraft check`` measures the terms' shares of the gradient."""


def announced(engine: Engine, student: nn.Module, recipe: Any = None) -> str:
    """Summarise a distillation: ``"distilling GFL (r101.pth) into GFL with ld: ld_main, ld_vlr"``.

    Args:
        engine: the wired engine.
        student: the model that learns.
        recipe: a recipe's name, or ``dict(type=name, …)``.
    """
    several = len(engine.sources) > 1
    named = {name: source for name, source in engine.sources.items() if not source.parts()}
    sources = [f"{name}: {_named(source)}" if several else _named(source) for name, source in named.items()]
    name = recipe.get("type") if isinstance(recipe, Mapping) else recipe
    by = f"{name}: " if name is not None else ""
    return f"distilling {', '.join(sources)} into {_class(student)} with {by}{', '.join(engine.terms)}"


def _named(source: Source) -> str:
    if isinstance(source, Ensemble):
        return source.told
    model = getattr(source, "weighed", getattr(source, "model", None))
    if not isinstance(model, nn.Module):
        return type(source).__name__
    read = getattr(source, "checkpoint", None) or getattr(model, "name_or_path", None)
    return _class(model) + (f" ({read})" if read else "")


def _class(model: nn.Module) -> str:
    return type(model).__name__.removeprefix("Distilled")


def watch(engine: Engine) -> None:
    """Let all terms of an engine run at their full weight, and measure their shares of the gradient in the steps that follow."""
    for term in engine.all_terms:
        term.schedule = Constant()  # a warm-up starts at weight 0, at which a term is not computed at all
        if term.balance is None:
            term.balance = Gauge()


def print_shares(engine: Engine, batches: int, owner: str = "host") -> None:
    """Print the gradient shares of so many batches since :func:`watch`, and remarks on small and large ones."""
    rows, remarks = share_rows(engine)
    print_rows(rows, title=f"gradient of each term over that of the {owner}'s own loss, mean of {batches} batches")
    for said in remarks:
        print(said)


def share_rows(engine: Engine) -> tuple[list[dict[str, str]], list[str]]:
    """Return the gradient shares that were measured since :func:`watch`, one row a term, and remarks on small and large ones.

    A share is not measured where the host has no loss of its own, or one of the two gradients is 0.
    """
    rows, remarks = [], []
    for term in engine.all_terms:
        found = None if term.balance is None else term.balance.share(term.weight)
        if term.alone or term.balance is None:
            continue
        auto = " (auto)" if isinstance(term.balance, AutoWeight) else ""
        share = "not measured" if found is None else f"{found:.3g}"
        rows.append({"term": term.name, "weight": f"{term.weight:.4g}{auto}", "gradient share": share})
        said = None if found is None or auto else remark(term.name, found)
        remarks += [] if said is None else [said]
    return rows, remarks


@contextmanager
def said_aloud() -> Iterator[None]:
    """Log the suite's INFO messages to stderr in the body, unless the user's program has configured logging."""
    logger = logging.getLogger("kdgraft")
    if logger.hasHandlers() or logger.level != logging.NOTSET:
        yield
        return
    handler = logging.StreamHandler()
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(logging.NOTSET)
