"""Nested values, such as those of taps, as a list of tensors and a structure that JSON can hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from .errors import DistillError

Structure = dict[str, Any]
"""One of ``{"leaf": number}``, ``{"list": […]}``, ``{"tuple": […]}``, ``{"dict": {…}}`` and ``{"value": …}``."""


def taken_apart(value: Any) -> tuple[Structure, list[Tensor]]:
    """Return the structure of a value, and its tensors in the order of their numbers.

    Raises:
        DistillError: the value holds something else than tensors, lists, tuples, dicts, numbers, text and ``None``.

    Example:
        >>> from kdgraft.trees import taken_apart
        >>> structure, leaves = taken_apart([torch.ones(2), None])
        >>> structure
        {'list': [{'leaf': 0}, {'value': None}]}
    """
    leaves: list[Tensor] = []
    return _structure(value, leaves), leaves


def _structure(value: Any, leaves: list[Tensor]) -> Structure:
    if isinstance(value, Tensor):
        leaves.append(value)
        return {"leaf": len(leaves) - 1}
    if type(value) in (list, tuple):
        return {type(value).__name__: [_structure(entry, leaves) for entry in value]}
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {"dict": {key: _structure(entry, leaves) for key, entry in value.items()}}
    if value is None or isinstance(value, (bool, int, float, str)):
        return {"value": value}
    raise DistillError(f"a {type(value).__name__} cannot be stored")


def put_together(structure: Structure, leaves: Sequence[Any]) -> Any:
    """Return the value that :func:`taken_apart` took apart, with these leaves in the place of its tensors."""
    ((kind, held),) = structure.items()
    if kind == "leaf":
        return leaves[held]
    if kind == "dict":
        return {key: put_together(entry, leaves) for key, entry in held.items()}
    if kind in ("list", "tuple"):
        parts = [put_together(entry, leaves) for entry in held]
        return parts if kind == "list" else tuple(parts)
    return held
