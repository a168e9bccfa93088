"""Errors that a user can mend: one line, saying what to change."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any


class DistillError(ValueError):
    """A mistake in a config, a call or a file; the command line prints it as one line and exits with 2."""


class WiringError(DistillError):
    """A term that cannot be wired to this student and teacher; raised when it is built, never at step 1000."""


class UnsafeCheckpoint(DistillError):
    """A checkpoint that holds more than tensors and known harmless types."""


def nearest(name: str, names: Iterable[str], n: int = 3) -> str:
    """``"; did you mean 'a', 'b'?"``, or the known names when none is near, or an empty string when there are none."""
    known = list(names)
    # A full path is also near when only its last part is: `layer3` for `backbone.layer3`.
    close = get_close_matches(name, known, n=n, cutoff=0.6)
    tail = name.rpartition(".")[2]
    close += [k for k in known if tail and k.rpartition(".")[2] == tail and k not in close][: n - len(close)]
    if close:
        return "; did you mean " + ", ".join(repr(k) for k in close) + "?"
    if not known:
        return ""
    shown = ", ".join(repr(k) for k in known[:12])
    return f"; known: {shown}" + (", …" if len(known) > 12 else "")


FLOAT32_MAX = 3.4028234663852886e38


def is_number(value: Any, *, whole: bool = False) -> bool:
    """Whether a value is a finite number that float32 holds, in which losses are computed; ``whole``: an int."""
    # NaN is not below anything.
    return (
        isinstance(value, int if whole else (int, float)) and not isinstance(value, bool) and abs(value) <= FLOAT32_MAX
    )


def check_number(
    owner: str, name: str, value: Any, low: float = 0.0, *, above: bool = False, whole: bool = False
) -> None:
    """Raises a :class:`DistillError` unless ``value`` is a number from ``low`` (above it with ``above``).

    It has to be finite and fit in float32; ``whole``: an int.
    """
    if not is_number(value, whole=whole) or value < low or (above and value == low):
        kind = "whole number" if whole else "number"
        too_large = isinstance(value, (int, float)) and value > FLOAT32_MAX
        reason = ", which is more than float32 holds" if too_large else ""
        raise DistillError(f"{owner}: {name} must be a {kind} {'>' if above else '>='} {low:g}, got {value!r}{reason}")


def check_share(owner: str, name: str, value: Any) -> None:
    """Raises a :class:`DistillError` unless ``value`` is a number in [0, 1]."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise DistillError(f"{owner}: {name} must be in [0, 1], got {value!r}")


def check_flag(owner: str, name: str, value: Any) -> None:
    """Raises a :class:`DistillError` unless ``value`` is true or false; of a text such as ``"false"`` Python makes true."""
    if not isinstance(value, bool):
        raise DistillError(f"{owner}: {name} must be true or false, got {value!r}")
