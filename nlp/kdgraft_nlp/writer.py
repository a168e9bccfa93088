"""On-policy distillation: a share of the steps trains on texts that the student writes (GKD), or teacher and student together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from kdgraft.balance import AutoWeight
from kdgraft.distributed import rank, world_size
from kdgraft.engine import Engine
from kdgraft.errors import DistillError
from kdgraft.sources import Cached, Teacher

from .adapters import base_of
from .collator import DistillCollator
from .on_policy import OnPolicy
from .pen import Pen, room_of
from .served import Served
from .tasks import task_of
from .tokens import Written
from .vocabularies import tokenizer_of


class Writer:
    """The writer of a trainer's on-policy batches.

    Args:
        settings: the settings.
        trainer: the trainer.
        model: its student, which is grafted already.

    Raises:
        DistillError: the trainer cannot distil on texts that its student writes; the message says the reason.
    """

    def __init__(self, settings: OnPolicy, trainer: Any, model: Any) -> None:
        self.settings = settings
        self.seed = trainer.args.seed if settings.seed is None else settings.seed
        _check(model, trainer.data_collator, settings.share)
        teacher = _teacher(model.distiller) if settings.mix else None
        models = {"student": base_of(model), **_models(model.distiller)}
        self._check_room(models)
        self._pen = Pen(settings, models, tokenizer_of(trainer), teacher)

    def _check_room(self, models: Mapping[str, Any]) -> None:
        told = self.settings
        for owner, model in models.items():
            room = room_of(model)
            if room is not None and told.prompt + told.max_new_tokens > room:
                raise DistillError(
                    f"on_policy: prompt={told.prompt} and max_new_tokens={told.max_new_tokens} need "
                    f"{told.prompt + told.max_new_tokens} positions, and the {owner} has {room}; lower max_new_tokens"
                )

    def batches(self, model: Any, given: Iterator[Any], step: int) -> Iterator[Any]:
        """Iterate over the parts of a step's batch, which are written by the student where the step is on-policy."""
        chosen = self.settings.chooses(self.seed, step)
        for part, batch in enumerate(given):
            yield self.written(model, batch, step, part) if chosen else batch

    def written(self, model: Any, batch: Mapping[str, Any], step: int, part: int = 0) -> dict[str, Any]:
        """Return the batch of the texts that the student writes for the prompts of a batch.

        Args:
            model: the student, which is not changed.
            batch: the batch of the data set.
            step: the step.
            part: the number of the part in an accumulated batch.

        Raises:
            DistillError: the batch has more than one text in a row, or inputs beside its tokens, or a prompt leaves no room.
        """
        rows = len(batch["input_ids"]) if "input_ids" in batch else 0
        first = (part * world_size() + rank()) * rows
        numbers = [self.settings.numbers(self.seed, step, first + row) for row in range(rows)]
        return self._pen.write(model, batch, numbers)


def written_figures(written: Written | None, parts: int, device: torch.device) -> dict[str, Tensor]:
    """Return the figures of a part of a step for the log: the share of on-policy steps, and of these the time and the length.

    The Trainer adds up the parts of an accumulated batch, of which there are ``parts``.
    """
    found = {"on_policy.fraction": float(written is not None) / parts}
    if written is not None:
        found |= {"on_policy.seconds": written.seconds, "on_policy.length": written.length / parts}
    return {name: torch.tensor(value, device=device) for name, value in found.items()}


def _models(engine: Engine) -> dict[str, Any]:
    return {name: source.model for name, source in engine.sources.items() if getattr(source, "model", None) is not None}


def _teacher(engine: Engine) -> Teacher:
    found = list(engine.sources.values())
    if len(found) != 1 or not isinstance(found[0], Teacher) or isinstance(found[0], Served):
        raise DistillError(
            "on_policy: mix needs one frozen teacher that writes along; leave mix out with other sources, and with a server"
        )
    return found[0]


def _check(model: Any, collator: Any, share: float) -> None:
    """Raise a :class:`DistillError` unless terms can be computed on texts that a grafted student writes."""
    engine, student = model.distiller, base_of(model)
    if task_of(student) != "causal":
        raise DistillError(
            f"on_policy is for causal language models, and {type(student).__name__} is none; leave it out"
        )
    if engine is None:
        raise DistillError("on_policy: nothing is compared on the student's texts; name terms or a recipe")
    if isinstance(collator, DistillCollator) and collator.teacher_tokenizer is not None:
        raise DistillError("on_policy: the teacher must read the student's tokens, and it has a tokenizer of its own")
    auto = [term.name for term in engine.all_terms if isinstance(term.balance, AutoWeight)]
    if auto and share:
        raise DistillError(
            f"on_policy: {auto[0]} has weight='auto', which compares with the host's own loss, and the student's texts have none; set "
            "weight to a number"
        )
    for name, source in engine.sources.items():
        if isinstance(source, Cached) and not isinstance(source, Served):
            raise DistillError("on_policy: a cache knows the texts of the data set alone; leave it out")
        if source.trains:
            raise DistillError(
                f"on_policy: the peer {name!r} trains on labels, and the student's texts have none; use a teacher"
            )
