"""The size of a model in a checkpoint of mmengine."""

from __future__ import annotations

from pathlib import Path

from kdgraft.sources.teacher import read_checkpoint
from kdgraft_mm.checkpoints import SAFE_TYPES

_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def count_weights(checkpoint: Path) -> int | None:
    """Return the number of weights, without batch norms' statistics; other buffers count. A distilled student's are the plain student's."""
    weights = read_checkpoint(checkpoint, safe_types=SAFE_TYPES).get("state_dict", {})
    return sum(value.numel() for name, value in weights.items() if not name.endswith(_STATISTICS)) or None
