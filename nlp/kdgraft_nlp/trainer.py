"""``DistillTrainer``: the Trainer, with a teacher; ``distill``: the same for a trainer that you already have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from transformers import Trainer

from kdgraft.errors import DistillError

from .distilling import Distilling


class DistillTrainer(Distilling, Trainer):
    """The Trainer with a teacher: everything that Trainer does, and the terms' losses beside the host's.

    Args:
        model, args, …: as for :class:`transformers.Trainer`.
        teacher: a model, a :class:`~kdgraft.Source`, or the folder that ``save_pretrained`` wrote.
        terms: a list of names, dicts or terms.
        recipe: a recipe's name, or ``dict(type=name, …)``; its terms come before ``terms``.
        dry_run: one small batch that both models take; made from their configs by default.
        chunked: for causal models with a large vocabulary: the host's cross-entropy and the divergences are computed together,
            256 (or that many) tokens at a time, and no model's logits are ever held as a whole. Training steps then return no
            logits. Not with label smoothing or a loss of your own.
        host_weight: what the host's own loss is multiplied by. It is 0 for batches without labels.
        teachers: several sources by name, instead of ``teacher``; a term's ``source`` names the one it listens to. Peers are
            saved beside the student, in ``peers/<name>``.
        init_from: layers of the teacher that the student starts from, ``[1, 3, 5]``; see
            :func:`~kdgraft_nlp.init_from_teacher`.

    Example::

        trainer = DistillTrainer(model=student, teacher=teacher, terms=[SoftTargets(temperature=2), AttentionMaps()], args=args,
                                 train_dataset=data, data_collator=DistillCollator(DataCollatorWithPadding(tokenizer)))
        trainer.train()
        trainer.save_model("student")   # a plain student
    """

    def __init__(
        self,
        *args: Any,
        teacher: Any = None,
        terms: Sequence[Any] | None = None,
        recipe: Any = None,
        dry_run: Mapping[str, Any] | None = None,
        chunked: bool | int = False,
        host_weight: float = 1.0,
        teachers: Mapping[str, Any] | None = None,
        init_from: Any = None,
        **settings: Any,
    ) -> None:
        super().__init__(*args, **settings)
        self.start_distilling(teacher, terms, recipe, dry_run, chunked, host_weight, teachers, init_from)


@cache
def _distilling_class(kind: Any) -> Any:
    return type(f"Distilling{kind.__name__}", (Distilling, kind), {"__module__": kind.__module__})


def distill(
    trainer: Any,
    *,
    teacher: Any = None,
    terms: Sequence[Any] | None = None,
    recipe: Any = None,
    dry_run: Mapping[str, Any] | None = None,
    chunked: bool | int = False,
    host_weight: float = 1.0,
    teachers: Mapping[str, Any] | None = None,
    init_from: Any = None,
) -> Any:
    """Lets a trainer that you already have distil: any Trainer or subclass of it, before ``train()``.

    Args:
        trainer: it is changed and handed back; its own ``compute_loss``, callbacks and so on stay in force.
        teacher, terms, recipe, dry_run, chunked, host_weight, teachers, init_from: as for :class:`DistillTrainer`.
    """
    if not isinstance(trainer, Trainer):
        raise DistillError(f"distill takes a transformers.Trainer, got {type(trainer).__name__}")
    if isinstance(trainer, Distilling):
        raise DistillError("this trainer distils already; build a new one for other terms")
    before: Any = trainer.__class__
    trainer.__class__ = _distilling_class(before)  # type: ignore[arg-type]
    try:
        told = (teacher, terms, recipe, dry_run, chunked, host_weight, teachers, init_from)
        Distilling.start_distilling(trainer, *told)  # type: ignore[arg-type]
    except BaseException:
        trainer.__class__ = before
        raise
    return trainer
