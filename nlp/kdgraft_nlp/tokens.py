"""What terms know of a batch of text: which tokens are real, which logits have a label, which tokens belong together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kdgraft.errors import DistillError
from kdgraft.regions import Batch

from .packing import texts_of

IGNORED = -100
TEACHER_INPUTS = "teacher_inputs"
"""Key of a batch under which :class:`~kdgraft_nlp.DistillCollator` puts what only the teacher is given."""
TOKEN_PAIRS = "token_pairs"
"""Key of a batch: ``(B, P, 2)`` positions of tokens that belong together, in the student's and the teacher's, −1 for none."""

SAMPLE_IDS = "sample_ids"
"""Key of a batch: what tells its samples apart, for cached teacher outputs."""


@dataclass
class Side:
    """The tokens of one model.

    Attributes:
        real: ``(B, L)`` boolean, false for padding; ``None`` where every position counts (images).
        decoder: the same for a decoder's own tokens; ``None`` without a decoder.
        labelled: ``(B, L)`` boolean: positions whose logits have a label (for a causal model the one *before* the labelled
            token); ``None`` without labels.
        texts: ``(B, L)``: of packed rows, which text each token belongs to, numbered through the batch; ``None`` where each row
            is one text.
    """

    real: Tensor | None
    decoder: Tensor | None = None
    labelled: Tensor | None = None
    texts: Tensor | None = None

    def of(self, stack: str) -> Tensor | None:
        """The real tokens that a stack's hidden states stand for."""
        return self.decoder if stack in ("decoder", "cross") else self.real

    def texts_of(self, stack: str) -> Tensor | None:
        """The texts that a stack's hidden states belong to; see :attr:`texts`."""
        return None if stack in ("decoder", "cross") else self.texts


@dataclass
class Tokens:
    """The tokens of both models in one batch.

    Attributes:
        size: number of samples.
        student, teacher: each model's side.
        pairs: ``(B, P, 2)`` positions that belong together where the two are tokenised differently; ``None`` where position i is
            the same token for both.
    """

    size: int
    student: Side
    teacher: Side
    pairs: Tensor | None = None


def tokens_of(batch: Batch) -> Tokens:
    """The :class:`Tokens` that the host put into the batch."""
    return batch.extra["tokens"]


def read_batch(inputs: Mapping[str, Any], task: str) -> Batch:
    """A :class:`~kdgraft.regions.Batch` from what a collator made."""
    own = {name: value for name, value in inputs.items() if name not in (TEACHER_INPUTS, TOKEN_PAIRS, SAMPLE_IDS)}
    tensors = [value for value in own.values() if isinstance(value, Tensor) and value.ndim]
    if not tensors:
        raise DistillError("the batch holds no tensors; the collator has to return a dict of them")
    given, pairs = inputs.get(TEACHER_INPUTS, {}), inputs.get(TOKEN_PAIRS)
    student = _side(own, task)
    if given.get("input_ids") is not None:  # other tokens: nothing that the student's say holds of them
        teacher = _side(given, task)
        if teacher.labelled is None and pairs is not None and teacher.real is not None:
            teacher.labelled = carried_over(student.labelled, pairs, teacher.real)
    else:
        teacher = _side({**own, **given}, task)
    if pairs is not None and student.texts is not None:
        raise DistillError("packed rows cannot be aligned across two tokenizers; leave packing out of the collator")
    return Batch(labels=own.get("labels"), extra={"tokens": Tokens(len(tensors[0]), student, teacher, pairs)})


def carried_over(labelled: Tensor | None, pairs: Tensor, real: Tensor) -> Tensor | None:
    """Which of the teacher's tokens are labelled, told from the student's: each as the last paired one up to it.

    Args:
        labelled: ``(B, L)`` of the student.
        pairs: ``(B, P, 2)``.
        real: ``(B, L_t)``: the teacher's tokens that are not padding.
    """
    if labelled is None:
        return None
    if not pairs.shape[1]:
        return torch.zeros_like(real)
    known = pairs[..., 1] >= 0
    number = torch.arange(1, pairs.shape[1] + 1, device=pairs.device).expand_as(known) * known
    place = torch.zeros_like(real, dtype=torch.long).scatter_reduce(1, pairs[..., 1].clamp(min=0), number, "amax")
    last = place.cummax(1).values
    found = take(labelled, pairs[..., 0]).gather(1, (last - 1).clamp(min=0))
    return found & (last > 0) & real


def _side(inputs: Mapping[str, Any], task: str) -> Side:
    ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
    real = mask.bool() if mask is not None else torch.ones_like(ids, dtype=torch.bool) if ids is not None else None
    if real is not None and real.ndim != 2:
        raise DistillError(f"attention_mask must be (B, L), got {tuple(real.shape)}")
    labels, texts = inputs.get("labels"), texts_of(inputs)
    labelled = decoder = None
    if isinstance(labels, Tensor) and labels.ndim == 2 and not labels.is_floating_point():
        labelled = labels != IGNORED
        if task == "seq2seq":
            decoder = labelled
        elif task == "causal":
            labelled = torch.cat([labelled[:, 1:], torch.zeros_like(labelled[:, :1])], 1)
            if texts is not None:  # the last token of a text does not predict the next text
                labelled[:, :-1] &= texts[:, 1:] == texts[:, :-1]
    if "decoder_attention_mask" in inputs:
        decoder = inputs["decoder_attention_mask"].bool()
    return Side(real, decoder, labelled, texts)


def take(values: Tensor, positions: Tensor, dim: int = 1) -> Tensor:
    """``values`` at ``positions (B, P)`` along a dimension; −1 takes position 0 (to be masked by who asks)."""
    index = positions.clamp(min=0)
    shape = [1] * values.ndim
    shape[0], shape[dim] = index.shape
    expanded = list(values.shape)
    expanded[dim] = index.shape[1]
    return values.gather(dim, index.view(shape).expand(expanded))
