"""What a Hugging Face model is for, and one small input that it takes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.auto import modeling_auto as auto
from transformers.utils import is_peft_available

from kdgraft.errors import DistillError, WiringError

_MAPPINGS: dict[str, Any] = {
    "sequence": auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "tokens": auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    "question": auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
    "seq2seq": auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    "masked": auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    "causal": auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "image": auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
}
AUTO_CLASSES = {
    "sequence": auto.AutoModelForSequenceClassification,
    "tokens": auto.AutoModelForTokenClassification,
    "question": auto.AutoModelForQuestionAnswering,
    "seq2seq": auto.AutoModelForSeq2SeqLM,
    "masked": auto.AutoModelForMaskedLM,
    "causal": auto.AutoModelForCausalLM,
    "image": auto.AutoModelForImageClassification,
}
LANGUAGE_MODELS = ("masked", "causal", "seq2seq")


def task_of(model: nn.Module) -> str:
    """``sequence``, ``tokens``, ``question``, ``masked``, ``causal``, ``seq2seq``, ``image``, or ``other``."""
    names = {base.__name__ for base in type(model).__mro__}
    for task, mapping in _MAPPINGS.items():
        known: set[str] = set()
        for value in mapping.values():
            known.update([value] if isinstance(value, str) else value)
        if names & known:
            return task
    return "other"


def base_of(model: Any) -> Any:
    """The model under a wrapper of PEFT, its adapters in their places; any other model itself.

    Raises:
        WiringError: adapters that do something in the wrapper's own pass, which the base model's does not have.
    """
    if not is_peft_available():
        return model
    from peft import PeftMixedModel, PeftModel

    if not isinstance(model, (PeftModel, PeftMixedModel)):
        return model
    for config in model.peft_config.values():
        kind = getattr(config.peft_type, "value", config.peft_type)
        if config.is_prompt_learning or kind in ("XLORA", "POLY") or getattr(config, "alora_invocation_tokens", None):
            raise WiringError(
                f"{type(model).__name__}: adapters of kind {kind} put more into a pass than layers (prompts, routes), which terms do "
                "not know of; take adapters that sit in layers (LoRA and the like), or distil the base model"
            )
    return model.base_model.model


def accepted(model: nn.Module) -> set[str]:
    """Names of the arguments that the model's forward takes."""
    return set(inspect.signature(model.forward).parameters)


def by_name(forward: Callable[..., Any], args: Sequence[Any], inputs: Mapping[str, Any]) -> dict[str, Any]:
    """All arguments of a call by their names.

    Args:
        forward: a method; ``args`` are what comes after ``self``.
        args, inputs: the arguments by position and by name; names that ``forward`` does not know stay.

    Raises:
        TypeError: as Python says it, of arguments too many or given twice.
    """
    if not args:
        return dict(inputs)
    (_, *found), values = inspect.signature(forward).bind_partial(None, *args).arguments.items(), dict(inputs)
    for name, value in found:
        if name in values:
            raise TypeError(f"{forward.__qualname__}() got multiple values for argument {name!r}")
        values[name] = value
    return values


def example(model: Any, device: torch.device | None = None) -> dict[str, Tensor]:
    """A small input of two samples, made from the config alone: token ids, or an image of the configured size.

    Args:
        device: where it lies; with the model's parameters by default.

    Raises:
        DistillError: the model takes neither.
    """
    config, takes = model.config, accepted(model)
    device = device if device is not None else next(model.parameters()).device
    if "input_ids" in takes:
        size, end = _vocabulary(model), getattr(config, "eos_token_id", None)
        end = end if isinstance(end, int) and end < size else None
        words = [i for i in range(min(size, 9)) if i not in (end, getattr(config, "pad_token_id", None))] or [0]
        # Classifiers of causal models refuse several rows without a pad token.
        rows = 1 if task_of(model) == "sequence" and getattr(config, "pad_token_id", None) is None else 2
        ids = torch.tensor(
            [[words[(5 * row + 3 * i) % len(words)] for i in range(5)] for row in range(rows)], device=device
        )
        if end is not None:
            ids[:, -1] = end  # some take what stands at the end of the text
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if getattr(config, "is_encoder_decoder", False):
            inputs["decoder_input_ids"] = ids
        return {name: value for name, value in inputs.items() if name in takes}
    if "pixel_values" in takes:
        side = getattr(config, "image_size", None) or 224
        height, width = (side,) * 2 if isinstance(side, int) else side
        return {"pixel_values": torch.zeros(2, getattr(config, "num_channels", 3), height, width, device=device)}
    raise DistillError(
        f"{type(model).__name__} takes neither input_ids nor pixel_values; give dry_run=dict(…), one small batch"
    )


def _vocabulary(model: nn.Module) -> int:
    embeddings = getattr(model, "get_input_embeddings", lambda: None)()
    return int(embeddings.num_embeddings) if isinstance(embeddings, nn.Embedding) else 8
