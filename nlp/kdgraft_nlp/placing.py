"""Teachers with a ``device_map``: they stay on their devices, and inputs and outputs are moved instead."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from accelerate.utils import send_to_device


def inputs_for(model: Any, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
    """Move inputs to a model with a ``device_map``; where it spans several devices, accelerate's hooks move them."""
    if not getattr(model, "hf_device_map", None) or hasattr(model, "_hf_hook"):
        return inputs
    return send_to_device(inputs, next(model.parameters()).device)
