"""Students, terms and teachers whose weights are spread over processes: FSDP2, and ZeRO by :mod:`~kdgraft_nlp.zero`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from kdgraft.balance import AutoWeight
from kdgraft.distributed import is_sharded
from kdgraft.engine import Engine
from kdgraft.errors import DistillError
from kdgraft.sources import Cached, Ensemble, Teacher
from kdgraft.terms.adversarial import AdversarialTerm

from .adapters import AdaptersOff
from .class_teachers import ClassTeacher
from .zero import copy_of_away, refuse_deepspeed, zero_stage


def refuse_sharding(trainer: Any) -> None:
    """Refuse sharding other than ZeRO-1 to 3, and FSDP2 with weights on all processes.

    Raises:
        DistillError: the trainer runs under another stage of DeepSpeed or beside its other ways to split a model, FSDP of version 1,
            or FSDP2 that reads weights on one process alone.
    """
    if trainer.is_deepspeed_enabled:
        refuse_deepspeed(trainer.accelerator.state.deepspeed_plugin)
    if not trainer.is_fsdp_enabled:
        return
    plugin = trainer.accelerator.state.fsdp_plugin
    if plugin.fsdp_version != 2:
        raise DistillError("distilling under FSDP needs its second version; set fsdp_version: 2 in accelerate's config")
    if plugin.cpu_ram_efficient_loading:
        raise DistillError(
            "with fsdp_cpu_ram_efficient_loading only the first process has weights, and all need some to wire terms; set it to false"
        )


def splits_weights(trainer: Any) -> str | None:
    """Return what spreads a trainer's weights over processes, ``"FSDP2"`` or ``"ZeRO-3"``; ``None`` where each has them whole."""
    if trainer.is_fsdp_enabled:
        return "FSDP2"
    return "ZeRO-3" if zero_stage(trainer) == 3 else None


def refuse_uneven(by: str | None, on_policy: Any, cache: Any) -> None:
    """Refuse what has processes run their models unequally often, where each pass gathers weights from all of them.

    Args:
        by: what spreads the weights over processes; see :func:`splits_weights`.
        on_policy, cache: the settings of the trainer.

    Raises:
        DistillError: one is given.
    """
    if by and on_policy is not None:
        raise DistillError(
            f"on_policy: processes write texts of different lengths, for which {by} would wait forever; leave it out"
        )
    if by and cache is not None:
        raise DistillError(
            f"the teacher of a cache runs on those processes alone whose samples are new, for which {by} would wait forever; fill a store "
            "before (kdgraft cache), or leave out the cache"
        )


def refuse_sharded(engine: Engine, by: str) -> None:
    """Refuse sources and terms that need whole weights.

    Args:
        engine: the engine.
        by: what spreads the weights over processes; see :func:`splits_weights`.

    Raises:
        DistillError: one does; the message names it.
    """
    for name, source in engine.sources.items():
        if not isinstance(source, (Teacher, Ensemble)):
            raise DistillError(
                f"under {by} teachers teach, and {name!r} is a {type(source).__name__}, whose weights follow the student's; leave it out"
            )
    for term in engine.all_terms:
        taps = (*term.student_taps, *term.teacher_taps)
        reasons = {
            "reads weights": any(tap.parameters for tap in taps),
            "differentiates models": term.takes_gradients,
            "trains a critic": isinstance(term, AdversarialTerm),
            "measures gradients of weights (weight='auto')": isinstance(term.balance, AutoWeight),
        }
        what = next((reason for reason, holds in reasons.items() if holds), None)
        if what is not None:
            raise DistillError(
                f"{term.name} {what}, which {by} spreads over processes; leave it out, or train without {by}"
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
    """Return a tensor that is spread over processes as a whole one; others as they are.

    Gradients flow through it under FSDP2, and under ZeRO-3 to what DeepSpeed has gathered, as it does with what the student reads in
    its own pass; a weight that is away is copied.
    """
    return tensor.full_tensor() if isinstance(tensor, DTensor) else copy_of_away(tensor)
