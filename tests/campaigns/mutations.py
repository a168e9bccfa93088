"""Changes of what users write: nested entries of dicts, lists, texts and numbers, as hypothesis draws and reduces them."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from hypothesis import strategies as st

Path = tuple[Any, ...]
ODD: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 0.5, 10**30, 1e39, math.inf, math.nan),
    *("", "a", "0", "-1", "é", " ", "*", "__class__", "..", "a\nb", "conv", "SoftTargets"),
    *([], {}, [None], [[]], ["a"], {"a": 1}, {"type": "SoftTargets"}, {"type": None}, {None: 1}),
)
"""Values that are wrong nearly everywhere, the simplest first."""
KEYS = (
    "type",
    "weight",
    "tap",
    "student_tap",
    "teacher_tap",
    "name",
    "source",
    "schedule",
    "region",
    "adapter",
    "temperature",
)
"""Entries that are right in some places."""


def places(entry: Any, path: Path = ()) -> Iterator[Path]:
    """Every place in an entry, the entry itself first."""
    yield path
    inside = entry.items() if isinstance(entry, Mapping) else enumerate(entry) if isinstance(entry, list) else ()
    for key, value in inside:
        yield from places(value, (*path, key))


def at(entry: Any, path: Path) -> Any:
    for key in path:
        entry = entry[key]
    return entry


def _set(entry: Any, path: Path, value: Any) -> Any:
    if not path:
        return value
    at(entry, path[:-1])[path[-1]] = value
    return entry


def _without(entry: Any, path: Path) -> Any:
    if path:
        del at(entry, path[:-1])[path[-1]]
    return entry


def _misspelt(entry: Any, path: Path, letter: int) -> Any:
    """One letter of a key, or of a text, is left out or doubled."""
    parent = at(entry, path[:-1]) if path else None
    if isinstance(parent, dict) and isinstance(path[-1], str) and letter % 2:
        key = path[-1]
        place = letter // 2 % max(len(key), 1)
        parent[key[:place] + key[place + 1 :]] = parent.pop(key)
        return entry
    text = at(entry, path)
    if not isinstance(text, str) or not text:
        return entry
    place = letter // 2 % len(text)
    return _set(entry, path, text[:place] + 2 * text[place] + text[place + 1 :])


def _twisted(value: Any) -> Any:
    """A value of another shape or size."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return -value
    if isinstance(value, list) and value:
        return value[0] if len(value) == 1 else value[:-1]
    if isinstance(value, dict) and value:
        return [value]
    return [value]


@st.composite
def mutated(draw: Callable[..., Any], entry: Any, under: Sequence[Path] = ((),), odd: Sequence[Any] = ODD) -> Any:
    """A strategy for an entry with one to three changes.

    Args:
        entry: what is right.
        under: the places below which changes are made.
        odd: values to put anywhere.
    """
    found = copy.deepcopy(entry)
    for _ in range(draw(st.integers(1, 3))):
        choice = [path for path in places(found) if any(path[: len(top)] == top for top in under)]
        if not choice:  # what may be changed is gone
            break
        path = draw(st.sampled_from(choice))
        kind = draw(st.sampled_from(["odd", "drop", "misspell", "twist", "add", "repeat", "number"]))
        found = _changed(draw, found, path, kind, odd)
    return found


def _changed(draw: Callable[..., Any], found: Any, path: Path, kind: str, odd: Sequence[Any]) -> Any:
    value = at(found, path)
    if kind == "odd":
        return _set(found, path, copy.deepcopy(draw(st.sampled_from(odd))))
    if kind == "drop":
        return _without(found, path)
    if kind == "misspell":
        return _misspelt(found, path, draw(st.integers(0, 40)))
    if kind == "twist":
        return _set(found, path, _twisted(value))
    if kind == "number" and isinstance(value, (int, float)) and not isinstance(value, bool):
        numbers = st.integers(0, 9) if isinstance(value, int) else st.floats(0, 10)
        return _set(found, path, draw(numbers))
    if kind == "add" and isinstance(value, dict):
        value[draw(st.sampled_from(KEYS))] = copy.deepcopy(draw(st.sampled_from(odd)))
    if kind == "repeat" and isinstance(value, list) and value:
        value.append(copy.deepcopy(value[-1]))
    return found
