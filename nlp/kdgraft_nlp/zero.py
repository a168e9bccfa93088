"""DeepSpeed's ZeRO: optimizers in parts on all processes (stages 1 and 2), and weights in parts too (stage 3)."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from kdgraft.distributed import is_partitioned
from kdgraft.engine import Engine
from kdgraft.errors import DistillError
from kdgraft.sources import Cached, Teacher

from .adapters import AdaptersOff

WEIGHTS = 3
"""The stage from which on weights are in parts."""


def zero_stage(trainer: Any) -> int:
    """Return the stage of ZeRO under which a trainer runs; 0 without DeepSpeed."""
    return int(trainer.accelerator.state.deepspeed_plugin.zero_stage) if trainer.is_deepspeed_enabled else 0


def refuse_deepspeed(plugin: Any) -> None:
    """Refuse the ways of DeepSpeed to split a model or its inputs other than ZeRO.

    Raises:
        DistillError: there is one; the message names it.
    """
    told = plugin.deepspeed_config
    if int(plugin.zero_stage) not in (1, 2, 3):
        raise DistillError(
            f"distilling under DeepSpeed needs ZeRO stage 1, 2 or 3, got {plugin.zero_stage}; set zero_stage"
        )
    parts = {
        "tensor_parallel": (told.get("tensor_parallel") or {}).get("autotp_size"),
        "sequence_parallel_size": told.get("sequence_parallel_size"),
    }
    for name, size in parts.items():
        if int(size or 1) > 1:
            raise DistillError(
                f"DeepSpeed's {name} gives each process a part of a model or of a text, where terms need whole ones; leave it out"
            )


def is_away(parameter: Any) -> bool:
    """Return whether this process has no more than its part of a parameter at present."""
    return is_partitioned(parameter) and parameter.ds_status.name == "NOT_AVAILABLE"


def copy_of_away(tensor: Any) -> Any:
    """Return a whole copy of a parameter that is away, without gradient; other tensors as they are. All processes must call this."""
    if not is_away(tensor):
        return tensor
    with whole_while([tensor]):
        return tensor.detach().clone()


@contextmanager
def whole_while(parameters: Iterable[Any], *, change: bool = False) -> Iterator[None]:
    """Gather parameters while the body runs, on all processes together.

    Args:
        parameters: parameters; those that are not in parts stay as they are.
        change: the body changes them, on all processes alike.
    """
    found = [parameter for parameter in parameters if is_partitioned(parameter)]
    if not found:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(found, modifier_rank=0 if change else None):
        yield


@contextmanager
def runs_in_parts(models: Iterable[nn.Module]) -> Iterator[None]:
    """Have models run that ``from_pretrained`` loaded in parts, before DeepSpeed wraps them: each module gathers its own weights.

    All processes must run the same modules in the body. Models with whole weights run as they are.
    """
    gathered: dict[int, list[Any]] = {}

    def before(module: nn.Module, *_: Any) -> None:
        mine: list[Any] = [parameter for parameter in module.parameters(recurse=False) if is_away(parameter)]
        if mine:
            mine[0].all_gather(param_list=mine)
            gathered[id(module)] = mine

    def after(module: nn.Module, *_: Any) -> None:
        mine = gathered.pop(id(module), None)
        if mine:
            mine[0].partition(param_list=mine)

    hooks = []
    for module in {module for model in models for module in model.modules()}:
        if any(is_partitioned(parameter) for parameter in module.parameters(recurse=False)):
            hooks.append(module.register_forward_pre_hook(before))
            hooks.append(module.register_forward_hook(after, always_call=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for mine in gathered.values():  # of modules in which a recording ended the pass
            mine[0].partition(param_list=mine)


def prepare_teachers(engine: Engine, plugin: Any) -> None:
    """Give teachers the precision of the training, and under ZeRO-3 spread their weights over all processes.

    Stored and quantised teachers, and a student's own base, stay as they are.

    Args:
        engine: the engine.
        plugin: accelerate's plugin, whose settings are those of the student.
    """
    for source in engine.sources.values():
        if not isinstance(source, Teacher) or isinstance(source, (Cached, AdaptersOff)) or source.placed:
            continue
        if source.prepared is not None:
            continue
        source.prepared = (
            _inference_engine(source.model, plugin)
            if int(plugin.zero_stage) == WEIGHTS
            else _cast(source.model, plugin)
        )


def _inference_engine(model: nn.Module, plugin: Any) -> Any:
    """Return DeepSpeed's engine of a frozen model, whose modules gather their weights as they run."""
    import deepspeed

    told = copy.deepcopy(plugin.deepspeed_config)
    for name in ("optimizer", "scheduler"):
        told.pop(name, None)
    told["zero_optimization"].pop("offload_optimizer", None)
    found, *_ = deepspeed.initialize(model=model, config=told)
    found.eval()
    return found


def _cast(model: nn.Module, plugin: Any) -> torch.dtype:
    """Convert a model's weights, not its buffers, to the precision of the training, as DeepSpeed does with the student's."""
    told = plugin.deepspeed_config
    names = {"bf16": torch.bfloat16, "fp16": torch.float16}
    dtype = next((dtype for name, dtype in names.items() if told.get(name, {}).get("enabled") is True), torch.float32)
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    return dtype


def without_distiller(model: nn.Module, state: dict[str, Tensor] | None) -> dict[str, Tensor] | None:
    """Return the weights that DeepSpeed gathered of a model without those of its distiller, which its own way to read them skips not."""
    if state is None:
        return None
    inside = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, Engine))
    return {name: value for name, value in state.items() if not name.startswith(inside)} if inside else state
