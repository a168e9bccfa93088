"""What terms know of a batch of text: which tokens are real, which logits have a label, which tokens belong together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kdgraft.batch import Batch
from kdgraft.errors import DistillError, WiringError
from kdgraft.taps import Tap

from .packing import texts_of

IGNORED = -100
TEACHER_INPUTS = "teacher_inputs"
"""Key of a batch under which :class:`~kdgraft_nlp.DistillCollator` puts what only the teacher is given."""
TOKEN_PAIRS = "token_pairs"
"""Key of a batch: ``(B, P, 2)`` positions of tokens that belong together, in the student's and the teacher's, −1 for none."""

SAMPLE_IDS = "sample_ids"
"""Key of a batch: what tells its samples apart, for cached teacher outputs."""


@dataclass
class ModelTokens:
    """The tokens of one model.

    Attributes:
        real: ``(B, L)`` boolean, false for padding; ``None`` where every position counts (images).
        decoder: the same for a decoder's own tokens; ``None`` without a decoder.
        labelled: ``(B, L)`` boolean: positions whose logits have a label (for a causal model the one *before* the labelled
            token); ``None`` without labels.
        unknown: a decoder's tokens have come, and nothing says which of them are padding.
        texts: ``(B, L)``: of packed rows, which text each token belongs to, numbered through the batch; ``None`` where each row
            is one text.
    """

    real: Tensor | None
    decoder: Tensor | None = None
    labelled: Tensor | None = None
    unknown: bool = False
    texts: Tensor | None = None

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

    def texts_of(self, stack: str) -> Tensor | None:
        """The texts that a stack's hidden states belong to; see :attr:`texts`."""
        return None if stack in ("decoder", "cross") else self.texts


@dataclass
class Tokens:
    """The tokens of both models in one batch.

    Attributes:
        size: number of samples; of multiple choice, of their choices.
        student, teacher: each model's side.
        pairs: ``(B, P, 2)`` positions that belong together where the two are tokenised differently; ``None`` where position i is
            the same token for both.
        samples: number of samples, each of which has one answer.
        two_stacks: the models read one sequence with an encoder and another with a decoder.
    """

    size: int
    student: ModelTokens
    teacher: ModelTokens
    pairs: Tensor | None = None
    samples: int = 0
    two_stacks: bool = False

    @property
    def paired(self) -> Tensor | None:
        """``(B, P)`` boolean, false where ``pairs`` is filled up; ``None`` where the two are tokenised alike."""
        return None if self.pairs is None else (self.pairs >= 0).all(-1)

    def align(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """Return both models' values per token, ``(B, L, …)``, at the paired tokens: ``(B, P, …)``."""
        if self.pairs is None:
            return student, teacher
        return take(student, self.pairs[..., 0]), take(teacher, self.pairs[..., 1])


VISION = frozenset({"vision_tower", "vision_model", "vision_encoder", "visual"})
"""What models of text and images call the part that reads images."""


class TextBatch(Batch):
    """A batch that tells regions of the core which positions of what a model of Hugging Face computes are padding."""

    def at(self, tap: Tap, feature: Tensor) -> Batch:
        """Return the batch with the tokens of the stack that was tapped.

        Raises:
            WiringError: padding cannot be told from tokens there, or position i is not the same token for both models.
        """
        tokens, parts = tokens_of(self), tap.path.split(".")
        in_encoder = "encoder" in parts or any(str(key).startswith("encoder") for key in tap.index)
        counted = tokens.student.of("decoder" if tokens.two_stacks and not in_encoder else "layers")
        if feature.ndim == 3 and "decoder" not in parts and self._padded_images():
            raise WiringError(
                f"tap '{tap}': {tuple(feature.shape)} holds padding of images that cannot be told from the rest; tap a map (B, C, H, W)"
            )
        if counted is None or feature.ndim > 3 or VISION.intersection(parts):
            return self
        if tokens.pairs is not None and feature.ndim == 3:
            raise WiringError(
                f"tap '{tap}': student and teacher are tokenised apart, so that position i is not the same token for both; use "
                "HiddenStates, which pairs tokens"
            )
        if feature.ndim == 3 and feature.shape[:2] != counted.shape and bool(counted.all()):
            return self  # frames or summaries of tokens, and none is padding
        return replace(self, tokens=counted)

    def _padded_images(self) -> bool:
        return any(size != self.padded_size for size in self.image_sizes or ())


def tokens_of(batch: Batch) -> Tokens:
    """The :class:`Tokens` that the host put into the batch."""
    return batch.extra["tokens"]


FrameMask = Callable[[Tensor], Tensor] | None


def read_batch(inputs: Mapping[str, Any], task: str, frames: tuple[FrameMask, FrameMask] = (None, None)) -> Batch:
    """A :class:`~kdgraft.Batch` from what a collator made.

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
    student = _model_tokens(own, task, frames[0])
    if given.get("input_ids") is not None:  # other tokens: nothing that the student's say holds of them
        teacher = _model_tokens(given, task, frames[1])
        if teacher.labelled is None and pairs is not None and teacher.real is not None:
            teacher.labelled = carried_over(student.labelled, pairs, teacher.real)
    else:
        teacher = _model_tokens({**own, **given}, task, frames[1])
    if pairs is not None and student.texts is not None:
        raise DistillError("packed rows cannot be aligned across two tokenizers; leave packing out of the collator")
    samples = len(tensors[0])
    size = samples if task != "choice" or student.real is None else len(student.real)
    tokens = Tokens(size, student, teacher, pairs, samples, task == "seq2seq")
    return TextBatch(labels=own.get("labels"), extra={"tokens": tokens}, **_image_sizes(own.get("pixel_mask")))


def _image_sizes(mask: Any) -> dict[str, Any]:
    """Sizes of images from the mask ``(B, H, W)`` that a processor pads with, at the right and at the bottom."""
    if not isinstance(mask, Tensor) or mask.ndim != 3:
        return {}
    heights, widths = (mask.bool().any(dim).sum(1).tolist() for dim in (2, 1))
    return {"padded_size": tuple(mask.shape[-2:]), "image_sizes": list(zip(heights, widths, strict=True))}


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


def _model_tokens(inputs: Mapping[str, Any], task: str, frames: FrameMask) -> ModelTokens:
    ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
    real = mask.bool() if mask is not None else torch.ones_like(ids, dtype=torch.bool) if ids is not None else None
    if task == "choice" and real is not None and real.ndim == 3:
        real = real.flatten(0, 1)  # the layers see each choice as a text of its own
    if real is not None and real.ndim != 2:
        raise DistillError(f"attention_mask must be (B, L), got {tuple(real.shape)}")
    if real is not None and frames is not None:
        real = frames(real)
    labels, texts = inputs.get("labels"), texts_of(inputs)
    labelled = decoder = None
    if isinstance(labels, Tensor) and labels.ndim == 2 and not labels.is_floating_point() and task != "ctc":
        labelled = labels != IGNORED
        if task == "seq2seq":
            decoder = labelled
        elif task == "causal":
            labelled = torch.cat([labelled[:, 1:], torch.zeros_like(labelled[:, :1])], 1)
            if texts is not None:  # the last token of a text does not predict the next text
                labelled[:, :-1] &= texts[:, 1:] == texts[:, :-1]
    if "decoder_attention_mask" in inputs:
        decoder = inputs["decoder_attention_mask"].bool()
    unknown = decoder is None and (task == "seq2seq" or "decoder_input_ids" in inputs)
    return ModelTokens(real, decoder, labelled, unknown, texts)


def take(values: Tensor, positions: Tensor, dim: int = 1) -> Tensor:
    """``values`` at ``positions (B, P)`` along a dimension; −1 takes position 0 (to be masked by who asks)."""
    index = positions.clamp(min=0)
    shape = [1] * values.ndim
    shape[0], shape[dim] = index.shape
    expanded = list(values.shape)
    expanded[dim] = index.shape[1]
    return values.gather(dim, index.view(shape).expand(expanded))
