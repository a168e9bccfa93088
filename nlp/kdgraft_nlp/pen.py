"""Texts that a student writes: prompts of a batch, continuations by the model's own ``generate``, and the batch to train on."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from kdgraft.errors import DistillError
from kdgraft.isolation import eval_mode, isolated_rng
from kdgraft.sources import Teacher

from .link import moved
from .on_policy import OnPolicy
from .packing import texts_of
from .tasks import accepted
from .tokens import IGNORED, WRITTEN, Written

_READ = frozenset({"input_ids", "attention_mask", "labels", "sample_ids"})
_MADE_ANEW = frozenset({"position_ids", "token_type_ids", "special_tokens_mask"})
"""Inputs of a batch that follow from its tokens."""


def room_of(model: Any) -> int | None:
    """Return the number of positions that a model has; ``None`` where there is no limit."""
    found = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    return int(found) if found else None


def prompts_of(batch: Mapping[str, Any], length: int) -> list[Tensor]:
    """Return the prompt of each row, without padding: the tokens before the first label, all of them where there is no label.

    Args:
        batch: the batch of the data set, padded on any side.
        length: the number of tokens that are the prompt of a row with labels from its first token on; or of each row of a batch
            without labels.

    Raises:
        DistillError: rows hold several texts, or the batch has further inputs.
    """
    ids = batch.get("input_ids")
    if not isinstance(ids, Tensor):
        raise DistillError(f"on_policy: the batch has no input_ids but {', '.join(batch)}; use a collator of tokens")
    foreign = [name for name in batch if name not in _READ | _MADE_ANEW]
    if foreign:
        raise DistillError(f"on_policy: texts are written from tokens alone, and the batch has {', '.join(foreign)}")
    if texts_of(batch) is not None:
        raise DistillError("on_policy: a row must be one text, and packed rows hold several; use a collator that pads")
    mask, labels = batch.get("attention_mask"), batch.get("labels")
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    if labels is None:
        return [row[kept][:length] for row, kept in zip(ids, real, strict=True)]
    before = (labels != IGNORED).cumsum(1) == 0
    prompts = [row[kept] for row, kept in zip(ids, real & before, strict=True)]
    return [prompt if len(prompt) else row[kept][:length] for prompt, row, kept in zip(prompts, ids, real, strict=True)]


class Pen:
    """Writes texts with the models of a trainer.

    Args:
        settings: the settings.
        models: the student and the sources' models by name, which must be able to read what is written.
        tokenizer: the tokenizer, if there is one.
        teacher: the teacher that writes along, where the settings mix it in.
    """

    def __init__(self, settings: OnPolicy, models: Mapping[str, Any], tokenizer: Any, teacher: Teacher | None) -> None:
        self.settings, self.teacher = settings, teacher
        self.words = min(model.get_input_embeddings().num_embeddings for model in models.values())
        self.rooms = {owner: room for owner, model in models.items() if (room := room_of(model)) is not None}
        self.ends = [token for token in ends_of(settings, models["student"], tokenizer) if token < self.words]
        told = (getattr(tokenizer, "pad_token_id", None), models["student"].config.pad_token_id, *self.ends)
        self.padding = next((token for token in told if token is not None and 0 <= token < self.words), 0)

    def write(self, model: Any, batch: Mapping[str, Any], numbers: Sequence[np.ndarray]) -> dict[str, Any]:
        """Return the batch of the texts that continue the prompts of a batch.

        It is padded on the right, as models count positions from the first column; prompts and padding have no label. Rows without
        a token are left out.

        Args:
            model: the student.
            batch: the batch of the data set.
            numbers: for each row the numbers in [0, 1) that draw its tokens.
        """
        started, device = time.perf_counter(), batch["input_ids"].device if "input_ids" in batch else None
        found = prompts_of(batch, self.settings.prompt)
        kept = [row for row, prompt in enumerate(found) if len(prompt)]
        if not kept:
            return self._batch([torch.zeros(1, dtype=torch.long, device=device)], [torch.zeros(0).long()], started)
        prompts = [found[row] for row in kept]
        drawn = torch.from_numpy(np.stack([numbers[row] for row in kept])).to(device)
        self._check_room(max(map(len, prompts)))
        return self._batch(prompts, self._continued(model, prompts, drawn), started)

    def _check_room(self, longest: int) -> None:
        for owner, room in self.rooms.items():
            if longest + self.settings.max_new_tokens > room:
                raise DistillError(
                    f"on_policy: a prompt of {longest} tokens leaves {max(room - longest, 0)} of the {owner}'s {room} positions for "
                    f"max_new_tokens={self.settings.max_new_tokens}; lower it, or shorten the prompts"
                )

    def _batch(self, prompts: Sequence[Tensor], written: Sequence[Tensor], started: float) -> dict[str, Any]:
        texts = [torch.cat([a, b.to(a)]) for a, b in zip(prompts, written, strict=True)]
        labels = [torch.cat([torch.full_like(a, IGNORED), b.to(a)]) for a, b in zip(prompts, written, strict=True)]
        count = sum(map(len, written)) / len(written)
        return {
            "input_ids": pad_sequence(texts, batch_first=True, padding_value=self.padding),
            "attention_mask": pad_sequence([torch.ones_like(text) for text in texts], batch_first=True),
            "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORED),
            WRITTEN: Written(self.settings.mix, count, time.perf_counter() - started),
        }

    def _continued(self, model: Any, prompts: Sequence[Tensor], numbers: Tensor) -> list[Tensor]:
        """Return the continuation of each prompt, up to its end-of-text token."""
        ids = pad_sequence(list(prompts), batch_first=True, padding_value=self.padding, padding_side="left")
        mask = pad_sequence([torch.ones_like(p) for p in prompts], batch_first=True, padding_side="left")
        # Tokens are drawn by numbers of each text's own, so that the other texts of a batch do not matter to it.
        config = GenerationConfig(
            **_end(model, ids.shape[1], self.settings.max_new_tokens),
            do_sample=False,
            num_beams=1,
            use_cache=True,
            repetition_penalty=1.0,
            no_repeat_ngram_size=0,
            pad_token_id=self.padding,
            # For none, an entry that is never drawn: the model's own would take its place.
            eos_token_id=self.ends or [self.words],
            return_dict_in_generate=False,
        )
        processors = self._processors(mask, numbers)
        with torch.no_grad(), isolated_rng(), eval_mode(model):
            found = model.generate(
                input_ids=ids, attention_mask=mask, generation_config=config, logits_processor=processors
            )
        return [up_to_end(row, self.ends) for row in found[:, ids.shape[1] :]]

    def _processors(self, mask: Tensor, numbers: Tensor) -> LogitsProcessorList:
        told = self.settings
        found: list[LogitsProcessor] = [_Common(self.words)]
        if told.temperature != 1:
            found.append(TemperatureLogitsWarper(float(told.temperature)))
        if self.teacher is not None:
            found.append(_MixIn(self.teacher, mask, told.mix, told.temperature, self.words))
        if told.top_k is not None:
            found.append(TopKLogitsWarper(told.top_k))
        if told.top_p is not None:
            found.append(TopPLogitsWarper(told.top_p))
        return LogitsProcessorList([*found, _Draw(numbers, mask.shape[1])])


def ends_of(settings: OnPolicy, model: Any, tokenizer: Any) -> list[int]:
    """Return the end-of-text tokens: those of the settings, or those of the tokenizer and of the model's generation config.

    A tokenizer without an end-of-text token ends texts with its separator, as the data of recipe files do.
    """
    if settings.ends is not None:
        return settings.ends
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    found = [] if own is None else [own] if isinstance(own, int) else list(own)
    end = getattr(tokenizer, "eos_token_id", None)
    if tokenizer is not None and end is None:
        separator = getattr(tokenizer, "sep_token_id", None)
        return [] if separator is None else [separator]
    return list(dict.fromkeys(found if end is None else [end, *found]))


def _end(model: Any, prompt: int, count: int) -> dict[str, int]:
    """Return the setting that ends a continuation: the one that the model has too, as two would be a warning in each step."""
    own = model.generation_config
    if own.max_length is None or own.max_new_tokens is not None:
        return {"max_new_tokens": count}
    return {"max_length": prompt + count}


def up_to_end(tokens: Tensor, ends: Sequence[int]) -> Tensor:
    """Return the tokens ``(n,)`` up to the first end-of-text token, which is included."""
    last = torch.isin(tokens, torch.tensor(list(ends), device=tokens.device)).nonzero()
    return tokens[: int(last[0]) + 1] if len(last) else tokens


class _Common(LogitsProcessor):
    """Leaves the tokens that all models can read; vocabularies may be padded differently."""

    def __init__(self, words: int) -> None:
        self.words = words

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        found = scores.clone()
        found[:, self.words :] = -math.inf
        return found


class _Draw(LogitsProcessor):
    """Draws one token of each row by the row's own random number, and gives all others the score −∞.

    Args:
        numbers: ``(B, steps)`` in [0, 1).
        start: the length of the prompts.
    """

    def __init__(self, numbers: Tensor, start: int) -> None:
        self.numbers, self.start = numbers, start

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        mass = scores.double().softmax(-1).cumsum(-1)
        number = self.numbers[:, input_ids.shape[1] - self.start, None].to(mass)
        # The first token up to which there is more mass: never one of probability 0.
        token = torch.searchsorted(mass, number * mass[:, -1:], right=True).clamp(max=mass.shape[1] - 1)
        return torch.full_like(scores, -math.inf).scatter(1, token, 0.0)


class _MixIn(LogitsProcessor):
    """Mixes the teacher's distribution of the next token into the student's: α·p + (1 − α)·q (MiniLLM, equation 4).

    Args:
        teacher: the teacher, which keeps keys and values of its own.
        mask: the mask of the prompts.
        share: α.
        temperature: of both distributions; the student's scores are divided by it already.
        words: the number of tokens that both models have.
    """

    def __init__(self, teacher: Teacher, mask: Tensor, share: float, temperature: float, words: int) -> None:
        self.teacher, self.mask, self.share, self.temperature, self.words = teacher, mask, share, temperature, words
        self.takes = accepted(teacher.model)
        self.known: Any = None
        self.seen = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        theirs = self._logits(input_ids)[:, : self.words].to(scores) / self.temperature
        both = scores.log_softmax(-1) + math.log1p(-self.share)
        both[:, : self.words] = torch.logaddexp(both[:, : self.words], theirs.log_softmax(-1) + math.log(self.share))
        return both

    def _logits(self, input_ids: Tensor) -> Tensor:
        """Return the teacher's logits ``(B, V)`` of the next token."""
        teacher = self.teacher
        teacher.ensure_eval()
        mask = F.pad(self.mask, (0, input_ids.shape[1] - self.mask.shape[1]), value=1)
        inputs = {"input_ids": input_ids[:, self.seen :], "attention_mask": mask}
        if "position_ids" in self.takes:
            inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)[:, self.seen :]
        if self.known is not None:
            inputs["past_key_values"] = self.known
        with teacher.context(input_ids.device.type):
            output = teacher.model(**moved(teacher.model, inputs), use_cache=True)
        self.known = getattr(output, "past_key_values", None)
        self.seen = input_ids.shape[1] if self.known is not None else 0
        return output.logits[:, -1]
