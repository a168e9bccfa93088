"""A checksum inside a saved state: a flipped bit is an error when the state is read, never another result."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .errors import DistillError

KEY = "checksum"


def seal(state: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a copy of the state with a checksum of its content beside its own entries.

    Args:
        state: nested dicts, lists and tuples of tensors, numbers and texts.
    """
    return {**state, KEY: _digest(state)}


def unseal(state: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Returns what :func:`seal` was given.

    Args:
        state: what :func:`seal` returned.
        source: where it was read from, for messages.

    Raises:
        DistillError: the state has no checksum, or another content than when it was sealed.
    """
    found = dict(state)
    told = found.pop(KEY, None)
    if told is None:
        raise DistillError(f"{source} is damaged: the distillation state in it carries no checksum")
    if told != _digest(found):
        raise DistillError(
            f"{source} is damaged: the distillation state in it does not fit its checksum; resume from another checkpoint"
        )
    return found


def _digest(state: Any) -> str:
    found = hashlib.sha256()
    _add(found, state)
    return found.hexdigest()


def _add(found: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        found.update(f"{value.dtype} {tuple(value.shape)} ".encode())
        found.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    elif isinstance(value, Mapping):
        found.update(f"{len(value)} entries ".encode())
        for key, entry in value.items():
            _add(found, key)
            _add(found, entry)
    elif isinstance(value, (list, tuple)):
        found.update(f"{len(value)} items ".encode())
        for entry in value:
            _add(found, entry)
    else:
        found.update(f"{type(value).__name__} {value!r} ".encode())
