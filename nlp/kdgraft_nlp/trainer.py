"""``DistillTrainer``, the Trainer with a teacher, and ``distill``, the same for a trainer that you already have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from transformers import Trainer

from kdgraft.errors import DistillError

from .distilling import Distilling
from .on_policy import OnPolicy


class DistillTrainer(Distilling, Trainer):
    """The Trainer with a teacher: it adds the terms' losses to the host's loss.

    Args:
        model, args, …: as for :class:`transformers.Trainer`.
        teacher: a model, a :class:`~kdgraft.Source`, or the folder that ``save_pretrained`` wrote.
        terms: a list of names, dicts or terms.
        recipe: the name of a recipe, or ``dict(type=name, …)``; its terms are put before ``terms``.
        dry_run: one small batch for all models; made from their configs by default.
        chunked: for causal models with a large vocabulary: the host's cross-entropy and the divergences are computed together,
            in chunks of this many tokens (``True``: as many as make four million logits), and neither model's logits are
            stored. Training steps then return no logits. Label smoothing and losses of your own are not supported.
        host_weight: the factor of the host's own loss. Batches without labels have a host loss of 0.
        teachers: several sources by name, instead of ``teacher``; a term's ``source`` names its source. Peers are saved beside
            the student, in ``peers/<name>``.
        init_from: layers of the teacher to initialise the student from, ``[1, 3, 5]``; see
            :func:`~kdgraft_nlp.init_from_teacher`.
        views: for images: makes ``(pixel_values, labels)`` of a training batch into others, such as
            :class:`kdgraft.consistent.Teaching`, whose views may differ by model; with its mixup the batch has no labels.
        on_policy: for causal models: train a share of the steps on texts that the student writes; see
            :class:`~kdgraft_nlp.OnPolicy`.
        weights: for causal models: the column of the training set with a weight for each sample, or a list with one for each of its
            tokens. The host's own loss and the terms on predictions are sums over labelled tokens times their weights, divided by the
            sum of the weights over the accumulated batch and all processes. Evaluation is not weighted.

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
        views: Any = None,
        on_policy: OnPolicy | Mapping[str, Any] | None = None,
        weights: str | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(*args, **settings)
        told = (teacher, terms, recipe, dry_run, chunked, host_weight, teachers, init_from, views, on_policy, weights)
        self.start_distilling(*told)


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
    views: Any = None,
    on_policy: OnPolicy | Mapping[str, Any] | None = None,
    weights: str | None = None,
) -> Any:
    """Add distillation to a trainer that you already have, an instance of Trainer or of a subclass, before ``train()``.

    Args:
        trainer: the trainer, changed in place; its own ``compute_loss`` and callbacks stay active.
        teacher, terms, recipe, dry_run, chunked, host_weight, teachers, init_from, views, on_policy, weights: as for :class:`DistillTrainer`.

    Returns:
        The trainer.
    """
    if not isinstance(trainer, Trainer):
        raise DistillError(f"distill takes a transformers.Trainer, got {type(trainer).__name__}")
    if isinstance(trainer, Distilling):
        raise DistillError("this trainer already distils; build a new one for other terms")
    before: Any = trainer.__class__
    trainer.__class__ = _distilling_class(before)  # type: ignore[arg-type]
    try:
        told = (teacher, terms, recipe, dry_run, chunked, host_weight, teachers, init_from, views, on_policy, weights)
        Distilling.start_distilling(trainer, *told)  # type: ignore[arg-type]
    except BaseException:
        trainer.__class__ = before
        raise
    return trainer
