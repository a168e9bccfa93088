"""Branches: copies of the last part of a model, which run on what the model itself gave to that part."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .errors import WiringError
from .isolation import DROPOUTS

Arguments = Mapping[str, Any]
"""The arguments of a module in a pass of the model, by name; the first one is the tensor that the module transforms."""

BETWEEN: dict[str, Callable[[Tensor], Tensor]] = {
    "": lambda x: x,
    "mean": lambda x: x.flatten(2).mean(2) if x.ndim == 4 else x.mean(1),
    "flatten": lambda x: x.flatten(1),
    "first": lambda x: x[:, 0],
}
"""Functions that a model may apply between two of its modules, by name; a ReLU may come before each."""
_AXES = {"mean": (3, 4), "first": (3,)}


class Branch(nn.Module):
    """A copy of the last part of a model.

    Args:
        parts: the modules in the order in which they run.
        steps: the functions after each of them; see :func:`steps_of`.
    """

    def __init__(self, parts: Sequence[nn.Module], steps: Sequence[str]) -> None:
        super().__init__()
        self.parts, self.steps = nn.ModuleList(parts), list(steps)

    def forward(self, given: Sequence[Arguments]) -> Tensor:
        """Return the output of the branch.

        Args:
            given: the arguments of each module in the model itself; the first argument of all but the first module is replaced by
                the output of the branch's own module before it.
        """
        value = first_of(given[0])
        if any(getattr(module, "inplace", False) for module in self.parts[0].modules()):
            value = value.clone()  # it is the model's own
        for part, step, arguments in zip(self.parts, self.steps, given, strict=True):
            value = apply(step, run(part, {**arguments, next(iter(arguments)): value}))
        return value


def first_of(arguments: Arguments) -> Tensor:
    """Return the tensor that a module transforms: its first argument."""
    found: Tensor = next(iter(arguments.values()))
    return found


def run(part: nn.Module, arguments: Arguments) -> Tensor:
    """Run a module, and return its output, or the first entry of it."""
    found = part(**arguments)
    while not isinstance(found, Tensor):
        found = found[0]
    return found


def apply(step: str, value: Tensor) -> Tensor:
    """Apply a function of :data:`BETWEEN`, after a ReLU where its name begins with ``"relu"``."""
    active = step.startswith("relu")
    return BETWEEN[step.removeprefix("relu")](value.relu() if active else value)


def steps_of(
    term: str, paths: Sequence[str], modules: Sequence[nn.Module], given: Sequence[Arguments], output: Tensor
) -> list[str]:
    """Find out what a model does between the modules of its last part, by running copies of them in eval mode.

    Args:
        term: the term's name, for messages.
        paths: the paths of the modules.
        modules: the modules.
        given: the arguments of each module in a pass of the model in eval mode.
        output: the output of the model in that pass.

    Raises:
        WiringError: the modules do not give the output of the model in this order.
    """
    for path, arguments in zip(paths, given, strict=True):
        if not isinstance(next(iter(arguments.values()), None), Tensor):
            raise WiringError(f"{term}: the first argument of {path} is no tensor; name a module that transforms one")
    wanted = [*map(first_of, given[1:]), output]
    steps: list[str] = []
    names = [*paths[1:], "the class scores"]
    copies = copy.deepcopy(list(modules))
    for path, part, arguments, target, name in zip(paths, copies, given, wanted, names, strict=True):
        with torch.no_grad():
            found = run(part.eval(), arguments)
        # A dropout in place also drops in the dry run.
        random = any(isinstance(one, DROPOUTS) and bool(one.inplace) for one in part.modules())
        step = _step(found, target, random)
        if step is None:
            raise WiringError(
                f"{term}: {path} gives {tuple(found.shape)}, which is not what {name} {tuple(target.shape)} is made from; list the "
                "modules of the student's last part in the order in which they run, as branch=[…]"
            )
        steps.append(step)
    return steps


def _step(found: Tensor, target: Tensor, random: bool) -> str | None:
    """Return the function from a module's output to what the model goes on with; by their shapes alone for random outputs."""
    names = [name for name in BETWEEN if found.ndim in _AXES.get(name, (found.ndim,))]
    for step in (active + name for active in ("", "relu") for name in names):
        made = apply(step, found)
        if made.shape == target.shape and (random or torch.allclose(made, target.to(made.dtype), 1e-3, 1e-5)):
            return step
    return None


def renewed(term: str, paths: Sequence[str], modules: Sequence[nn.Module]) -> list[nn.Module]:
    """Return copies of modules in training mode, with weights that are drawn anew.

    Raises:
        WiringError: a module with weights cannot draw them anew, as it has no ``reset_parameters``.
    """
    copies = copy.deepcopy(list(modules))
    for path, module in zip(paths, copies, strict=True):
        for name, part in module.named_modules(prefix=path):
            reset = getattr(part, "reset_parameters", None) or getattr(part, "_reset_parameters", None)
            if callable(reset):
                reset()
            elif any(True for _ in part.parameters(recurse=False)):
                raise WiringError(
                    f"{term}: {name} ({type(part).__name__}) has weights and no reset_parameters(), so that a branch cannot draw its "
                    "own; let the branch begin after it, or give the class this method"
                )
        module.train().requires_grad_(True)
    return copies
