"""What terms know of a batch of text: which tokens are real, which logits have a label, which tokens belong together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kdgraft.errors import DistillError
from kdgraft.regions import Batch

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
        unknown: a decoder's tokens have come, and nothing says which of them are padding.
    """

    real: Tensor | None
    decoder: Tensor | None = None
    labelled: Tensor | None = None
    unknown: bool = False

    def of(self, stack: str) -> Tensor | None:
        """The real tokens that a stack's hidden states stand for.

        Raises:
            DistillError: they cannot be told from padding.
        """
        if self.unknown and stack in ("decoder", "cross"):
            raise DistillError(
                "which tokens of the decoder are padding cannot be told: let the collator give labels (−100 for padding) or "
                "decoder_attention_mask"
            )
        return self.decoder if stack in ("decoder", "cross") else self.real


@dataclass
class Tokens:
    """The tokens of both models in one batch.

    Attributes:
        size: number of samples; of multiple choice, of their choices.
        student, teacher: each model's side.
        pairs: ``(B, P, 2)`` positions that belong together where the two are tokenised differently; ``None`` where position i is
            the same token for both.
        packed: several texts may stand in one row, told apart by ``position_ids`` alone.
        samples: number of samples, each of which has one answer.
    """

    size: int
    student: Side
    teacher: Side
    pairs: Tensor | None = None
    packed: bool = False
    samples: int = 0


def tokens_of(batch: Batch) -> Tokens:
    """The :class:`Tokens` that the host put into the batch."""
    return batch.extra["tokens"]


Frames = Callable[[Tensor], Tensor] | None


def read_batch(inputs: Mapping[str, Any], task: str, frames: tuple[Frames, Frames] = (None, None)) -> Batch:
    """A :class:`~kdgraft.regions.Batch` from what a collator made.

    Args:
        inputs: the batch.
        task: the student's, see :func:`~kdgraft_nlp.tasks.task_of`.
        frames: of student and teacher, what makes masks of frames from masks of samples of sound.
    """
    own = {name: value for name, value in inputs.items() if name not in (TEACHER_INPUTS, TOKEN_PAIRS, SAMPLE_IDS)}
    tensors = [value for value in own.values() if isinstance(value, Tensor) and value.ndim]
    if not tensors:
        raise DistillError("the batch holds no tensors; the collator has to return a dict of them")
    given, pairs = inputs.get(TEACHER_INPUTS, {}), inputs.get(TOKEN_PAIRS)
    student = _side(own, task, frames[0])
    if given.get("input_ids") is not None:  # other tokens: nothing that the student's say holds of them
        teacher = _side(given, task, frames[1])
        if teacher.labelled is None and pairs is not None and teacher.real is not None:
            teacher.labelled = carried_over(student.labelled, pairs, teacher.real)
    else:
        teacher = _side({**own, **given}, task, frames[1])
    packed = "position_ids" in own and "attention_mask" not in own
    samples = len(tensors[0])
    size = samples if task != "choice" or student.real is None else len(student.real)
    tokens = Tokens(size, student, teacher, pairs, packed, samples)
    return Batch(labels=own.get("labels"), extra={"tokens": tokens})


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


def _side(inputs: Mapping[str, Any], task: str, frames: Frames) -> Side:
    ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
    real = mask.bool() if mask is not None else torch.ones_like(ids, dtype=torch.bool) if ids is not None else None
    if task == "choice" and real is not None and real.ndim == 3:
        real = real.flatten(0, 1)  # the layers see each choice as a text of its own
    if real is not None and real.ndim != 2:
        raise DistillError(f"attention_mask must be (B, L), got {tuple(real.shape)}")
    if real is not None and frames is not None:
        real = frames(real)
    labels = inputs.get("labels")
    labelled = decoder = None
    if isinstance(labels, Tensor) and labels.ndim == 2 and not labels.is_floating_point() and task != "ctc":
        labelled = labels != IGNORED
        if task == "seq2seq":
            decoder = labelled
        elif task == "causal":
            labelled = torch.cat([labelled[:, 1:], torch.zeros_like(labelled[:, :1])], 1)
    if "decoder_attention_mask" in inputs:
        decoder = inputs["decoder_attention_mask"].bool()
    unknown = decoder is None and (task == "seq2seq" or "decoder_input_ids" in inputs)
    return Side(real, decoder, labelled, unknown)


def take(values: Tensor, positions: Tensor, dim: int = 1) -> Tensor:
    """``values`` at ``positions (B, P)`` along a dimension; −1 takes position 0 (to be masked by who asks)."""
    index = positions.clamp(min=0)
    shape = [1] * values.ndim
    shape[0], shape[dim] = index.shape
    expanded = list(values.shape)
    expanded[dim] = index.shape[1]
    return values.gather(dim, index.view(shape).expand(expanded))
