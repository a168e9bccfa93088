"""Taking over weights of a teacher before training, as in the inheriting strategy of FGD (arXiv 2111.11837)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from torch import nn

from .errors import WiringError, nearest

M = TypeVar("M", bound=nn.Module)


def inherit(student: M, teacher: nn.Module, modules: str | Sequence[str]) -> M:
    """Copy the weights and buffers of some of the teacher's modules into the student's modules of the same shapes.

    Args:
        student: the student, changed in place; it stays unchanged where an error is raised.
        teacher: the teacher, with its weights loaded.
        modules: one path of a module or several, in both models.

    Returns:
        The student.

    Raises:
        WiringError: a model lacks a module, or the shapes of its weights differ.

    Example:
        >>> layers = [nn.Sequential(nn.Linear(3, 4), nn.Linear(4, width)) for width in (2, 5)]
        >>> torch.equal(inherit(*layers, "0")[0].weight, layers[1][0].weight)
        True
    """
    paths = (modules,) if isinstance(modules, str) else tuple(modules)
    check_alike(student, teacher, paths)
    for path in paths:
        student.get_submodule(path).load_state_dict(teacher.get_submodule(path).state_dict())
    return student


def check_alike(student: nn.Module, teacher: nn.Module, paths: Sequence[str], owner: str = "teacher") -> None:
    """Raise a :class:`WiringError` unless student and teacher have modules of the same shapes at these paths.

    Args:
        student, teacher: the models.
        paths: the paths.
        owner: the name of the teacher, for messages.
    """
    for path in paths:
        states = []
        for name, model in (("student", student), (owner, teacher)):
            try:
                states.append(model.get_submodule(path).state_dict())
            except AttributeError:
                names = [known for known, _ in model.named_modules() if known]
                raise WiringError(f"inherit: the {name} has no module {path!r}{nearest(path, names)}") from None
        ours, theirs = ({key: tuple(value.shape) for key, value in state.items()} for state in states)
        if ours != theirs:
            key = next(key for key in {**ours, **theirs} if ours.get(key) != theirs.get(key))
            raise WiringError(
                f"inherit: {path!r} differs, {key} is {ours.get(key, 'missing')} in the student and {theirs.get(key, 'missing')} in "
                "the teacher; inherit only what is alike, such as a head on a pyramid of the same width"
            )
