"""Building sources from the user's arguments: a model, a dict from a config, or several of them by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ..errors import DistillError
from ..registry import SOURCES
from .base import Source


def gather_sources(
    teacher: Any, teachers: Mapping[str, Any] | None, build: Callable[[str, Any], Source]
) -> dict[str, Source]:
    """Return the sources by name.

    Args:
        teacher: the source to be named ``"teacher"``: a :class:`Source`, a dict with a registered type, such as
            ``dict(type="Itself", …)``, or an argument for ``build``.
        teachers: several of these by name, instead of ``teacher``.
        build: builds a source from ``(its name in messages, the host's own kind of argument: a model, a config, a folder)``.

    Raises:
        DistillError: both arguments are given, or ``teachers`` is not a dict of sources.
    """
    if teacher is not None and teachers is not None:
        raise DistillError("give teacher=…, or several as teachers=dict(a=…, b=…), not both")
    if teachers is not None and (not isinstance(teachers, Mapping) or not teachers):
        said = "an empty one" if isinstance(teachers, Mapping) else f"a {type(teachers).__name__}"
        raise DistillError(f"teachers must be a dict of sources by name, got {said}")
    found: dict[str, Source] = {}
    for name, given in ({"teacher": teacher} if teachers is None else teachers).items():
        named = isinstance(given, Mapping) and given.get("type") in list(SOURCES)
        made = SOURCES.build(given) if named else given
        found[name] = (
            made if isinstance(made, Source) else build("teacher" if teachers is None else f"teachers[{name!r}]", made)
        )
    return found
