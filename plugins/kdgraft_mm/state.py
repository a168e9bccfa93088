"""The distiller's state between a checkpoint and a resumed run.

A saved student is a plain student, so ``state_dict`` leaves the distiller out. Its live state travels in mmengine's message
hub, which every checkpoint contains and which ``Runner.resume`` restores after the model.
"""

from __future__ import annotations

import copy
from typing import Any

from mmengine.logging import MessageHub

from kdgraft.engine import Engine
from kdgraft.schedules import Step

KEY = "kdgraft"


class LiveState:
    """The distiller's entry in the message hub. A deep copy, which the hub makes in order to save it, is a plain dict."""

    def __init__(self, distiller: Engine) -> None:
        self._distiller = distiller

    def __deepcopy__(self, memo: dict[int, Any]) -> dict[str, Any]:
        return copy.deepcopy(self._distiller.live_state(), memo)


class HubLink:
    """Links one distiller to the message hub of its Runner.

    The Runner makes its hub before it builds the model. The hub that is current at that time is therefore the right one, even
    when other Runners are built before training starts. A model that is built outside a Runner uses the hub that is current in
    training. A deep copy (an EMA model) is linked to no particular hub.
    """

    def __init__(self) -> None:
        current = MessageHub.get_current_instance()
        # A hub that counts iterations already belongs to a Runner that trained before this model was built.
        self._built_in: MessageHub | None = None if "iter" in current.runtime_info else current
        self._steps = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> HubLink:
        other = HubLink.__new__(HubLink)
        other._built_in, other._steps = None, 0
        return other

    @property
    def _hub(self) -> MessageHub:
        # A Runner's hub counts iterations once its training has started.
        if self._built_in is not None and "iter" in self._built_in.runtime_info:
            return self._built_in
        return MessageHub.get_current_instance()

    def sync(self, distiller: Engine) -> None:
        """Load the state that a resumed checkpoint left in the hub, and put the live state in its place."""
        found = self._hub.runtime_info.get(KEY)
        if isinstance(found, dict):
            distiller.load_live_state(found)
        if not isinstance(found, LiveState) or found._distiller is not distiller:
            self._hub.update_info(KEY, LiveState(distiller))

    def step(self) -> Step:
        """Return iteration and epoch as the train loop counts them, or the number of calls where there is no train loop."""
        self._steps += 1
        if "iter" in self._hub.runtime_info:
            return Step(int(self._hub.get_info("iter")), int(self._hub.get_info("epoch", 0)))
        return Step(self._steps - 1, 0)

    def info(self, key: str) -> Any:
        """Return a value of the hub's runtime information, or ``None``."""
        return self._hub.get_info(key) if key in self._hub.runtime_info else None
