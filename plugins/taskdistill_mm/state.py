"""The distiller's state between a checkpoint and a resumed run.

A saved student is a plain student, so the distiller hides from ``state_dict``. Its live state travels in mmengine's message
hub, which every checkpoint carries and which ``Runner.resume`` restores after the model.
"""

from __future__ import annotations

import copy
from typing import Any

from mmengine.logging import MessageHub
from torch import nn

from taskdistill.distiller import HostDistiller
from taskdistill.schedules import Step

KEY = "taskdistill"


class LiveState:
    """Stands in the message hub for the distiller; a deep copy of it, which the hub takes to save, is a plain dict."""

    def __init__(self, distiller: HostDistiller) -> None:
        self._distiller = distiller

    def __deepcopy__(self, memo: dict[int, Any]) -> dict[str, Any]:
        return copy.deepcopy(self._distiller.live_state(), memo)


class HubLink:
    """Ties one distiller to the message hub of its Runner.

    The Runner makes its hub before it builds the model, so the hub that is current at that time is the right one even when
    other Runners are built before training starts. For a model built outside a Runner, the one current in training counts.
    A deep copy (an EMA model) is tied to nothing.
    """

    def __init__(self) -> None:
        self._built_in: MessageHub | None = MessageHub.get_current_instance()
        self._steps = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> HubLink:
        other = HubLink.__new__(HubLink)
        other._built_in, other._steps = None, 0
        return other

    def _hubs(self) -> list[MessageHub]:
        current = MessageHub.get_current_instance()
        return [current] if self._built_in in (None, current) else [self._built_in, current]  # type: ignore[list-item]

    def sync(self, distiller: HostDistiller) -> None:
        """Takes over what a resumed checkpoint left in the hub, and puts the live state in its place."""
        for hub in self._hubs():
            found = hub.runtime_info.get(KEY)
            if isinstance(found, dict):
                distiller.load_live_state(found)
            if not isinstance(found, LiveState) or found._distiller is not distiller:
                hub.update_info(KEY, LiveState(distiller))

    def step(self) -> Step:
        """Iteration and epoch as the train loop counts them; own count where there is no train loop."""
        self._steps += 1
        for hub in self._hubs():
            if "iter" in hub.runtime_info:
                return Step(int(hub.get_info("iter")), int(hub.get_info("epoch", 0)))
        return Step(self._steps - 1, 0)

    def info(self, key: str) -> Any:
        """A value of runtime information, from the first hub that has it."""
        return next((hub.get_info(key) for hub in self._hubs() if key in hub.runtime_info), None)


def hide_from_state_dict(module: nn.Module) -> None:
    """Makes a child module leave no trace in its parents' ``state_dict`` and ask for nothing when one is loaded."""

    def drop(_: nn.Module, state: dict[str, Any], prefix: str, metadata: dict[str, Any]) -> None:
        for key in [key for key in state if key.startswith(prefix)]:
            del state[key]
        described = getattr(state, "_metadata", None)
        if described is not None:
            for key in [key for key in described if key == prefix[:-1] or key.startswith(prefix)]:
                del described[key]

    def keep(owner: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
        # Loading hands every child its own values, so that none is missing.
        tensors = {**dict(owner.named_parameters()), **dict(owner.named_buffers())}
        state.update({prefix + name: tensor.detach() for name, tensor in tensors.items()})

    module._register_state_dict_hook(drop)
    module.register_load_state_dict_pre_hook(keep)
