"""The model under wrappers, and a student's base model without PEFT's adapters, which teaches the student in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from torch import Tensor, nn
from transformers.utils import is_peft_available

from kdgraft.errors import DistillError, WiringError
from kdgraft.isolation import eval_mode
from kdgraft.recorder import Recorder
from kdgraft.sources import Source, Teacher
from kdgraft.taps import Recording

from .checks import one_line

BASE = "base"
"""The name of the teacher that is the student's own model without its adapters."""


def base_of(model: Any) -> Any:
    """Return transformers' model under wrappers, with its adapters: those of PEFT and of sentence-transformers; others are returned as they are.

    Raises:
        WiringError: adapters act in the wrapper's own forward, which the base model's does not include; or there is no such model.
    """
    if type(model).__module__.startswith("sentence_transformers."):
        return base_of(_transformer_in(model))
    if not is_peft_available():
        return model
    from peft import PeftMixedModel, PeftModel

    if not isinstance(model, (PeftModel, PeftMixedModel)):
        return model
    for config in model.peft_config.values():
        kind = getattr(config.peft_type, "value", config.peft_type)
        if config.is_prompt_learning or kind in ("XLORA", "POLY") or getattr(config, "alora_invocation_tokens", None):
            raise WiringError(
                f"{type(model).__name__}: adapters of kind {kind} act outside layers; use adapters in layers (LoRA), or distil the base model"
            )
    return model.base_model.model


def _transformer_in(model: Any) -> Any:
    """Return the transformer that the first module of a model of sentence-transformers holds."""
    first = next(iter(model.children()), None)
    found = getattr(first, "auto_model", None)
    if not isinstance(found, nn.Module):
        raise WiringError(
            f"the first module of this {type(model).__name__} is a {type(first).__name__}, which holds no transformer to distil"
        )
    return found


KINDS = {"sequence": "SEQ_CLS", "tokens": "TOKEN_CLS", "causal": "CAUSAL_LM"}
"""PEFT's names of tasks, by which the heads of classifiers are trained as a whole."""


def adapted(model: Any, settings: Mapping[str, Any] | None, task: str) -> Any:
    """Return a model with new adapters, or the model itself without settings.

    Args:
        model: the model.
        settings: the arguments of PEFT's ``LoraConfig``, or of another of its configs, which ``type`` names.
        task: the task of the model.

    Raises:
        DistillError: PEFT is not installed, or the settings have a mistake.
    """
    if settings is None:
        return model
    if not is_peft_available():
        raise DistillError('adapters need peft, which is not installed; pip install "kdgraft[llm]"')
    import peft

    told = dict(settings)
    kind = str(told.pop("type", "LoraConfig"))
    make = getattr(peft, kind, None)
    if not (isinstance(make, type) and issubclass(make, peft.PeftConfig)):
        raise DistillError(
            f"adapters: peft has no config {kind!r}; leave out type for LoRA, or name another, such as LoHaConfig"
        )
    if task in KINDS:
        told.setdefault("task_type", KINDS[task])
    with one_line("adapters"):
        return peft.get_peft_model(model, make(**told))


def adapter_layers(model: nn.Module) -> list[Any]:
    """Return the layers of adapters, and the modules that are trained as a whole beside them (``modules_to_save``)."""
    if not is_peft_available():
        return []
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    return [module for module in model.modules() if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))]


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Compute with the base weights alone while the body runs.

    PEFT's own way also changes which parameters are trained, and changes them back to its own rule.
    """
    layers = [layer for layer in adapter_layers(model) if not layer.disable_adapters]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def plain_layer(layer: Any, *, adapted: bool) -> Any:
    """Return the layer that stands under PEFT's wrapper of one that is trained as a whole, or its original.

    Args:
        layer: a layer of a model.
        adapted: take what the student trains; false for the original.
    """
    if layer not in adapter_layers(layer):
        return layer
    if hasattr(layer, "modules_to_save"):
        return layer.modules_to_save[layer.active_adapters[0]] if adapted else layer.original_module
    return layer if adapted else layer.get_base_layer()


class AdaptersOff(Teacher):
    """The student's own model with its adapters off, in eval mode: a teacher without a second copy.

    It is what ``teacher="base"`` stands for.

    Args:
        model: the student under PEFT's wrapper.

    Raises:
        DistillError: it has no adapters, they are merged into its weights, or its base weights are trained too.
    """

    def __init__(self, model: nn.Module) -> None:
        Source.__init__(self)
        layers, name = adapter_layers(model), type(model).__name__
        if not layers:
            raise DistillError(
                f"teacher='base' is the student's model without its adapters, and {name} has none; add some with peft.get_peft_model"
            )
        if any(getattr(layer, "merged", False) for layer in layers):
            raise DistillError("teacher='base': the adapters are merged into the weights; call unmerge_adapter() first")
        own = {id(parameter) for layer in layers for parameter in _added(layer)}
        trained = [key for key, value in model.named_parameters() if value.requires_grad and id(value) not in own]
        if trained:
            raise DistillError(
                f"teacher='base': weights of the base model are trained as well ({', '.join(trained[:3])}), so that it would not stay "
                "as it is; freeze them, or give a copy as the teacher"
            )
        self.model, self.checkpoint, self.loaded = model, None, True
        self.meta: dict[str, Any] = {}

    placed = True  # type: ignore[assignment]  # it moves with the student

    def ensure_eval(self) -> None:
        """Do nothing: :meth:`context` puts the model in eval mode while it teaches."""

    def context(self, device_type: str) -> AbstractContextManager[Any]:
        """Return the context in which its forward pass runs: without adapters, in eval mode."""
        return _as_teacher(self.model)

    def rehearse(self, recorder: Recorder, run: Callable[[], Any]) -> Recording:
        with self.context("cpu"):
            return recorder.rehearse(self.model, run)


@contextmanager
def _as_teacher(model: nn.Module) -> Iterator[None]:
    # In eval mode on a CPU, bitsandbytes packs the weights of its layers for inference, for good: they give no gradient afterwards.
    packing = [module for module in model.modules() if type(module).__module__.startswith("bitsandbytes.")]
    with eval_mode(model), adapters_off(model):
        for module in packing:
            module.training = True
        yield


def _added(layer: Any) -> Iterator[Tensor]:
    """Yield the parameters that a layer of adapters adds to the base model."""
    for name in layer.adapter_layer_names:
        part = getattr(layer, name, None)
        if isinstance(part, nn.Module):
            yield from part.parameters()
