"""Recorders: listen to what taps read, for the length of one pass.

Nothing is installed in the model: for the length of one forward pass the module's ``forward`` is shadowed on the instance,
which also catches hosts that call ``self.forward(…)`` (mmseg's heads, where module hooks do not fire). A recomputation in
the backward pass (gradient checkpointing) finds the model as it was, so every tap records the first pass alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import nn

from .errors import WiringError, nearest
from .taps import Recording, Site, Tap

Listener = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]
"""Runs a call on behalf of its caller: ``(original, args, kwargs) -> output``."""


class Recorder:
    """Records taps of one model.

    Args:
        model: the model; modules are looked up anew for each pass, so replaced children (SyncBN conversion) are no trouble.
        taps: what to record.
        owner: ``"student"`` or ``"teacher"``; see :class:`Recording`.
        name: of the model, ``owner`` by default; see :class:`Recording`.

    Raises:
        WiringError: a path that the model does not have; the message names the nearest ones.
    """

    differentiable: frozenset[str] = frozenset({"forward"})
    """Methods that have to run with gradient where the model does."""

    def __init__(self, model: nn.Module, taps: Sequence[Tap], owner: str = "model", name: str = "") -> None:
        self.owner, self.name = owner, name or owner
        self.taps = tuple(dict.fromkeys(taps))
        self._copied: set[tuple[str, str]] = set()
        self.expected: dict[tuple[str, str], int] = {}
        for tap in self.taps:
            self.resolve(model, tap)

    def resolve(self, model: nn.Module, tap: Tap) -> list[Site]:
        """Where a tap listens in a model; raises a :class:`WiringError` where there is no such place."""
        try:
            module = model.get_submodule(tap.path)
        except AttributeError:
            paths = [name for name, _ in model.named_modules() if name]
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
        """Records a dry run: notes how often each tap fires and which tensors later modules overwrite in place.

        Overwritten ones (a normalisation before an in-place ReLU) are copied from then on, so that a tap means what it says.

        Raises:
            WiringError: a tap on a module that the run did not reach.
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
        """Records the taps while its body runs the model; leaves the model as it was.

        Raises:
            WiringError: a tap inside a region that runs without gradient (reentrant checkpointing), where the student
                could not learn from it.
        """
        with self._listening(model, None) as recording:
            yield recording
        # What a module overwrites that the dry run did not reach (a head, when only a neck is tapped).
        self._copied |= recording.overwritten

    @torch.no_grad()
    def record_prefix(self, model: nn.Module, run: Callable[[], Any]) -> Recording:
        """Runs the model without gradient and leaves it as soon as every tap fired as often as it did in the dry run."""
        with self._listening(model, dict(self.expected)) as recording, suppress(_Complete):
            run()
        return recording

    @contextmanager
    def _listening(self, model: nn.Module, remaining: dict[tuple[str, str], int] | None) -> Iterator[Recording]:
        sources = {tap: self.resolve(model, tap) for tap in self.taps}
        recording = Recording(self.owner, sources, self._copied, self.name)
        recording.training = model.training
        wants_gradient = torch.is_grad_enabled()

        def listener(source: Site) -> Listener:
            seen = recording.seen[source.path, source.method]
            key = (source.path, source.method)

            def hear(original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
                seen.add("input", lambda: args[0] if args else next(iter(kwargs.values()), None))
                seen.add("inputs", lambda: _by_name(original, args, kwargs))
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

        undo: list[Callable[[], None]] = [_fast_path_off()]
        try:
            for source in {(s.path, s.method): s for found in sources.values() for s in found}.values():
                undo.append(self.attach(source, listener(source)))
            yield recording
        finally:
            for restore in reversed(undo):
                restore()

    def attach(self, source: Site, hear: Listener) -> Callable[[], None]:
        """Lets ``hear(original, args, kwargs)`` stand before a source's calls; returns what takes it away."""
        original = getattr(source.module, source.method)
        return shadow(source.module, source.method, lambda *args, **kwargs: hear(original, args, kwargs))


def _fast_path_off() -> Callable[[], None]:
    """Let ``nn.TransformerEncoder`` run its modules; returns what lets it skip them again.

    In eval mode without gradient it computes a layer in one kernel, on nested tensors where there is padding: no module inside
    it runs, and what the layers return has no shape.
    """
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    return lambda: torch.backends.mha.set_fastpath_enabled(before)


class _Complete(BaseException):
    """Leaves a forward pass whose remaining modules no tap needs; no host's ``except Exception`` may swallow it."""


def shadow(module: nn.Module, method: str, replacement: Callable[..., Any]) -> Callable[[], None]:
    """Puts a function in place of a module's method, on this instance alone; returns what takes it away."""
    before = vars(module).get(method)
    object.__setattr__(module, method, replacement)

    def restore() -> None:
        if before is None:
            object.__delattr__(module, method)
        else:
            object.__setattr__(module, method, before)

    return restore


def _by_name(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    return dict(inspect.signature(function).bind(*args, **kwargs).arguments)
