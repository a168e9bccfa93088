"""Taps: where a tensor is read from a running model, by the dotted path of a module.

=============================  =====================================================================================
``backbone.layer3``            that module's output
``backbone.layer3:input``      its input
``bbox_head.get_targets()``    what a method of it returns (it may not run in the dry run)
``head.cls_seg():input``       what a method of it is given first
``head.cls_seg():inputs``      all that it is given, by name; ``head.cls_seg():inputs[feat]`` one of them
``neck[*]``  ``neck[1]``       all, or one, of the list that it returns
``bbox_head[1][*]``            all of the second list that it returns
``head.cls_convs[3]``          a child of a ``ModuleList`` (``head.cls_convs.3``); run once per pyramid level, it yields a list
``[logits]``                   a field of the model's own output; an empty path is the model itself
=============================  =====================================================================================

Nothing is installed in the model: for the length of one forward pass the module's ``forward`` is shadowed on the instance,
which also catches hosts that call ``self.forward(…)`` (mmseg's heads, where module hooks do not fire). A recomputation in
the backward pass (gradient checkpointing) finds the model as it was, so every tap records the first pass alone.
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

_GRAMMAR = re.compile(r"(?P<path>[\w.\-]*)(?P<what>\(\)(:inputs?)?|:inputs?)?(?P<index>(\[[\w*\-]+\])*)")


@dataclass(frozen=True)
class Tap:
    """A parsed tap.

    Attributes:
        text: as it was written.
        path: the module's dotted path.
        method: the method whose call is read, ``"forward"`` unless the tap names one.
        input: read the first argument rather than what is returned.
        index: what to take from it: integers, field names, ``"*"`` for all of a list.
        inputs: read all arguments, a dict by name.
    """

    text: str
    path: str
    method: str = "forward"
    input: bool = False
    index: tuple[int | str, ...] = ()
    inputs: bool = False

    @property
    def side(self) -> str:
        """Which side of a call is read: ``"output"``, ``"input"`` or ``"inputs"``."""
        return "inputs" if self.inputs else "input" if self.input else "output"

    def below(self, path: str) -> bool:
        """Whether the module at ``path``, or one inside it, is tapped."""
        return self.path == path or self.path.startswith(f"{path}.")

    @classmethod
    def parse(cls, text: str) -> Tap:
        """Parses the notation above; a :class:`WiringError` says what is wrong with it."""
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
                    f"tap {text!r}: '{method}' is no step of a model's pass, but what every module has; tap the module's output, "
                    "or a method of its own class"
                )
        parts = tuple(int(part) if re.fullmatch(r"-?\d+", part) else part for part in index)
        side = what.rpartition(":")[2] if what else ""
        return cls(text, path, method, side == "input", parts, side == "inputs")

    def __str__(self) -> str:
        return self.text or "(output)"


class NeverFired(WiringError):
    """A pass did not run what a tap of ``owner`` reads."""

    def __init__(self, tap: Tap, owner: str) -> None:
        called = "" if tap.method == "forward" else f".{tap.method}()"
        super().__init__(
            f"tap '{tap}' of the {owner} never fired: this step does not run {tap.path or 'the model'}{called}"
        )
        self.tap, self.owner = tap, owner


class Site(NamedTuple):
    """One callable to listen to."""

    module: nn.Module
    path: str
    method: str


class _Seen:
    """The calls of one source during one pass; only the sides that a tap reads are kept."""

    def __init__(self, copied: bool, sides: set[str]) -> None:
        self.copied = copied
        self.calls = 0
        self.values: dict[str, list[Any]] = {side: [] for side in sides}
        self._versions: list[tuple[Tensor, int]] = []

    def add(self, side: str, read: Callable[[], Any]) -> None:
        if side not in self.values:
            return
        value = read()
        if self.copied:
            value = _map(value, torch.clone)
        else:
            self._versions += [(tensor, tensor._version) for tensor in _tensors(value)]
        self.values[side].append(value)

    def mapped(self, function: Callable[[Tensor], Tensor]) -> _Seen:
        """The same calls with each of their tensors replaced."""
        other = copy(self)
        other.values = {side: [_map(value, function) for value in found] for side, found in self.values.items()}
        return other

    @property
    def overwritten(self) -> bool:
        return any(tensor._version != version for tensor, version in self._versions)


class Recording:
    """What the taps of one model saw in one pass; index it with a tap.

    Attributes:
        owner: the model's part in the comparison, ``"student"`` or ``"teacher"``; for messages, and for terms that know both.
        model: the name of the model that was recorded: ``"student"``, or the source's. Part of every memo's key.
        class_order: indices that put this model's classes in the student's order; ``None`` when the order is the same.
        scale: this model's input size over the student's.
        training: whether it ran in training mode, in which some heads give other outputs.
    """

    class_order: Tensor | None = None
    scale: float = 1.0
    training: bool = False

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
        """The sources whose tensors were changed in place after they were tapped."""
        return {key for key, seen in self.seen.items() if seen.overwritten}

    def frozen(self, tap: Tap) -> bool:
        """Whether a tensor of the tap, recorded with gradient, has none: what made it does not train."""
        if tap.method != "forward" or tap.inputs:
            return False
        return any(value.is_floating_point() and not value.requires_grad for value in _tensors(self[tap]))

    def joined(self, other: Recording) -> Recording:
        """This and another recording of the same model, each of its own taps, as one."""
        both = copy(self)
        both._sources = {**self._sources, **other._sources}
        both.seen = {**self.seen, **other.seen}
        return both

    def heard_as(self, owner: str, *, detached: bool = False) -> Recording:
        """The same recording in another part of the comparison.

        Args:
            owner: ``"student"`` or ``"teacher"``.
            detached: without gradient to the model that was recorded.
        """
        other = copy(self)
        other.owner = owner
        if detached:
            other.seen = {key: seen.mapped(torch.Tensor.detach) for key, seen in self.seen.items()}
        return other

    def to(self, device: torch.device) -> Recording:
        """The same recording on one device, of a model whose layers lie on several."""
        other = copy(self)
        other.seen = {key: seen.mapped(lambda tensor: tensor.to(device)) for key, seen in self.seen.items()}
        return other

    def calls(self, tap: Tap) -> int:
        """How often the tap's module (or method) ran."""
        return sum(self.seen[source.path, source.method].calls for source in self._sources[tap])

    def __getitem__(self, tap: Tap) -> Any:
        """The tapped value: a list where the module ran more than once or the tap says ``[*]``."""
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
                    raise WiringError(f"tap '{tap}' of the {self.owner}: there is no list to take [*] of")
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
        """The tapped tensors as a list, whether the tap yields one or several; anything else is an error."""
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
        """1 where the tap's first index has picked children of a ModuleList already."""
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


def _map(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, Mapping):
        return {key: _map(entry, function) for key, entry in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_map(entry, function) for entry in value))
    if type(value) in (list, tuple):
        return type(value)(_map(entry, function) for entry in value)
    return value
