"""The steps of an engine, looked at from outside."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from kdgraft.step import StepInProgress


@contextmanager
def watched(before: Callable[[StepInProgress], None] | None = None) -> Iterator[list[StepInProgress]]:
    """Collects the steps that are made in its body; ``before`` is given each one when all is recorded, before its losses."""
    found: list[StepInProgress] = []
    original = StepInProgress.losses

    def losses(self, *args, **settings):
        found.append(self)
        if before is not None:
            before(self)
        return original(self, *args, **settings)

    StepInProgress.losses = losses  # type: ignore[method-assign]
    try:
        yield found
    finally:
        StepInProgress.losses = original  # type: ignore[method-assign]
