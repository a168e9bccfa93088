"""Errors that a user can fix; each message is one line that says what to change."""

from __future__ import annotations

import math
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any


class DistillError(ValueError):
    """A mistake in a config, a call or a file; the command line prints its one-line message and exits with code 2.

    Example:
        >>> SoftTargets(temperature=0)
        Traceback (most recent call last):
        kdgraft.errors.DistillError: temperature must be > 0, got 0
    """


class WiringError(DistillError):
    """A term that cannot be wired to this student and teacher; raised at build time, before training starts.

    Example:
        >>> Distiller(student, teacher, [Hint("convs")], example=images)
        Traceback (most recent call last):
        kdgraft.errors.WiringError: ...; did you mean 'conv'?
    """


class UnsafeCheckpoint(DistillError):
    """A checkpoint that holds more than tensors and known harmless types.

    Example:
        >>> torch.save({"state_dict": {}, "author": Batch()}, "unsafe.pth")
        >>> Teacher(teacher, "unsafe.pth").load()
        Traceback (most recent call last):
        kdgraft.errors.UnsafeCheckpoint: checkpoint unsafe.pth holds objects that loading would execute (...
    """


def nearest(name: str, names: Iterable[str], n: int = 3) -> str:
    """Return ``"; did you mean 'a', 'b'?"``, or a list of the known names if none is similar, or ``""`` if there are none."""
    known = list(names)
    # A path is also suggested when only its last part is equal: `backbone.layer3` for `layer3`.
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
    """Return true for a finite number (an int if ``whole``) within the range of float32, in which losses are computed."""
    # Comparisons with NaN are false.
    return (
        isinstance(value, int if whole else (int, float)) and not isinstance(value, bool) and abs(value) <= FLOAT32_MAX
    )


def check_number(
    owner: str,
    name: str,
    value: Any,
    low: float = 0.0,
    high: float = math.inf,
    *,
    above: bool = False,
    whole: bool = False,
) -> None:
    """Raise a :class:`DistillError` unless ``value`` is a number >= ``low`` (> ``low`` with ``above``) and <= ``high``.

    The number must be finite and within the range of float32, and an int if ``whole``.
    """
    if not is_number(value, whole=whole) or value < low or (above and value == low):
        kind = "whole number" if whole else "number"
        too_large = isinstance(value, (int, float)) and value > FLOAT32_MAX
        reason = ", which exceeds the range of float32" if too_large else ""
        raise DistillError(f"{owner}: {name} must be a {kind} {'>' if above else '>='} {low:g}, got {value!r}{reason}")
    if value > high:
        raise DistillError(f"{owner}: {name} must be at most {high:g}, got {value!r}")


def check_share(owner: str, name: str, value: Any) -> None:
    """Raise a :class:`DistillError` unless ``value`` is a number in [0, 1]."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise DistillError(f"{owner}: {name} must be in [0, 1], got {value!r}")


def check_flag(owner: str, name: str, value: Any) -> None:
    """Raise a :class:`DistillError` unless ``value`` is a bool; a text such as ``"false"`` would count as true."""
    if not isinstance(value, bool):
        raise DistillError(f"{owner}: {name} must be true or false, got {value!r}")
