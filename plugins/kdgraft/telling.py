"""The log line that summarises a run."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from .engine import Engine
from .sources import Ensemble, Source


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
    model = getattr(source, "model", None)
    if not isinstance(model, nn.Module):
        return type(source).__name__
    read = getattr(source, "checkpoint", None) or getattr(model, "name_or_path", None)
    return _class(model) + (f" ({read})" if read else "")


def _class(model: nn.Module) -> str:
    return type(model).__name__.removeprefix("Distilled")


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
