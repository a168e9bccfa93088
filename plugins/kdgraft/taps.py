"""Taps, which name tensors of a running model by the dotted path of a module.

=============================  =====================================================================================
``backbone.layer3``            the module's output
``backbone.layer3:input``      its input
``bbox_head.get_targets()``    the return value of a method (which the dry run need not call)
``backbone.layer3:parameters`` its parameters by name, as they are when it runs
``head.cls_seg():input``       the first argument of a method
``head.cls_seg():inputs``      all arguments by name; ``head.cls_seg():inputs[feat]`` is one of them
``neck[*]``  ``neck[1]``       all entries, or one entry, of the returned list
``bbox_head[1][*]``            all entries of the second of the returned lists
``head.cls_convs[3]``          a child of a ``ModuleList`` (``head.cls_convs.3``); run once per pyramid level, it yields a list
``[logits]``                   a field of the model's own output; an empty path is the model itself
=============================  =====================================================================================
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .errors import WiringError

_GRAMMAR = re.compile(r"(?P<path>[\w.\-]*)(?P<what>\(\)(:inputs?)?|:inputs?|:parameters)?(?P<index>(\[[\w*\-]+\])*)")


@dataclass(frozen=True)
class Tap:
    """A parsed tap.

    Attributes:
        text: the tap as it was written.
        path: the module's dotted path.
        method: the method whose call is read, ``"forward"`` unless the tap names one.
        input: true if the first argument is read rather than the return value.
        index: indices into the value: integers, field names, or ``"*"`` for all entries of a list.
        inputs: true if all arguments are read, as a dict by name.
        parameters: true if the module's parameters are read, as a dict by name.
        leaf: true if the input becomes a leaf of the graph, by which the model can be differentiated.

    Example:
        >>> Tap.parse("bbox_head[1][*]").index
        (1, '*')
    """

    text: str
    path: str
    method: str = "forward"
    input: bool = False
    index: tuple[int | str, ...] = ()
    inputs: bool = False
    parameters: bool = False
    leaf: bool = False

    @property
    def side(self) -> str:
        """The side of a call that is read: ``"output"``, ``"input"``, ``"inputs"`` or ``"parameters"``."""
        if self.parameters:
            return "parameters"
        return "inputs" if self.inputs else "input" if self.input else "output"

    def below(self, path: str) -> bool:
        """Return true if the tap reads the module at ``path`` or a module inside it."""
        return self.path == path or self.path.startswith(f"{path}.")

    @classmethod
    def parse(cls, text: str) -> Tap:
        """Parse a tap in the notation of this module; raise a :class:`WiringError` if it is malformed."""
        match = _GRAMMAR.fullmatch(text) if isinstance(text, str) else None
        if match is None:
            raise WiringError(
                f"cannot read tap {text!r}; write it like 'neck[*]', 'backbone.layer3:input' or 'head.m()'"
            )
        path, what, index = match["path"], match["what"], re.findall(r"\[([^\]]+)\]", match["index"])
        method = "forward"
        if what and what.startswith("()"):
            path, _, method = path.rpartition(".")
            if method != "forward" and hasattr(nn.Module, method):
                raise WiringError(
                    f"tap {text!r}: '{method}' is a method of every module, not a step of a model's pass; tap the module's output, "
                    "or a method of its own class"
                )
        parts = tuple(int(part) if re.fullmatch(r"-?\d+", part) else part for part in index)
        side = what.rpartition(":")[2] if what else ""
        return cls(text, path, method, side == "input", parts, side == "inputs", side == "parameters")

    def __str__(self) -> str:
        return self.text or "(output)"


class NeverFired(WiringError):
    """A pass did not run the module or method that a tap of ``owner`` reads."""

    def __init__(self, tap: Tap, owner: str) -> None:
        called = "" if tap.method == "forward" else f".{tap.method}()"
        super().__init__(
            f"tap '{tap}' of the {owner} never fired: this step does not run {tap.path or 'the model'}{called}"
        )
        self.tap, self.owner = tap, owner


class Site(NamedTuple):
    """A callable to record: a method of a module."""

    module: nn.Module
    path: str
    method: str


class _Seen:
    """The calls of one site during one pass; only the sides that a tap reads are kept."""

    def __init__(self, copied: bool, sides: set[str]) -> None:
        self.copied = copied
        self.calls = 0
        self.values: dict[str, list[Any]] = {side: [] for side in sides}
        self._versions: list[tuple[Tensor, int]] = []

    def add(self, side: str, read: Callable[[], Any]) -> None:
        if side not in self.values:
            return
        if side == "parameters" and self.values[side]:
            return  # a module that runs several times has them once
        value = read()
        if self.copied:
            value = mapped(value, _copied)
        else:
            self._versions += [(tensor, tensor._version) for tensor in _tensors(value)]
        self.values[side].append(value)

    def mapped(self, function: Callable[[Tensor], Tensor]) -> _Seen:
        """Return the same calls with ``function`` applied to each tensor."""
        other = copy(self)
        other.values = {side: [mapped(value, function) for value in found] for side, found in self.values.items()}
        return other

    @property
    def overwritten(self) -> bool:
        return any(tensor._version != version for tensor, version in self._versions)


class Recording:
    """The tapped values of one model in one pass; index it with a tap.

    Attributes:
        owner: the model's role in the comparison, ``"student"`` or ``"teacher"``; for messages, and for terms that need it.
        model: the name of the recorded model: ``"student"``, or the name of the source. Keys of cached values include it.
        class_order: indices that put this model's classes in the student's order; ``None`` if the order is the same.
        scale: the ratio of this model's input size to the student's.
        training: true if the model ran in training mode, in which some heads return other outputs.
        root: the recorded model itself, for terms that run a part of it once more within the step; ``None`` where there is none.
        live: true if the model, although it does not train, ran with gradients by its input.
        repeats: true if a single map of this model is compared with each of several maps of the other one.

    Example:
        >>> tap = Tap.parse("conv")
        >>> recording = Recorder(teacher, [tap]).record_prefix(teacher, lambda: teacher(images))
        >>> [tensor.shape[1] for tensor in recording.tensors(tap)]
        [8]
    """

    class_order: Tensor | None = None
    scale: float = 1.0
    training: bool = False
    root: nn.Module | None = None
    live: bool = False
    repeats: bool = False

    def __init__(
        self, owner: str, sources: Mapping[Tap, Sequence[Site]], copied: set[tuple[str, str]], model: str = ""
    ) -> None:
        self.owner, self.model = owner, model or owner
        self._sources = sources
        sides: dict[tuple[str, str], set[str]] = {}
        for tap, found in sources.items():
            for source in found:
                sides.setdefault((source.path, source.method), set()).add(tap.side)
        self.seen = {key: _Seen(key in copied, wanted) for key, wanted in sides.items()}

    @property
    def overwritten(self) -> set[tuple[str, str]]:
        """The sites whose tensors were changed in place after they were tapped."""
        return {key for key, seen in self.seen.items() if seen.overwritten}

    def frozen(self, tap: Tap) -> bool:
        """Return true if a tensor of the tap has no gradient although it was recorded with gradient: its modules are frozen."""
        if tap.method != "forward" or tap.inputs or (tap.input and not tap.path):  # the model's own inputs are data
            return False
        if tap.parameters:
            return not any(parameter.requires_grad for parameter in _tensors(self[tap]))
        return any(value.is_floating_point() and not value.requires_grad for value in _tensors(self[tap]))

    def joined(self, other: Recording) -> Recording:
        """Merge this recording with one of other taps of the same model."""
        both = copy(self)
        both._sources = {**self._sources, **other._sources}
        both.seen = {**self.seen, **other.seen}
        return both

    def heard_as(self, owner: str, *, detached: bool = False) -> Recording:
        """Return the same recording in another role of the comparison.

        Args:
            owner: ``"student"`` or ``"teacher"``.
            detached: detach the tensors, so that the recorded model receives no gradient.
        """
        other = self.mapped(torch.Tensor.detach) if detached else copy(self)
        other.owner = owner
        return other

    def mapped(self, function: Callable[[Tensor], Tensor]) -> Recording:
        """Return the same recording with a function applied to each tensor."""
        other = copy(self)
        other.seen = {key: seen.mapped(function) for key, seen in self.seen.items()}
        return other

    def to(self, device: torch.device) -> Recording:
        """Return the same recording on one device, for a model whose layers are on several."""
        return self.mapped(lambda tensor: tensor.to(device))

    def calls(self, tap: Tap) -> int:
        """Return how often the tap's module (or method) ran."""
        return sum(self.seen[source.path, source.method].calls for source in self._sources[tap])

    def __getitem__(self, tap: Tap) -> Any:
        """Return the tapped value: a list if the module ran more than once or the tap ends with ``[*]``."""
        values: list[Any] = []
        for source in self._sources[tap]:
            values += self.seen[source.path, source.method].values[tap.side]
        if not values:
            raise NeverFired(tap, self.owner)
        value = values[0] if len(values) == 1 else values
        index = tap.index[self._consumed(tap) :]
        for place, key in enumerate(index):
            if key == "*":
                if not isinstance(value, (list, tuple)):
                    raise WiringError(f"tap '{tap}' of the {self.owner}: [*] needs a list; remove it")
                if place + 1 < len(index):
                    raise WiringError(f"tap '{tap}': [*] can only come last")
                value = list(value)
            else:
                by_name = isinstance(key, str) and not isinstance(value, Mapping)
                container: Any = value
                try:
                    value = getattr(container, str(key)) if by_name else container[key]
                except (IndexError, KeyError, TypeError, AttributeError, RuntimeError):
                    has = f"{len(value)} entries" if isinstance(value, (list, tuple)) else f"a {type(value).__name__}"
                    raise WiringError(f"tap '{tap}' of the {self.owner}: no [{key}] in {has}") from None
        return value

    def tensors(self, tap: Tap) -> list[Tensor]:
        """Return the tapped tensors as a list, for one or several; raise a :class:`WiringError` for other values."""
        value = self[tap]
        values = list(value) if isinstance(value, (list, tuple)) else [value]
        for entry in values:
            if not isinstance(entry, Tensor):
                fields = ", ".join(entry) if isinstance(entry, Mapping) else ""
                raise WiringError(
                    f"tap '{tap}' of the {self.owner} yields a {type(entry).__name__}, not a tensor; "
                    + (
                        f"pick a field like {tap}[name] out of {fields}"
                        if fields
                        else f"pick an entry, as in '{tap}[0]'"
                    )
                )
        return values

    def _consumed(self, tap: Tap) -> int:
        """Return 1 if the tap's first index already selected children of a ModuleList, else 0."""
        return 0 if self._sources[tap][0].path == tap.path else 1


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for entry in value.values():
            yield from _tensors(entry)
    elif isinstance(value, (list, tuple)):
        for entry in value:
            yield from _tensors(entry)


def _copied(tensor: Tensor) -> Tensor:
    """Copy a tensor; a leaf of the graph, which nothing may overwrite, stays the one that the model uses."""
    return tensor if tensor.is_leaf and tensor.requires_grad else tensor.clone()


def mapped(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Return a nested value with a function applied to each tensor."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, dict):
        found = copy(value)  # of its own class: an output of transformers has entries by number too
        for key, entry in value.items():
            found[key] = mapped(entry, function)
        return found
    if isinstance(value, Mapping):
        return {key: mapped(entry, function) for key, entry in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(mapped(entry, function) for entry in value))
    if type(value) in (list, tuple):
        return type(value)(mapped(entry, function) for entry in value)
    return value
