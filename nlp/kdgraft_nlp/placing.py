"""Teachers that a device map has placed: they stay where they are, and what they are given and what they say travels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from accelerate.utils import send_to_device


def inputs_for(model: Any, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
    """The inputs where the model takes them; accelerate's hooks move them for a model that is spread over several devices."""
    if not getattr(model, "hf_device_map", None) or hasattr(model, "_hf_hook"):
        return inputs
    return send_to_device(inputs, next(model.parameters()).device)
