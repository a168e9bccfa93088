"""Settings and small detectors for every term that detectors can use."""

from __future__ import annotations

from typing import Any

from support.det import detector
from support.det_stages import detr, staged

SETTINGS: dict[str, dict[str, Any]] = {"CRD": dict(tap="neck[0]"), "WeightMatching": dict(modules="neck")}
"""Settings of a term for detectors."""
_SOFTMAX = (
    "DKD",
    "NKD",
    "CWTM",
    "DKPP",
    "DIST",
    "ForwardKL",
    "ReverseKL",
    "GeneralizedJSD",
    "SkewedKL",
    "AdversarialScores",
)
MODELS: dict[str, str] = {**dict.fromkeys(_SOFTMAX, "Faster R-CNN"), "KDDETR": "DeformableDETR"}
"""A term's detector, where it is not GFL: ``"Faster R-CNN"`` or the name of a DETR-type model."""


def model(kind: str, **sizes: int) -> dict[str, Any]:
    name = MODELS.get(kind, "GFL")
    if name == "GFL":
        return detector(frozen_bn=True, **sizes)
    return staged(name, **sizes) if name == "Faster R-CNN" else detr(name, **sizes)
