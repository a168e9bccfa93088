"""FSDP2: students, terms and teachers whose weights are spread over processes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from kdgraft.distributed import is_sharded
from kdgraft.engine import Engine
from kdgraft.errors import DistillError
from kdgraft.sources import Cached, Ensemble, Teacher
from kdgraft.terms.adversarial import AdversarialTerm

from .adapters import AdaptersOff
from .class_teachers import ClassTeacher


def refuse_sharding(trainer: Any) -> None:
    """Refuse sharding other than FSDP2 with weights on all processes.

    Raises:
        DistillError: the trainer runs under DeepSpeed, FSDP of version 1, or FSDP2 that reads weights on one process alone.
    """
    if trainer.is_deepspeed_enabled:
        raise DistillError(
            "distilling under DeepSpeed is not supported; use FSDP2 (fsdp_version: 2) or several processes (DDP)"
        )
    if not trainer.is_fsdp_enabled:
        return
    plugin = trainer.accelerator.state.fsdp_plugin
    if plugin.fsdp_version != 2:
        raise DistillError("distilling under FSDP needs its second version; set fsdp_version: 2 in accelerate's config")
    if plugin.cpu_ram_efficient_loading:
        raise DistillError(
            "with fsdp_cpu_ram_efficient_loading only the first process has weights, and all need some to wire terms; set it to false"
        )


def refuse_sharded(engine: Engine) -> None:
    """Refuse sources and terms that need whole weights, which FSDP2 spreads over processes.

    Raises:
        DistillError: one does; the message names it.
    """
    for name, source in engine.sources.items():
        if not isinstance(source, (Teacher, Ensemble)):
            raise DistillError(
                f"under FSDP2 teachers teach, and {name!r} is a {type(source).__name__}, whose weights follow the student's; leave it out"
            )
    for term in engine.all_terms:
        taps = (*term.student_taps, *term.teacher_taps)
        if any(tap.parameters for tap in taps) or term.takes_gradients or isinstance(term, AdversarialTerm):
            what = (
                "reads weights"
                if any(tap.parameters for tap in taps)
                else "differentiates models"
                if term.takes_gradients
                else "trains a critic"
            )
            raise DistillError(
                f"{term.name} {what}, which FSDP2 spreads over processes; leave it out, or train without FSDP"
            )


def shard_teachers(engine: Engine) -> None:
    """Spread the weights of teachers over all processes, layer by layer, as the student's are.

    Stored and quantised teachers, those that are no classifiers, and a student's own base, stay as they are.
    """
    from torch.distributed.fsdp import fully_shard

    for source in engine.sources.values():
        if not isinstance(source, Teacher) or isinstance(source, (Cached, AdaptersOff, ClassTeacher)) or source.placed:
            continue
        model: Any = source.model
        if is_sharded(model):
            continue
        kinds = set(getattr(model, "_no_split_modules", None) or ())
        for module in list(model.modules()):
            if type(module).__name__ in kinds:
                fully_shard(module, reshard_after_forward=True)
        fully_shard(model, reshard_after_forward=True)  # the outermost part too, which no backward pass would free


def gathered(state: Any) -> Any:
    """Return a state with whole tensors in the place of those that are spread over processes, which must all call this."""
    if isinstance(state, DTensor):
        return state.full_tensor().detach().cpu()
    if isinstance(state, Mapping):
        return {key: gathered(value) for key, value in state.items()}
    return state


def spread(state: Mapping[str, Tensor], like: nn.Module) -> dict[str, Tensor]:
    """Return a state of whole tensors, spread as those of a module are."""
    own = like.state_dict()
    return {
        key: distribute_tensor(value.to(own[key].device), own[key].device_mesh, own[key].placements)
        if isinstance(own.get(key), DTensor)
        else value
        for key, value in state.items()
    }


def whole(tensor: Any) -> Any:
    """Return a tensor that is spread over processes as a whole one, through which gradients flow; others as they are."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
