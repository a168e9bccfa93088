"""Comparison of the state that a resumed run needs with the state in a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .engine import Engine


def lost_terms(engine: Engine, state: Mapping[str, Any] | None) -> list[str]:
    """Return the terms whose parameters or hidden state a checkpoint lacks, and which would therefore start anew.

    Args:
        engine: the wired engine.
        state: the :meth:`~kdgraft.Engine.live_state` in the checkpoint; ``None`` if there is none.
    """
    own = engine.live_state()
    given = state or {}
    kept = {key.partition(".")[0] for key in given.get("terms", {})}
    needed = {key.partition(".")[0] for key in own["terms"]}
    hidden = own["hidden"].keys() - given.get("hidden", {}).keys()
    return [name for name in engine.terms if name in needed - kept or name in hidden]
