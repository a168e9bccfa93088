"""What a run needs to go on as if it had never stopped, and what a checkpoint has of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .engine import Engine


def lost_terms(engine: Engine, state: Mapping[str, Any] | None) -> list[str]:
    """The terms that would start anew from a checkpoint: those with parameters or hidden state that it has nothing of.

    Args:
        state: the :meth:`~kdgraft.Engine.live_state` in the checkpoint; ``None`` where there is none.
    """
    own = engine.live_state()
    given = state or {}
    kept = {key.partition(".")[0] for key in given.get("terms", {})}
    needed = {key.partition(".")[0] for key in own["terms"]}
    hidden = own["hidden"].keys() - given.get("hidden", {}).keys()
    return [name for name in engine.terms if name in needed - kept or name in hidden]
