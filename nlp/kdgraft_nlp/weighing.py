"""Weights of samples and of tokens, for a causal model's own loss and for terms on its predictions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kdgraft.distributed import sum_over_ranks
from kdgraft.engine import Engine
from kdgraft.errors import DistillError
from kdgraft.terms import ScoreTerm

from .heads import router_loss
from .tokens import IGNORED, Tokens

SMALLEST = 1e-12
"""A sum of weights below it counts as this much, so that a batch without weight has the loss 0."""


def check_weights(task: str, data: Mapping[str, Any]) -> None:
    """Raise a :class:`DistillError` where a recipe's ``data.weights`` means nothing beside its other entries."""
    if data.get("weights") is None:
        return
    if task != "causal":
        raise DistillError(f"data.weights is for language models (task: causal); leave it out for task {task}")
    apart = data.get("joined") is False or any(data.get(name) is not None for name in ("prompt", "messages"))
    if data.get("packed") or not apart:
        raise DistillError(
            "data.weights are those of texts that stay apart; add data.joined: false, and leave out data.packed"
        )


def check_weights_of(data: Mapping[str, Any], found: Any) -> None:
    """Raise a :class:`DistillError` where a recipe's training set lacks the column that ``data.weights`` names."""
    if data.get("weights") is not None and data["weights"] not in found.column_names:
        raise DistillError(
            f"the training set has no column {data['weights']!r} but {', '.join(found.column_names)}; name it with data.weights"
        )


def weights_in(features: Sequence[Mapping[str, Any]], column: str, batch: Mapping[str, Any]) -> Tensor:
    """Return the weights ``(B, L)`` of a padded batch's tokens, 0 for padding.

    Args:
        features: the samples; ``column`` has one weight for each, or a list with one for each of its tokens.
        column: the name of the column.
        batch: the batch that the collator made of them.

    Raises:
        DistillError: a sample's weights do not fit its tokens, or are no finite numbers >= 0.
    """
    if "input_ids" not in batch:
        raise DistillError("weights are those of texts, and the batch has no input_ids; leave out weights")
    mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    found = torch.zeros(mask.shape)
    for row, feature in enumerate(features):
        own = torch.as_tensor(feature[column], dtype=torch.float32)
        if own.ndim > 1 or (own.ndim == 1 and len(own) != int(mask[row].sum())):
            raise DistillError(
                f"column {column!r} has {len(own)} weights for {int(mask[row].sum())} tokens; give one for each token, or one for the sample"
            )
        if not (own.isfinite() & (own >= 0)).all():
            raise DistillError(f"column {column!r}: weights must be finite numbers >= 0")
        found[row][mask[row]] = own
    return found


def sum_of_weights(parts: Sequence[Tokens], device: torch.device, everywhere: bool) -> Tensor:
    """Return the divisor of the host's own loss: the sum of the weights of the labelled tokens in the parts of a batch.

    Args:
        parts: the tokens of each part.
        device: the device of the result.
        everywhere: add the sums of all processes.
    """
    sums = [one.amount(one.student.labelled).to(device) for one in parts if one.student.labelled is not None]
    found = torch.stack(sums).sum() if sums else torch.zeros((), device=device)
    return (sum_over_ranks(found) if everywhere else found).clamp(min=SMALLEST)


def weighted_loss(student: Any, output: Mapping[str, Any], targets: Tensor, weights: Tensor, items: Any) -> Tensor:
    """Return a causal model's own loss with a weight for each token.

    Args:
        student: the model.
        output: its output, with logits ``(B, L, V)`` and its unweighted loss.
        targets: ``(B, L)``: the token that each position predicts, −100 for none.
        weights: ``(B, L)``: their weights.
        items: the divisor of the sum over tokens; ``None`` for the sum of their weights.

    Raises:
        DistillError: the model's own loss is not the cross-entropy of the next token.
    """
    logits = output["logits"].float()
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none")
    counted, router = targets.flatten() != IGNORED, router_loss(student, output)
    more = torch.zeros((), device=losses.device) if router is None else router.to(losses)
    plain = losses.sum() / (counted.sum().clamp(min=1) if items is None else items) + more
    if not torch.allclose(plain.detach(), output["loss"].detach().float(), rtol=1e-3, atol=1e-5) and counted.any():
        raise DistillError(
            f"weights weigh the cross-entropy of the next token, and {type(student).__name__} has another loss; leave out weights"
        )
    given = weights.flatten().to(losses)
    return (losses * given).sum() / (items if items is not None else (given * counted).sum().clamp(min=SMALLEST)) + more


def refuse_weights(engine: Engine, task: str, fused: bool, own_loss: bool, on_policy: Any) -> None:
    """Refuse weights where they cannot be honoured.

    Raises:
        DistillError: a source, a term or the host cannot take them; the message names it.
    """
    if task != "causal":
        raise DistillError(
            f"weights are for causal language models, and the student's task is {task}; leave out weights"
        )
    if fused or own_loss:
        raise DistillError(
            "weights weigh the model's own loss, and this trainer computes another (SFTTrainer, label smoothing, a loss of your own); use a "
            "DistillTrainer, or leave out weights"
        )
    if on_policy is not None:
        raise DistillError("on_policy: texts that the student writes have no weights; leave out one of the two")
    for name, source in engine.sources.items():
        if source.trains:
            raise DistillError(
                f"{name!r} trains on a loss of its own, which has no weights; leave out weights, or the peer"
            )
    for term in engine.all_terms:
        if not isinstance(term, ScoreTerm) or not term.in_chunks:
            raise DistillError(
                f"{term.name} does not compare predictions token by token, so that weights of tokens mean nothing to it; leave out one of the two"
            )
