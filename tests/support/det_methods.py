"""The terms of detection, with the small models and the settings with which each of them trains."""

from __future__ import annotations

from typing import Any

from kdgraft_det import TERMS
from kdgraft_det.reader import DetReader
from support.det import detector
from support.det_stages import STAGED, detr, staged
from support.methods import own_terms, split

OWN = own_terms(TERMS)
USABLE, LACKING = split(TERMS, DetReader)
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
MODELS: dict[str, str] = {
    **dict.fromkeys(_SOFTMAX, "Faster R-CNN"),
    "InstanceMasks": "Mask R-CNN",
    "KDDETR": "DeformableDETR",
}
"""A term's detector, where it is not GFL: one of ``STAGED`` or the name of a DETR-type model."""


def model(kind: str, **sizes: int) -> dict[str, Any]:
    name = MODELS.get(kind, "GFL")
    if name == "GFL":
        return detector(frozen_bn=True, **sizes)
    return staged(name, **sizes) if name in STAGED else detr(name, **sizes)
