"""The tokens of a batch as terms read them: tokens that are not padding, logits with a label, and aligned tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kdgraft.batch import Batch
from kdgraft.errors import DistillError, WiringError
from kdgraft.pairs import Pairs
from kdgraft.regions.base import valid_positions
from kdgraft.taps import Tap

from .packing import texts_of
from .predictions import counted_pixels

IGNORED = -100
TEACHER_INPUTS = "teacher_inputs"
"""Key of a batch under which :class:`~kdgraft_nlp.DistillCollator` stores the inputs of the teacher only."""
TOKEN_PAIRS = "token_pairs"
"""Key of a batch: the positions ``(B, P, 2)`` of aligned tokens of student and teacher, −1 for none."""

TOKEN_STARTS = "token_starts"
"""Key of a batch: the positions ``(B, P, 2)`` of the first tokens of the groups that end at the aligned tokens, −1 for none."""

SAMPLE_IDS = "sample_ids"
"""Key of a batch: the ids of its samples, for cached teacher outputs."""


TEXTS_OF_SAMPLES = "texts"
"""Key of a batch: the texts of its samples by column, for a teacher that reads texts."""

WRITTEN = "written"
"""Key of a batch whose texts the student wrote, for a :class:`Written`."""

WEIGHTS = "token_weights"
"""Key of a batch: the weights of its tokens, ``(B, L)``."""

OUR_KEYS = frozenset({TEACHER_INPUTS, TOKEN_PAIRS, TOKEN_STARTS, SAMPLE_IDS, TEXTS_OF_SAMPLES, WRITTEN, WEIGHTS})
"""The keys of a batch that no model takes."""


@dataclass(frozen=True)
class Written:
    """The way in which the texts of a batch were written.

    Attributes:
        mix: the teacher's share in the distribution from which tokens were drawn.
        length: the mean number of tokens of a continuation.
        seconds: the time that writing took.
    """

    mix: float
    length: float
    seconds: float


@dataclass
class ModelTokens:
    """The tokens of one model.

    Attributes:
        real: ``(B, L)`` boolean, false for padding; ``None`` where every position counts (images).
        decoder: the same for the decoder's tokens; ``None`` without a decoder.
        labelled: ``(B, L)`` boolean: positions whose logits have a label (for a causal model the one *before* the labelled
            token); ``None`` without labels.
        unknown: true where the decoder has tokens and their padding is unknown.
        texts: ``(B, L)``: the number of each token's text in the batch, for packed rows; ``None`` where each row is one text.
        targets: ``(B, L)``: the label of each position's logits, −100 for none; ``None`` without labels.
        ids: ``(B, L)``: the tokens themselves; ``None`` without any.
    """

    real: Tensor | None
    decoder: Tensor | None = None
    labelled: Tensor | None = None
    unknown: bool = False
    texts: Tensor | None = None
    targets: Tensor | None = None
    ids: Tensor | None = None

    def of(self, stack: str) -> Tensor | None:
        """Return the tokens of a stack's hidden states that are not padding.

        Raises:
            DistillError: padding is unknown.
        """
        if self.unknown and stack in ("decoder", "cross"):
            raise DistillError(
                "the padding of the decoder's tokens is unknown; add labels (−100 for padding) or decoder_attention_mask to the batch"
            )
        return self.decoder if stack in ("decoder", "cross") else self.real

    def texts_of(self, stack: str) -> Tensor | None:
        """Return :attr:`texts` for a stack's hidden states."""
        return None if stack in ("decoder", "cross") else self.texts


@dataclass
class Tokens:
    """The tokens of both models in one batch.

    Attributes:
        size: the number of texts: that of samples, or for multiple choice that of their choices.
        student, teacher: the tokens of each model.
        pairs: positions ``(B, P, 2)`` of aligned tokens, where the models have different tokenizers; ``None`` where position i
            is the same token for both.
        starts: positions ``(B, P, 2)`` of the first token of each group of tokens that ends at an aligned pair: the tokens after
            the pair before. ``None`` where groups are unknown.
        samples: the number of samples, each of which has one answer.
        two_stacks: true where the models have an encoder and a decoder, which read different sequences.
        weights: ``(B, L)``: the weights of the student's predictions, that of the token that each predicts; ``None``
            for equal ones.
    """

    size: int
    student: ModelTokens
    teacher: ModelTokens
    pairs: Tensor | None = None
    samples: int = 0
    two_stacks: bool = False
    starts: Tensor | None = None
    weights: Tensor | None = None

    def amount(self, counted: Tensor) -> Tensor:
        """Return the number of predictions that count, or the sum of their weights."""
        return (counted if self.weights is None else self.weights * counted).sum().float()

    @property
    def paired(self) -> Tensor | None:
        """The pairs that are not padding, ``(B, P)`` boolean; ``None`` without ``pairs``."""
        return None if self.pairs is None else (self.pairs >= 0).all(-1)

    def align(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """Return both models' values per token, ``(B, L, …)``, at the paired tokens: ``(B, P, …)``."""
        if self.pairs is None:
            return student, teacher
        return take(student, self.pairs[..., 0]), take(teacher, self.pairs[..., 1])


VISION = frozenset({"vision_tower", "vision_model", "vision_encoder", "visual"})
"""The names of the modules that read images in vision-language models."""


class TextBatch(Batch):
    """A batch that gives the core's regions the padding of a Hugging Face model's features."""

    def at(self, tap: Tap, feature: Tensor, *, owner: str | None = None) -> Batch:
        """Return the batch with the tokens of the stack that was tapped.

        Raises:
            WiringError: padding is unknown there, or position i is not the same token for both models.
        """
        tokens, parts = tokens_of(self), tap.path.split(".")
        side = tokens.teacher if owner == "teacher" else tokens.student
        stack = stack_of(tap, tokens)
        counted = side.of(stack)
        if feature.ndim == 3 and "decoder" not in parts:
            refuse_padded_images(self, f"tap '{tap}'")
        if counted is None or feature.ndim > 3 or VISION.intersection(parts):
            return self
        if tokens.pairs is not None and feature.ndim == 3 and owner is None:
            raise WiringError(f"tap '{tap}': the tokens of two tokenizers differ; use HiddenStates, which aligns them")
        if feature.ndim == 3 and feature.shape[:2] != counted.shape and bool(counted.all()):
            return self  # frames or summaries of tokens, and none is padding
        return replace(self, tokens=counted, texts=side.texts_of(stack))


def refuse_padded_images(batch: Batch, what: str) -> None:
    """Raise a :class:`WiringError` where images are padded, for a term or tap on sequences, in which their padding is unknown."""
    if has_padded_images(batch):
        raise WiringError(
            f"{what}: the batch contains padding of images, at unknown positions of a sequence; tap a map (B, C, H, W)"
        )


def has_padded_images(batch: Batch) -> bool:
    """Return whether an image of the batch is smaller than the padded size."""
    return any(size != batch.padded_size for size in batch.image_sizes or ())


def image_positions(batch: Batch, length: int, what: str) -> Tensor | None:
    """Return the positions ``(B, length)`` of a sequence of an image map that lie in the images; ``None`` where no image is padded.

    Args:
        batch: the batch.
        length: the length of the sequence, H·W of a map whose stride is a power of 2.
        what: the term and its tap, for messages.

    Raises:
        WiringError: no such map has this number of positions, such as the joined maps of several levels.
    """
    if not has_padded_images(batch):
        return None
    assert batch.padded_size is not None and batch.image_sizes is not None
    for stride in (2**power for power in range(8)):
        height, width = (-(-side // stride) for side in batch.padded_size)
        if height * width == length:
            found = valid_positions(batch.image_sizes, batch.padded_size, torch.empty(1, 1, height, width))
            assert found is not None
            return found.flatten(1).bool()
    refuse_padded_images(batch, what)
    return None


def tokens_of(batch: Batch) -> Tokens:
    """Return the :class:`Tokens` of a batch."""
    return batch.extra["tokens"]


def stack_of(tap: Tap, tokens: Tokens) -> str:
    """Return the stack that a tap reads: ``"decoder"`` or ``"layers"``."""
    in_encoder = "encoder" in tap.path.split(".") or any(str(key).startswith("encoder") for key in tap.index)
    return "decoder" if tokens.two_stacks and not in_encoder else "layers"


FrameMask = Callable[[Tensor], Tensor] | None


def read_batch(
    inputs: Mapping[str, Any], task: str, frames: tuple[FrameMask, FrameMask] = (None, None), ignored: int = 255
) -> Batch:
    """Return the :class:`~kdgraft.Batch` of a collator's output.

    Args:
        inputs: the output of the collator.
        task: the student's task; see :func:`~kdgraft_nlp.tasks.task_of`.
        frames: the frame masks of student and teacher; see :func:`~kdgraft_nlp.tasks.frame_mask`.
        ignored: the label of pixels that a segmentor's own loss ignores.
    """
    own = {name: value for name, value in inputs.items() if name not in OUR_KEYS}
    tensors = [value for value in own.values() if isinstance(value, Tensor) and value.ndim]
    if not tensors:
        raise DistillError("the batch holds no tensors; use a collator that returns a dict of tensors")
    given, pairs = inputs.get(TEACHER_INPUTS, {}), inputs.get(TOKEN_PAIRS)
    student = _model_tokens(own, task, frames[0])
    if given.get("input_ids") is not None:  # other tokens: the student's inputs do not apply to them
        teacher = _model_tokens(given, task, frames[1])
        if teacher.labelled is None and pairs is not None and teacher.real is not None:
            teacher.labelled = carried_over(student.labelled, pairs, teacher.real)
    else:
        teacher = _model_tokens({**own, **given}, task, frames[1])
    if pairs is not None and student.texts is not None:
        raise DistillError("packed rows cannot be aligned across two tokenizers; use a collator that pads")
    samples = len(tensors[0])
    size = samples if task != "choice" or student.real is None else len(student.real)
    weights = None if inputs.get(WEIGHTS) is None else _of_predictions(inputs[WEIGHTS], student.real)
    tokens = Tokens(size, student, teacher, pairs, samples, task == "seq2seq", inputs.get(TOKEN_STARTS), weights)
    extra: dict[Any, Any] = {"tokens": tokens, "written": inputs.get(WRITTEN)}
    extra["answers"] = [own.get(name) for name in ("start_positions", "end_positions")]
    facts = _image_sizes(own.get("pixel_mask"))
    if task == "detection":
        facts |= _boxes(own.get("pixel_values"), own.get("labels"))
    if task == "segmentation":
        facts["valid"] = counted_pixels(own.get("labels"), ignored)
    return TextBatch(labels=own.get("labels"), extra=extra, **facts)


def _boxes(images: Any, labels: Any) -> dict[str, Any]:
    """Return the boxes of each image as corners in pixels, from a detector's labels: centre and size, as fractions of the input."""
    if not isinstance(images, Tensor) or not isinstance(labels, (list, tuple)):
        return {}
    height, width = images.shape[-2:]
    found = []
    for label in labels:
        centre, size = label["boxes"].reshape(-1, 4).float().split(2, 1)
        corners = torch.cat([centre - size / 2, centre + size / 2], 1)
        found.append(corners * corners.new_tensor([width, height] * 2))
    return {"padded_size": (height, width), "boxes": found}


def _of_predictions(weights: Tensor, real: Tensor | None) -> Tensor:
    """Return the weights ``(B, L)`` of a causal model's predictions from those of tokens; the last token's has its own weight."""
    following = torch.cat([weights[:, 1:], weights[:, -1:]], 1)
    if real is None:
        return following
    known = torch.cat([real[:, 1:], torch.zeros_like(real[:, :1])], 1)
    return torch.where(known, following, weights)


def _image_sizes(mask: Any) -> dict[str, Any]:
    """Return the sizes of images by a processor's mask ``(B, H, W)``, whose padding is at the right and the bottom."""
    if not isinstance(mask, Tensor) or mask.ndim != 3:
        return {}
    heights, widths = (mask.bool().any(dim).sum(1).tolist() for dim in (2, 1))
    return {"padded_size": tuple(mask.shape[-2:]), "image_sizes": list(zip(heights, widths, strict=True))}


def carried_over(labelled: Tensor | None, pairs: Tensor, real: Tensor) -> Tensor | None:
    """Transfer labelled positions from the student's tokens to the teacher's: each is as the last paired token up to it.

    Args:
        labelled: ``(B, L)``: the student's labelled tokens.
        pairs: ``(B, P, 2)``: the positions of aligned tokens.
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
        real = real.flatten(0, 1)  # each choice is a text to the layers
    if real is not None and real.ndim != 2:
        raise DistillError(f"attention_mask must be (B, L), got {tuple(real.shape)}")
    if real is not None and frames is not None:
        real = frames(real)
    labels, texts = inputs.get("labels"), texts_of(inputs)
    labelled = decoder = targets = None
    if isinstance(labels, Tensor) and labels.ndim == 2 and not labels.is_floating_point() and task != "ctc":
        labelled, targets = labels != IGNORED, labels
        if task == "seq2seq":
            decoder = labelled
        elif task == "causal":
            labelled, targets = (torch.cat([x[:, 1:], torch.zeros_like(x[:, :1])], 1) for x in (labelled, labels))
            if texts is not None:  # the last token of a text does not predict the next text
                labelled[:, :-1] &= texts[:, 1:] == texts[:, :-1]
            if real is not None and real.shape == labelled.shape:  # padding on the left predicts nothing
                labelled &= real
            targets = targets.masked_fill(~labelled, IGNORED)
    if "decoder_attention_mask" in inputs:
        decoder = inputs["decoder_attention_mask"].bool()
    unknown = decoder is None and (task == "seq2seq" or "decoder_input_ids" in inputs)
    return ModelTokens(real, decoder, labelled, unknown, texts, targets, ids)


def take(values: Tensor, positions: Tensor, dim: int = 1) -> Tensor:
    """Return ``values`` at ``positions (B, P)`` along a dimension; −1 takes position 0, which the caller must mask."""
    index = positions.clamp(min=0)
    shape = [1] * values.ndim
    shape[0], shape[dim] = index.shape
    expanded = list(values.shape)
    expanded[dim] = index.shape[1]
    return values.gather(dim, index.view(shape).expand(expanded))


def answers_of(batch: Batch) -> list[Tensor | None]:
    """Return the positions of the answers' first and last token, ``(B,)`` each, and −100 for both where one is not in the text.

    Where the tokens of two tokenizers are aligned, the positions are those among the pairs.
    """
    tokens, given = tokens_of(batch), batch.extra["answers"]
    if any(place is None for place in given):
        return [None, None]
    places = [place.reshape(-1) for place in given]
    if tokens.pairs is not None:
        matches = [tokens.pairs[..., 0] == place[:, None] for place in places]
        places = [match.long().argmax(1).masked_fill(~match.any(1), IGNORED) for match in matches]
    real = tokens.student.real if tokens.paired is None else tokens.paired
    unknown = torch.stack([(place < 0) | (real is not None and place >= real.shape[1]) for place in places]).any(0)
    return [place.masked_fill(unknown, IGNORED) for place in places]


def shared_tokens(student: Any, teacher: Any) -> Tensor:
    """Return the ids ``(M, 2)`` of the tokens that two tokenizers write alike, in the order of the student's."""
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    found = sorted((place, theirs[token]) for token, place in ours.items() if token in theirs)
    return torch.tensor(found, dtype=torch.long).reshape(-1, 2)


def weighed(pairs: Pairs, tokens: Tokens, counted: Tensor) -> Pairs:
    """Return the pairs of the tokens that count with their weights, whose sum divides, or else with their number."""
    if tokens.weights is None:
        return replace(pairs, count=tokens.amount(counted))
    return replace(pairs, weight=tokens.weights[counted], count=None)
