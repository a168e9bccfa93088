"""Settings for every term that segmentors can use."""

from __future__ import annotations

from typing import Any

from support.seg import SMALL_CRITIC

SETTINGS: dict[str, dict[str, Any]] = {
    "Review": dict(tap=["backbone[1]", "backbone[2]"]),
    "AdversarialMask": dict(critic=SMALL_CRITIC),
    "CrossImageRelations": dict(nodes=64, anchors=64, contrast=64, pixels_per_class=32, regions_per_class=16),
    "WeightMatching": dict(modules="backbone.layer2"),
}
"""Settings of a term for segmentors."""
