"""Recorders, which record the tapped values of a model during one pass.

The model is not changed permanently: during a forward pass the module's ``forward`` is shadowed on the instance, which also works
for hosts that call ``self.forward(…)`` (mmseg's heads, where module hooks do not fire). A recomputation in the backward pass
(gradient checkpointing) runs the original model, so that every tap records only the first pass.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from .errors import DistillError, WiringError, nearest
from .taps import Recording, Site, Tap

Listener = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]
"""Runs the original function in place of its caller: ``(original, args, kwargs) -> output``."""
Change = Callable[[Tap, int, Tensor], Tensor]


class Recorder:
    """Records the taps of one model.

    Args:
        model: the model; its modules are looked up anew for each pass, so that children may be replaced (SyncBN conversion).
        taps: the taps to record.
        owner: ``"student"`` or ``"teacher"``; see :class:`Recording`.
        name: name of the model, ``owner`` by default; see :class:`Recording`.

    Raises:
        WiringError: the model lacks a path; the message suggests similar ones.

    Example:
        >>> recorder = Recorder(student, [Tap.parse("conv")], owner="student")
        >>> with recorder.record(student) as recording:
        ...     output = student(images)
        >>> recording[Tap.parse("conv")].shape
        torch.Size([2, 4, 8, 8])
    """

    differentiable: frozenset[str] = frozenset({"forward"})
    """Methods that must run with gradient if the model does."""

    def __init__(self, model: nn.Module, taps: Sequence[Tap], owner: str = "model", name: str = "") -> None:
        self.owner, self.name = owner, name or owner
        self.taps = tuple(dict.fromkeys(taps))
        self.by_input = any(tap.leaf for tap in self.taps)
        """True if the next pass must run so that it can be differentiated by its input; without a tap of a leaf it has no effect."""
        self._copied: set[tuple[str, str]] = set()
        self.expected: dict[tuple[str, str], int] = {}
        for tap in self.taps:
            self.resolve(model, tap)

    def resolve(self, model: nn.Module, tap: Tap) -> list[Site]:
        """Return the callables that a tap records; raise a :class:`WiringError` if the model has none at its path."""
        try:
            module = model.get_submodule(tap.path)
        except AttributeError:
            # The outer modules first, which the message shows where no name is similar.
            paths = sorted((name for name, _ in model.named_modules() if name), key=lambda name: name.count("."))
            raise WiringError(
                f"the {self.owner} has no module '{tap.path}' (tap '{tap}'){nearest(tap.path, paths)}"
            ) from None
        if isinstance(module, nn.ModuleList):
            if not tap.index:
                raise WiringError(
                    f"tap '{tap}' of the {self.owner} is a list of modules; write '{tap}[*]' or '{tap}[0]'"
                )
            keys = range(len(module)) if tap.index[0] == "*" else [tap.index[0]]
            try:
                found = [Site(module[int(k)], f"{tap.path}.{int(k) % len(module)}", tap.method) for k in keys]
            except (IndexError, ValueError):
                raise WiringError(
                    f"tap '{tap}' of the {self.owner}: '{tap.path}' has entries 0 to {len(module) - 1}"
                ) from None
        else:
            found = [Site(module, tap.path, tap.method)]
        for source in found:
            if not callable(getattr(source.module, tap.method, None)):
                methods = sorted(set(dir(type(source.module))) - set(dir(nn.Module)))
                raise WiringError(
                    f"{type(source.module).__name__} at '{source.path}' of the {self.owner} has no method "
                    f"'{tap.method}'{nearest(tap.method, methods)}"
                )
        return found

    def rehearse(self, model: nn.Module, run: Callable[[], Any]) -> Recording:
        """Record a dry run: count how often each tap fires, and detect tensors that later modules overwrite in place.

        Such tensors (a normalisation's output before an in-place ReLU) are copied from then on, so that taps keep their values.

        Raises:
            WiringError: the run did not reach a tapped module.
        """
        with self.record(model) as recording:
            run()
        if recording.overwritten:
            with self.record(model) as recording:
                run()
        self.expected = {key: seen.calls for key, seen in recording.seen.items() if seen.calls}
        for tap in self.taps:
            if tap.method == "forward":
                recording[tap]
        return recording

    @contextmanager
    def record(self, model: nn.Module) -> Iterator[Recording]:
        """Record the taps while the body runs the model; the model is restored afterwards.

        Raises:
            WiringError: a tap lies in a region that runs without gradient (reentrant checkpointing), through which the student
                cannot learn.
        """
        with self._listening(model, None) as recording:
            yield recording
        # Modules that the dry run did not reach (a head, when only a neck is tapped) may overwrite further tensors.
        self._copied |= recording.overwritten

    def record_prefix(self, model: nn.Module, run: Callable[[], Any]) -> Recording:
        """Run the model without gradient, and stop as soon as every tap has fired as often as in the dry run.

        A pass that is to be differentiated by its input runs with gradient.
        """
        with torch.set_grad_enabled(self.by_input):
            with self._listening(model, dict(self.expected)) as recording, suppress(_Complete):
                run()
            recording.live = self.by_input
        return recording

    @contextmanager
    def substituted(self, model: nn.Module, taps: Sequence[Tap], change: Change) -> Iterator[dict[Tap, int]]:
        """Change the tapped outputs while the body runs the model; the model is restored afterwards.

        Args:
            model: the model.
            taps: taps of outputs; those of inputs are left as they are.
            change: called with a tap, the number of the tensor among those that the tap yields, and the tensor; returns the tensor
                with which the model goes on.

        Yields:
            The number of tensors of each tap that were changed so far.
        """
        changed = dict.fromkeys(taps, 0)

        def listener(tap: Tap, site: Site) -> Listener:
            def one(tensor: Tensor) -> Tensor:
                changed[tap] += 1
                return change(tap, changed[tap] - 1, tensor)

            index = tap.index[0 if site.path == tap.path else 1 :]
            return lambda original, args, kwargs: _replaced(original(*args, **kwargs), index, one)

        undo: list[Callable[[], None]] = [_fast_path_off()]
        try:
            for tap in changed:
                if tap.side == "output":
                    undo += [self.attach(site, listener(tap, site)) for site in self.resolve(model, tap)]
            yield changed
        finally:
            for restore in reversed(undo):
                restore()

    @contextmanager
    def _listening(self, model: nn.Module, remaining: dict[tuple[str, str], int] | None) -> Iterator[Recording]:
        sources = {tap: self.resolve(model, tap) for tap in self.taps}
        recording = Recording(self.owner, sources, self._copied, self.name)
        recording.training, recording.root = model.training, model
        wants_gradient = torch.is_grad_enabled()
        leaves = {
            (site.path, site.method): tap.index
            for tap, sites in sources.items()
            for site in sites
            if tap.leaf and self.by_input
        }

        def listener(source: Site) -> Listener:
            seen = recording.seen[source.path, source.method]
            key = (source.path, source.method)

            def hear(original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
                if key in leaves:
                    args, kwargs = _with_leaf(args, kwargs, leaves[key])
                seen.add("input", lambda: args[0] if args else next(iter(kwargs.values()), None))
                seen.add("inputs", lambda: _by_name(original, args, kwargs))
                seen.add("parameters", lambda: _parameters(source, self.owner))
                output = original(*args, **kwargs)
                if wants_gradient and source.method in self.differentiable and not torch.is_grad_enabled():
                    raise WiringError(
                        f"tap '{source.path}' of the {self.owner} lies inside a reentrant checkpoint, where no gradient "
                        "reaches it; tap the checkpointed block itself or checkpoint with use_reentrant=False"
                    )
                seen.add("output", lambda: output)
                seen.calls += 1
                if remaining is not None:
                    remaining[key] = remaining.get(key, 0) - 1
                    if all(count <= 0 for count in remaining.values()):
                        raise _Complete
                return output

            return hear

        undo: list[Callable[[], None]] = [_fast_path_off(), *([_fused_attention_off()] if leaves else ())]
        try:
            for source in {(s.path, s.method): s for found in sources.values() for s in found}.values():
                undo.append(self.attach(source, listener(source)))
            yield recording
        finally:
            for restore in reversed(undo):
                restore()

    def attach(self, source: Site, hear: Listener) -> Callable[[], None]:
        """Replace a site's callable by ``hear(original, args, kwargs)``; return the function that restores it."""
        original = getattr(source.module, source.method)
        return shadow(source.module, source.method, lambda *args, **kwargs: hear(original, args, kwargs))


def _fast_path_off() -> Callable[[], None]:
    """Disable the fast path of ``nn.TransformerEncoder``; return the function that restores the setting.

    In eval mode without gradient it computes a layer in one kernel, on nested tensors if there is padding: the modules inside do
    not run, and the outputs of layers have no shape.
    """
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    return lambda: torch.backends.mha.set_fastpath_enabled(before)


def _fused_attention_off() -> Callable[[], None]:
    """Let attention run by its formula, as its fused kernels have no second derivative; return the function that undoes it."""
    context = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
    context.__enter__()

    def undo() -> None:
        context.__exit__(None, None, None)

    return undo


def _with_leaf(
    args: tuple[Any, ...], kwargs: dict[str, Any], index: tuple[int | str, ...]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Make one argument of a call, the first one or that of a name, a leaf of the graph."""
    name = next((str(key) for key in index), None) or (None if args else next(iter(kwargs), None))
    value = args[0] if name is None else kwargs.get(name)
    if not isinstance(value, Tensor) or value.requires_grad or not value.is_floating_point():
        return args, kwargs
    leaf = value.detach().requires_grad_()
    return ((leaf, *args[1:]), kwargs) if name is None else (args, {**kwargs, name: leaf})


class _Complete(BaseException):
    """Ends a forward pass when no tap needs the remaining modules; hosts must not catch it with ``except Exception``."""


def shadow(module: nn.Module, method: str, replacement: Callable[..., Any]) -> Callable[[], None]:
    """Replace a method of this instance of a module; return the function that restores it."""
    before = vars(module).get(method)
    object.__setattr__(module, method, replacement)

    def restore() -> None:
        if before is None:
            object.__delattr__(module, method)
        else:
            object.__setattr__(module, method, before)

    return restore


def _by_name(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    signature = inspect.signature(function)
    found = dict(signature.bind(*args, **kwargs).arguments)
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:  # those that a wrapper hands on
            found.update(found.pop(name, {}))
    return found


def _parameters(source: Site, owner: str) -> dict[str, Tensor]:
    """Return a module's parameters by name; raise a :class:`DistillError` where FSDP holds them only while a module runs."""
    found: dict[str, Tensor] = dict(source.module.named_parameters())
    sharded = any(_is_sharded(module) for module in source.module.modules())
    if sharded or any(hasattr(parameter, "full_tensor") for parameter in found.values()):
        raise DistillError(
            f"the weights of '{source.path}' of the {owner} are sharded (FSDP), so that no term can read them whole; use DDP, or "
            "leave out terms on weights"
        )
    return found


def _is_sharded(module: nn.Module) -> bool:
    return any(kind.__name__ in ("FSDPModule", "FullyShardedDataParallel") for kind in type(module).__mro__)


def _replaced(value: Any, index: Sequence[int | str], change: Callable[[Tensor], Tensor]) -> Any:
    """Return a value with the tensors at ``index``, or all of a list there, changed; other kinds of values as they are."""
    if isinstance(value, Tensor):
        return value if index else change(value)
    if not index or index[0] == "*":
        return type(value)(map(change, value)) if type(value) in (list, tuple) else value
    key, rest = index[0], index[1:]
    if type(value) in (list, tuple) and isinstance(key, int):
        place = key % len(value)
        return type(value)(_replaced(x, rest, change) if i == place else x for i, x in enumerate(value))
    if type(value) is dict and key in value:
        return {**value, key: _replaced(value[key], rest, change)}
    return value
