"""Packed rows: several texts in one row, without padding between them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kdgraft.errors import DistillError
from kdgraft.isolation import eval_mode

FOR_KERNELS = frozenset({"seq_idx", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"})


def marks_taken_by(model: nn.Module) -> frozenset[str]:
    """Return the inputs on packed rows that a model passes to its kernels: a forward takes them in its ``**kwargs``."""
    parameters = inspect.signature(model.forward).parameters.values()
    return FOR_KERNELS if any(p.kind is p.VAR_KEYWORD for p in parameters) else frozenset()


@torch.no_grad()
def check_apart(model: Any, owner: str) -> None:
    """Refuse a language model that reads across the texts of a packed row; two short ones show whether it does.

    Args:
        model: the model, grafted or plain.
        owner: its role, for the message.

    Raises:
        DistillError: it does.
    """
    words = model.get_input_embeddings().num_embeddings
    ids = torch.arange(8, device=next(model.parameters()).device)[None] % max(words - 1, 1) + min(1, words - 1)
    places = torch.arange(4, device=ids.device).repeat(2)[None]
    takes = inspect.signature(model.forward).parameters
    run = getattr(model, "plain_forward", model)

    def logits(part: slice) -> Tensor:
        given = {"input_ids": ids[:, part], "position_ids": places[:, part], "use_cache": False}
        found: Tensor = run(**{name: value for name, value in given.items() if name in takes})["logits"]
        return found.float()

    with eval_mode(model):
        row, alone = logits(slice(None)), torch.cat([logits(slice(4)), logits(slice(4, None))], 1)
    if not torch.allclose(row, alone, rtol=1e-3, atol=1e-3 * float(alone.abs().max())):
        raise DistillError(
            f"the {owner}, a {type(model).__name__}, reads across the texts of a packed row; pad the texts, without data.packed"
        )


def texts_of(inputs: Mapping[str, Any]) -> Tensor | None:
    """Number the texts of packed rows through the batch.

    Packed rows are recognised by their collators' inputs: ``seq_idx``, ``cu_seq_lens_q``, or ``position_ids`` that restart in
    a batch without ``attention_mask``, which is transformers' own rule.

    Args:
        inputs: a batch as a collator made it.

    Returns:
        ``(B, L)``: the number of each token's text, ascending from 0; ``None`` where each row is one text.
    """
    ids = inputs.get("input_ids")
    if not isinstance(ids, Tensor) or ids.ndim != 2:
        return None
    joined = _joined(inputs, ids)
    if joined is None or bool(joined.all()):
        return None
    first = torch.zeros_like(joined[:, :1])  # each row starts a text
    starts = ~torch.cat([first, joined], 1)
    return (starts.flatten().cumsum(0) - 1).view_as(ids)


def _joined(inputs: Mapping[str, Any], ids: Tensor) -> Tensor | None:
    """Return, ``(B, L - 1)``, whether each token continues the text of the token before it; ``None`` where it is unknown."""
    numbers, lengths, positions = (inputs.get(name) for name in ("seq_idx", "cu_seq_lens_q", "position_ids"))
    if isinstance(numbers, Tensor):
        return (numbers[:, 1:] == numbers[:, :-1]).expand(len(ids), -1)
    if isinstance(lengths, Tensor):
        place = torch.arange(ids.numel(), device=ids.device)
        numbers = torch.bucketize(place, lengths[1:].to(place), right=True).view_as(ids)
        return numbers[:, 1:] == numbers[:, :-1]
    if not isinstance(positions, Tensor) or inputs.get("attention_mask") is not None:
        return None
    if positions.ndim == 3 and len(positions) == 4:  # positions of the text, then three of images
        positions = positions[0]
    if positions.ndim != 2 or positions.shape[1] != ids.shape[1]:
        return None
    return (positions.diff(dim=1) == 1).expand(len(ids), -1)


def per_text(values: Tensor, texts: Tensor | None) -> Tensor:
    """Sum ``(B, L)`` over the tokens of each text: ``(B,)``, or as many values as packed rows hold texts."""
    if texts is None:
        return values.sum(1)
    sums = values.new_zeros(int(texts[-1, -1]) + 1)
    return sums.index_add(0, texts.flatten(), values.flatten())
