"""Running campaigns: cases, what fails among them, and the smallest input that fails."""

from __future__ import annotations

import signal
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.strategies import SearchStrategy

Case = Any
"""An input: plain data, so that it can be written down and read again."""
Check = Callable[[Case], None]
"""Raises what is wrong with a case; an ``AssertionError`` says it, and any other error is the failure itself."""
TESTS = Path(__file__).parents[1]


@dataclass(frozen=True)
class Failure:
    """A case that did not hold.

    Args:
        kind: the place of the error and its type: failures of one kind have one cause.
        said: the error.
        case: the input.
    """

    kind: str
    said: str
    case: Case


@dataclass
class Counts:
    """The figures of a block, or of several.

    Args:
        tried: number of cases.
        failures: one for each case that failed; of each kind the first one has the smallest input that fails so.
        seconds: how long the cases took.
    """

    tried: int = 0
    failures: list[Failure] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def held(self) -> int:
        """Number of cases that did not fail."""
        return self.tried - len(self.failures)


class Cases(Protocol):
    """Where the cases of a campaign come from."""

    def block(self, number: int, count: int) -> Sequence[Case]:
        """Return the cases of a block, the same at every call."""

    def smallest(self, number: int, count: int, failure: Failure, fails: Callable[[Case], Failure | None]) -> Failure:
        """Return the smallest case found that fails as one of the block's did."""


@dataclass(frozen=True)
class Listed:
    """Cases that are listed one by one; the first ones are in the sample, and each is as small as can be."""

    cases: Callable[[], Sequence[Case]]

    def block(self, number: int, count: int) -> Sequence[Case]:
        cases = self.cases()
        return [cases[place % len(cases)] for place in range(number * count, (number + 1) * count)]

    def smallest(self, number: int, count: int, failure: Failure, fails: Callable[[Case], Failure | None]) -> Failure:
        return failure


@dataclass(frozen=True)
class Drawn:
    """Cases that hypothesis draws, and reduces where they fail."""

    strategy: Callable[[], SearchStrategy[Case]]

    def _run(self, number: int, count: int, see: Callable[[Case], None], *phases: Phase) -> None:
        quiet = settings(
            max_examples=count,
            database=None,
            deadline=None,
            report_multiple_bugs=False,
            suppress_health_check=list(HealthCheck),
            phases=phases,
        )

        def test(case: Case) -> None:
            see(case)

        seed(number)(quiet(given(self.strategy())(test)))()

    def block(self, number: int, count: int) -> Sequence[Case]:
        cases: list[Case] = []
        self._run(number, count, cases.append, Phase.generate)
        return cases

    def smallest(self, number: int, count: int, failure: Failure, fails: Callable[[Case], Failure | None]) -> Failure:
        found = [failure]

        def see(case: Case) -> None:
            again = fails(case)
            if again is not None and again.kind == failure.kind:
                found.append(again)
                raise _AlikeError

        try:
            self._run(number, count, see, Phase.generate, Phase.shrink)
        except _AlikeError:
            return found[-1]  # the last run is that of the smallest
        return failure


class _AlikeError(Exception):
    """A case fails as another one did."""


@dataclass(frozen=True)
class Campaign:
    """Attacks of one kind on one promise.

    Args:
        name: its name on the command line and in the table.
        attack: a line that says what is tried and what must hold.
        cases: where the cases come from.
        check: raises what is wrong with a case.
        count: number of cases of a whole campaign.
        sample: number of cases in the default tests; where even one takes long, 0, and one is in the slow ones.
        block: number of cases that a process runs at a stretch, after which they are written down.
        seconds: how long a case may take.
        host: the framework that it needs, if any.
    """

    name: str
    attack: str
    cases: Cases
    check: Check
    count: int
    sample: int
    block: int = 1
    seconds: float = 60.0
    host: str = "torch"

    def run(self, number: int, count: int | None = None) -> Counts:
        """Run the cases of a block."""
        size = self.block if count is None else count
        begun = time.monotonic()
        cases = self.cases.block(number, size)
        failures = [found for case in cases if (found := self.failure(case)) is not None]
        for kind in dict.fromkeys(found.kind for found in failures):
            place = next(place for place, found in enumerate(failures) if found.kind == kind)
            failures[place] = self.cases.smallest(number, size, failures[place], self.failure)
        return Counts(len(cases), failures, time.monotonic() - begun)

    def failure(self, case: Case) -> Failure | None:
        """Return what is wrong with a case, ``None`` if it held."""
        try:
            with _at_most(self.seconds), warnings.catch_warnings():
                warnings.filterwarnings("error", module="kdgraft")  # one of our own modules is a failure
                self.check(case)
        except Exception as error:
            return Failure(_kind(error), "".join(traceback.format_exception(error)[-3:]).strip()[-1500:], case)
        return None


@contextmanager
def _at_most(seconds: float) -> Iterator[None]:
    """Raise a ``TimeoutError`` in the body when it takes longer."""

    def stop(*_: Any) -> None:
        raise TimeoutError(f"took longer than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    timer = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *timer)
        signal.signal(signal.SIGALRM, before)


def _kind(error: BaseException) -> str:
    """Return the type of an error and the place where it arose: that outside the campaigns' own code, if there is one."""
    frames = traceback.extract_tb(error.__traceback__)
    theirs = [frame for frame in frames if not frame.filename.startswith(str(TESTS))]
    frame = (theirs if theirs and not isinstance(error, AssertionError) else frames)[-1]
    first = next(iter(str(error).splitlines()), "")
    told = first.partition(":")[0][:60] if isinstance(error, AssertionError) else ""
    return f"{type(error).__name__} in {Path(frame.filename).name}:{frame.name} {told}".strip()
