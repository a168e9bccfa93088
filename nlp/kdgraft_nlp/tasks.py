"""The task of a Hugging Face model, the arguments of its forward, and small example inputs."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.auto import modeling_auto as auto

from kdgraft.errors import DistillError

_KINDS: list[tuple[str, Any, Any]] = [
    ("sequence", auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES, auto.AutoModelForSequenceClassification),
    ("tokens", auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES, auto.AutoModelForTokenClassification),
    ("question", auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES, auto.AutoModelForQuestionAnswering),
    ("choice", auto.MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES, auto.AutoModelForMultipleChoice),
    ("text", auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES, auto.AutoModelForSeq2SeqLM),
    ("text", auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES, auto.AutoModelForSpeechSeq2Seq),
    ("masked", auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES, auto.AutoModelForMaskedLM),
    ("causal", auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, auto.AutoModelForCausalLM),
    ("text", auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, auto.AutoModelForImageTextToText),
    ("image", auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES, auto.AutoModelForImageClassification),
    ("image", auto.MODEL_FOR_VIDEO_CLASSIFICATION_MAPPING_NAMES, auto.AutoModelForVideoClassification),
    ("audio", auto.MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES, auto.AutoModelForAudioClassification),
    ("ctc", auto.MODEL_FOR_CTC_MAPPING_NAMES, auto.AutoModelForCTC),
    ("segmentation", auto.MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES, auto.AutoModelForSemanticSegmentation),
    ("detection", auto.MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES, auto.AutoModelForObjectDetection),
    (
        "detection",
        {"detr": "DetrForSegmentation"},
        auto.AutoModelForUniversalSegmentation,
    ),  # a detector with masks beside
    ("universal", auto.MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING_NAMES, auto.AutoModelForUniversalSegmentation),
]
"""Tasks, transformers' names of their classes, and the class that loads them; ``text`` depends on the model itself."""

AUTO_CLASSES: dict[str, Any] = {
    **{task: loads for task, _, loads in reversed(_KINDS) if task != "text"},
    "seq2seq": auto.AutoModelForSeq2SeqLM,
}
LANGUAGE_MODELS = ("masked", "causal", "aligned", "seq2seq")
_ALIGNED = re.compile(
    "(Bart|BigBirdPegasus|Blenderbot(Small)?|CpmAnt|MBart|Marian|PLBart|Pegasus|ProphetNet|TrOCR|Whisper)ForCausalLM|XLNetLMHeadModel"
)
"""Causal models whose own loss does not shift the labels: each label is at the position that predicts it."""
STORED = "stored_outputs"
"""The attribute by which the stand-in for a teacher whose outputs are stored is known."""
PER_SAMPLE = ("sequence", "image", "audio", "choice")
PER_TOKEN = ("tokens", "ctc", *LANGUAGE_MODELS)


def task_of(model: nn.Module) -> str:
    """Return the task of a model's class, by transformers' own lists of classes.

    Returns:
        ``sequence``, ``tokens``, ``question``, ``choice`` (multiple choice), ``masked``, ``causal`` (including vision-language and
        audio models without a separate decoder), ``aligned`` (causal, with labels at the positions that predict them),
        ``seq2seq``, ``image``, ``audio``, ``ctc``, ``segmentation``, ``detection``, ``universal``
        (segmentation by queries), or ``other``.
    """
    told = getattr(model, "distill_task", None)  # of a model that stands in the place of another
    if isinstance(told, str):
        return told
    kind = _kind_of(model)
    if kind is None:
        return "other"
    if kind[0] == "causal" and any(_ALIGNED.fullmatch(base.__name__) for base in type(model).__mro__):
        return "aligned"
    if kind[0] != "text":
        return kind[0]
    takes = accepted(model)
    if "labels" not in takes:
        return "other"
    if has_decoder(model):
        return "seq2seq"
    return "causal" if "input_ids" in takes else "other"


def auto_class(model: nn.Module) -> Any:
    """Return transformers' class that loads models of this kind; ``None`` for a kind that it does not list."""
    kind = _kind_of(model)
    return None if kind is None else kind[2]


def _kind_of(model: nn.Module) -> tuple[str, Any, Any] | None:
    names = {base.__name__ for base in type(model).__mro__}
    for kind in _KINDS:
        known: set[str] = set()
        for value in kind[1].values():
            known.update([value] if isinstance(value, str) else value)
        if names & known:
            return kind
    return None


def accepted(model: nn.Module) -> set[str]:
    """Return the names of the arguments of a model's forward."""
    told = getattr(model, "distill_inputs", None)
    if isinstance(told, frozenset):
        return set(told)
    return set(inspect.signature(model.forward).parameters)


def reads_text_alone(model: nn.Module) -> bool:
    """Return whether the model reads tokens and no images, so that none of its tensors is an image map."""
    return "input_ids" in accepted(model) and "pixel_values" not in accepted(model)


def by_name(forward: Callable[..., Any], args: Sequence[Any], inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return all arguments of a call by name.

    Args:
        forward: a method.
        args, inputs: the arguments after ``self``, by position and by name; names unknown to ``forward`` are kept.

    Raises:
        TypeError: there are too many arguments, or one is given twice.
    """
    if not args:
        return dict(inputs)
    (_, *found), values = inspect.signature(forward).bind_partial(None, *args).arguments.items(), dict(inputs)
    for name, value in found:
        if name in values:
            raise TypeError(f"{forward.__qualname__}() got multiple values for argument {name!r}")
        values[name] = value
    return values


def has_decoder(model: Any) -> bool:
    """Return whether the model has a decoder of tokens; RT-DETR is called an encoder-decoder too, and has none."""
    return bool(getattr(model.config, "is_encoder_decoder", False)) and "decoder_input_ids" in accepted(model)


def decoder_inputs(model: Any, labels: Tensor) -> Tensor:
    """Return the decoder's input tokens for target tokens ``(B, L)``: shifted right by one, with −100 as padding.

    The model's own method is used where there is one.

    Raises:
        DistillError: the model has no such method, and its config lacks the token to start with or the padding token.
    """
    own = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if own is not None:
        return own(labels=labels)
    text = model.config.get_text_config(decoder=True)
    start, pad = (
        next((getattr(c, name) for c in (model.config, text) if getattr(c, name, None) is not None), None)
        for name in ("decoder_start_token_id", "pad_token_id")
    )
    if start is None or pad is None:
        raise DistillError(
            f"{type(model).__name__} makes its decoder's inputs from labels, and its config lacks "
            f"{'decoder_start_token_id' if start is None else 'pad_token_id'}; set it, or add decoder_input_ids to the batch"
        )
    moved = labels.roll(1, 1)
    moved[:, 0] = start
    return moved.masked_fill(moved == -100, pad)


def frame_mask(model: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """Return the function from an audio model's mask of samples to its mask of frames.

    Returns:
        ``(B, samples)`` boolean -> ``(B, frames)`` boolean, at the encoder's layers; ``None`` for other models.
    """
    if "input_ids" in accepted(model):
        return None  # it has a mask of tokens
    names = ("_get_feat_extract_output_lengths", "_get_subsampling_output_length")
    lengths = next((getattr(m, name) for m in model.modules() for name in names if hasattr(m, name)), None)
    if lengths is None:
        return None
    # The frames of an adapter after the layers are not wanted.
    settings = {"add_adapter": False} if "add_adapter" in inspect.signature(lengths).parameters else {}

    def frames(mask: Tensor) -> Tensor:
        samples = [mask.shape[1], *mask.sum(1).tolist()]  # some models' methods take one number at a time
        whole, *own = (int(lengths(torch.tensor(count), **settings)) for count in samples)
        return torch.arange(whole, device=mask.device) < torch.tensor(own, device=mask.device)[:, None]

    return frames


def example(model: Any, device: torch.device | None = None) -> dict[str, Tensor]:
    """Return a small input of two samples (one for multiple choice), made from the config: token ids, sound or images.

    Args:
        model: the model.
        device: the device of the input; that of the model's parameters by default.

    Raises:
        DistillError: the model takes none of these.
    """
    config, takes = model.config, accepted(model)
    if hasattr(model, "distill_example"):
        return model.distill_example(device)
    device = device if device is not None else next(model.parameters()).device
    task = task_of(model)
    inputs: dict[str, Tensor] = {}
    if "input_ids" in takes:
        # Classifiers of causal models refuse several rows without a pad token.
        rows = 1 if task == "sequence" and getattr(config, "pad_token_id", None) is None else 2
        ids = _tokens(model, rows).to(device)
        if task == "choice":
            ids = ids[None]  # one sample of two choices, which are two texts to the layers
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    elif found := _media(config, takes):
        inputs = {name: torch.zeros(2, *shape, device=device) for name, shape in found.items()}
    else:
        raise DistillError(
            f"{type(model).__name__} has inputs of an unknown kind; pass one small batch as dry_run=dict(…)"
        )
    if has_decoder(model):
        inputs["decoder_input_ids"] = inputs.get("input_ids", _tokens(model, 2).to(device))
    return {name: value for name, value in inputs.items() if name in takes}


def _media(config: Any, takes: set[str]) -> dict[str, tuple[int, ...]]:
    """Return the name and shape of a model's sound, video or image input; nothing where its config does not give them."""
    bins = getattr(config, "num_mel_bins", None)
    if "input_features" in takes:
        if bins and hasattr(config, "max_source_positions"):
            return {"input_features": (bins, 2 * config.max_source_positions)}  # Whisper has a fixed length
        names = ("input_feat_per_channel", "feature_projection_input_dim")
        width = next((getattr(config, name) for name in names if hasattr(config, name)), None)
        return {"input_features": (40, width)} if width else {}
    if "input_values" in takes:
        return {"input_values": (config.max_length, bins) if bins and hasattr(config, "max_length") else (4000,)}
    if "pixel_values" in takes:
        images = next((c for c in (config, getattr(config, "encoder", None)) if getattr(c, "image_size", None)), config)
        side = getattr(images, "image_size", None) or 224
        height, width = (side,) * 2 if isinstance(side, int) else side
        frames = (config.num_frames,) if hasattr(config, "num_frames") else ()
        return {"pixel_values": (*frames, getattr(images, "num_channels", 3), height, width)}
    return {}


def _tokens(model: Any, rows: int) -> Tensor:
    """Return token ids ``(rows, 5)``, none of which is an image, a sound or padding; the end-of-text token is last."""
    config = model.config
    embeddings = getattr(model, "get_input_embeddings", lambda: None)()
    size = int(embeddings.num_embeddings) if isinstance(embeddings, nn.Embedding) else 8
    end = getattr(config, "eos_token_id", None)
    end = end if isinstance(end, int) and end < size else None
    special = [value for name, value in vars(config).items() if name.endswith(("_token_id", "_token_index"))]
    words = [i for i in range(min(size, 9)) if i not in special] or [0]
    ids = torch.tensor([[words[(5 * row + 3 * i) % len(words)] for i in range(5)] for row in range(rows)])
    if end is not None:
        ids[:, -1] = end  # some models read the state of this token
    return ids
