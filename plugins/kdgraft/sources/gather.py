"""Building sources from the user's arguments: a model, a dict from a config, or several of them by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from ..errors import DistillError
from ..registry import SOURCES, Registry
from .base import Source

BuildStudent = Callable[[str, Any], nn.Module]
"""Builds a further student from ``(its name in messages, the host's own kind of argument)``."""


def gather_sources(
    teacher: Any,
    teachers: Mapping[str, Any] | None,
    build: Callable[[str, Any], Source],
    build_student: BuildStudent | None = None,
    registry: Registry = SOURCES,
) -> dict[str, Source]:
    """Return the sources by name, and the single peers of :class:`~kdgraft.Peers` beside them.

    Args:
        teacher: the source to be named ``"teacher"``: a :class:`Source`, a dict with a registered type, such as
            ``dict(type="Itself", …)``, or an argument for ``build``.
        teachers: several of these by name, instead of ``teacher``.
        build: builds a source from ``(its name in messages, the host's own kind of argument: a model, a config, a folder)``.
        build_student: builds the model of a ``dict(type="Peer", …)``, from its ``model`` or from all its other entries, and each
            model of a ``dict(type="Peers", models=[…])``; ``None`` where the host has models only.
        registry: the kinds of sources that a dict may name.

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
        where = "teacher" if teachers is None else f"teachers[{name!r}]"
        if isinstance(given, Mapping) and given.get("type") in list(registry):
            given = registry.build(with_students(where, given, build_student))
        found[name] = given if isinstance(given, Source) else build(where, given)
    return with_parts(found)


def with_parts(sources: Mapping[str, Source]) -> dict[str, Source]:
    """Return the sources, named, with the parts of each before it.

    Raises:
        DistillError: a part has the name of another source.
    """
    found: dict[str, Source] = {}
    for name, source in sources.items():
        source.name = name
        for part, one in source.parts().items():
            if sources.get(part, one) is not one:
                raise DistillError(f"{part!r} is a part of the source {name!r}; give your own source another name")
            one.name = part
            found[part] = one
        found[name] = source
    return found


def students_in(given: Any) -> dict[str, Any]:
    """Return what a ``dict(type="Peer", …)`` or ``dict(type="Peers", …)`` says of each model, by the end of the peer's name.

    A peer's model is its entry ``model``, or all its entries but the type.
    """
    kind = given.get("type") if isinstance(given, Mapping) else None
    if kind == "Peer":
        rest = {key: value for key, value in given.items() if key != "type"}
        return {"": rest["model"] if list(rest) == ["model"] else rest}
    models = given.get("models") if kind == "Peers" else None
    return {f"_{place}": one for place, one in enumerate(models)} if isinstance(models, (list, tuple)) else {}


def with_students(where: str, given: Any, build_student: BuildStudent | None) -> Any:
    """Return a source's dict with the models of peers built, and any other argument as it is.

    Raises:
        DistillError: a model is described, and the host builds none.
    """
    students = students_in(given)
    for end, told in students.items():
        if not isinstance(told, nn.Module):
            name = f"{where}, a Peer," if end == "" else f"{where}, peer {end[1:]} of {len(students)},"
            if build_student is None:
                raise DistillError(f"{name} must be given a model here: dict(type='Peer', model=…), got {told!r}")
            students[end] = build_student(name, told)
    if not students:
        return given
    kept = {key: value for key, value in given.items() if given["type"] == "Peers" or key == "type"}
    return {**kept, **({"model": students[""]} if "" in students else {"models": list(students.values())})}
