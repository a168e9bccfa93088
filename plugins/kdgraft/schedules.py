"""Schedules: factors, usually in [0, 1], on the weight of a term over training.

Every schedule is a pure function of the step, so that a resumed run needs no state.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from .errors import DistillError, check_number
from .registry import SCHEDULES

By = Literal["iter", "epoch"]
Shape = Literal["linear", "cosine"]


class Step(NamedTuple):
    """The position in training: the numbers of iterations and epochs completed before this step.

    Example:
        >>> Step(iteration=7)
        Step(iteration=7, epoch=0)
    """

    iteration: int = 0
    epoch: int = 0


class Schedule:
    """Base of schedules: a constant factor of 1. A subclass overrides :meth:`__call__`.

    Example:
        >>> class Alternate(Schedule):
        ...     def __call__(self, step):
        ...         return float(step.iteration % 2)
        >>> SoftTargets(weight=3.0, schedule=Alternate()).weight_at(Step(5))
        3.0
    """

    def __call__(self, step: Step) -> float:
        """Return the factor at this step."""
        return 1.0

    @property
    def largest(self) -> float:
        """The largest factor over all steps."""
        return 1.0

    @property
    def by_epoch(self) -> bool:
        """True if the schedule counts epochs rather than iterations."""
        return getattr(self, "by", "iter") == "epoch"

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in vars(self).items())})"


@SCHEDULES.register
class Constant(Schedule):
    """The same weight throughout.

    Example:
        >>> Constant()(Step(iteration=5))
        1.0
    """


@SCHEDULES.register
class Ramp(Schedule):
    """From ``start`` to ``final`` between ``begin`` and ``end``, linear or cosine; constant before and after.

    Args:
        begin, end: in iterations or epochs (``by``), from 0, ``begin <= end``.
        start, final: factors >= 0 at the two ends.
        shape: ``"linear"``, or ``"cosine"`` for half a cosine wave (flat at both ends).
        by: the unit, ``"iter"`` or ``"epoch"``.

    Example:
        >>> Ramp(end=10, start=0.5)(Step(iteration=5))
        0.75
    """

    def __init__(
        self,
        end: int,
        begin: int = 0,
        *,
        start: float = 0.0,
        final: float = 1.0,
        shape: Shape = "linear",
        by: By = "iter",
    ) -> None:
        _check_counts(type(self).__name__, begin=begin, end=end)
        if not 0 <= begin <= end:
            raise DistillError(f"{type(self).__name__} needs 0 <= begin <= end, got begin={begin}, end={end}")
        check_number(type(self).__name__, "start", start)
        check_number(type(self).__name__, "final", final)
        if shape not in ("linear", "cosine"):
            raise DistillError(f"shape must be 'linear' or 'cosine', got {shape!r}")
        self.begin, self.end, self.start, self.final, self.shape = begin, end, start, final, shape
        self.by = _check_by(by)

    def __call__(self, step: Step) -> float:
        now = _now(step, self.by)
        if now >= self.end:
            return self.final
        if now <= self.begin:
            return self.start
        done = (now - self.begin) / (self.end - self.begin)
        if self.shape == "cosine":
            done = 0.5 - 0.5 * math.cos(math.pi * done)
        return self.start + (self.final - self.start) * done

    @property
    def largest(self) -> float:
        return max(self.start, self.final)


@SCHEDULES.register
class WarmUp(Ramp):
    """From 0 (or ``start``) at ``begin`` up to the full weight at ``end``.

    Example:
        >>> WarmUp(end=10)(Step(iteration=5))
        0.5
    """

    def __init__(
        self, end: int, begin: int = 0, *, start: float = 0.0, shape: Shape = "linear", by: By = "iter"
    ) -> None:
        super().__init__(end, begin, start=start, final=1.0, shape=shape, by=by)


@SCHEDULES.register
class Decay(Ramp):
    """From the full weight at ``begin`` down to ``final`` at ``end``.

    Example:
        >>> Decay(end=20, begin=10)(Step(iteration=15))
        0.5
    """

    def __init__(
        self, end: int, begin: int = 0, *, final: float = 0.0, shape: Shape = "linear", by: By = "iter"
    ) -> None:
        super().__init__(end, begin, start=1.0, final=final, shape=shape, by=by)


@SCHEDULES.register
class Stop(Schedule):
    """The full weight before ``end``, 0 from then on (ESKD, Cho & Hariharan 2019, arXiv 1910.01348).

    Example:
        >>> [Stop(end=3, by="epoch")(Step(epoch=epoch)) for epoch in range(5)]
        [1.0, 1.0, 1.0, 0.0, 0.0]
    """

    def __init__(self, end: int, *, by: By = "iter") -> None:
        _check_counts("Stop", end=end)
        if end < 0:
            raise DistillError(f"Stop needs end >= 0, got {end}")
        self.end, self.by = end, _check_by(by)

    def __call__(self, step: Step) -> float:
        return 1.0 if _now(step, self.by) < self.end else 0.0


class Product(Schedule):
    """The product of several schedules, such as a warm-up and a stop."""

    def __init__(self, parts: Sequence[Schedule]) -> None:
        self.parts = list(parts)

    def __call__(self, step: Step) -> float:
        return math.prod(part(step) for part in self.parts)

    @property
    def largest(self) -> float:
        return math.prod(part.largest for part in self.parts)

    @property
    def by_epoch(self) -> bool:
        return any(part.by_epoch for part in self.parts)


def build_schedule(spec: Any) -> Schedule:
    """Build a schedule from ``None``, a name, ``dict(type="WarmUp", end=500)``, a list to multiply, or a :class:`Schedule`."""
    if spec is None:
        return Constant()
    if isinstance(spec, (list, tuple)):
        return Product([build_schedule(part) for part in spec])
    schedule = SCHEDULES.build(spec)
    if not isinstance(schedule, Schedule):
        raise DistillError(
            f"a schedule is a name, a dict with a type, or a list of these; got {spec!r}; make a function the "
            "__call__ of a subclass of kdgraft.Schedule"
        )
    return schedule


def _check_by(by: By) -> By:
    if by not in ("iter", "epoch"):
        raise DistillError(f"by must be 'iter' or 'epoch', got {by!r}")
    return by


def _check_counts(what: str, **counts: Any) -> None:
    for name, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, int):
            raise DistillError(f"{what}: {name} must be a whole number of iterations or epochs, got {value!r}")


def _now(step: Step, by: By) -> int:
    return step.epoch if by == "epoch" else step.iteration
