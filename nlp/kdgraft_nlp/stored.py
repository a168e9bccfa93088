"""A teacher that is not there: its outputs come from a store that ``kdgraft cache`` filled."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from kdgraft.errors import DistillError, WiringError
from kdgraft.sources import KnownRecording, Teacher
from kdgraft.store import Index, Store, unpacked_ids
from kdgraft.taps import Recording, Tap
from kdgraft.terms import ScoreTerm, Term
from kdgraft.topk import TopK

from .absent import Absent
from .cache import check_storable, without_weights
from .packing import FOR_KERNELS, texts_of
from .registry import SOURCES
from .tasks import STORED

LOGITS = "[logits]"
FOLLOW = frozenset({"attention_mask", "position_ids", "cache_position", *FOR_KERNELS})
"""Inputs of tokens that follow from the others, or say where a text lies in its row."""


def texts_in(inputs: Mapping[str, Any]) -> tuple[NDArray[np.uint8], list[tuple[int, Tensor | None]]]:
    """Return the key of each text or sample of a batch, ``(n, 16)``, and its row and positions; ``None`` without tokens.

    A key is a hash of what the teacher reads, without padding, so that a text has the same key in a padded and in a packed row.

    Raises:
        DistillError: an input belongs neither to tokens nor to samples, so that it is not known which text it belongs to.
    """
    tensors = {name: value for name, value in inputs.items() if isinstance(value, Tensor) and value.ndim}
    ids = tensors.get("input_ids")
    if ids is None:
        rows = [(row, None) for row in range(len(next(iter(tensors.values()))))]
        return _keys([[(name, value[row]) for name, value in sorted(tensors.items())] for row, _ in rows]), rows  # type: ignore[return-value]
    mask, numbers = tensors.get("attention_mask"), texts_of(inputs)
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    per_token = {
        name: value for name, value in sorted(tensors.items()) if value.shape[:2] == ids.shape and name not in FOLLOW
    }
    others = {
        name: value
        for name, value in sorted(tensors.items())
        if name not in per_token and name not in FOLLOW and len(value) == len(ids)
    }
    left = tensors.keys() - per_token.keys() - others.keys() - FOLLOW
    if ids.ndim != 2 or left:
        what = f"input_ids of shape {tuple(ids.shape)}" if ids.ndim != 2 else ", ".join(sorted(left))
        raise DistillError(
            f"a store finds texts by what the teacher reads, and {what} cannot be told apart by texts; give the teacher"
        )
    found: list[tuple[int, Tensor | None]] = []
    for row in range(len(ids)):
        kept = real[row].nonzero()[:, 0]
        if numbers is None:
            found.append((row, kept))
        else:
            _, lengths = numbers[row][kept].unique_consecutive(return_counts=True)
            found += [(row, part) for part in kept.split(lengths.tolist())]
    parts = [
        [
            *((name, value[row][place]) for name, value in per_token.items()),
            *((name, value[row]) for name, value in others.items()),
        ]
        for row, place in found
    ]
    return _keys(parts), found


def _keys(parts: Sequence[Sequence[tuple[str, Tensor]]]) -> NDArray[np.uint8]:
    found = []
    for part in parts:
        digest = hashlib.blake2b(digest_size=16)
        for name, value in part:
            digest.update(name.encode() + value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        found.append(np.frombuffer(digest.digest(), np.uint8))
    return np.stack(found) if found else np.zeros((0, 16), np.uint8)


def digest_of_tokenizer(tokenizer: Any) -> str:
    """Return a hash of a tokenizer's entries."""
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()


class OutputStore:
    """The outputs of a teacher's taps in a folder, by what the teacher read; a :class:`kdgraft.sources.cached.Outputs`.

    Args:
        folder: a complete store.

    Raises:
        DistillError: there is none, or a part is missing or damaged.
    """

    def __init__(self, folder: str | Path) -> None:
        self.files = Store(folder)
        self.index = Index(self.files)
        self.taps: Mapping[str, Mapping[str, Any]] = self.files.about["taps"]
        self._absent = ""

    def stand_in(self) -> nn.Module:
        """Build the teacher without its weights: terms can be wired to it, and it cannot run.

        Raises:
            DistillError: transformers has no such class.
        """
        model = without_weights(self.files.about["teacher"], "store")
        setattr(model, STORED, True)
        return model

    def joins(self, taps: Sequence[Tap]) -> bool:
        """Return true if the store has the largest entries alone of what these taps read."""
        return any("k" in self.taps[str(tap)] for tap in taps)

    def look_up(self, ids: Sequence[Any], inputs: Mapping[str, Tensor], taps: Sequence[Tap]) -> Recording | None:
        keys, texts = texts_in(inputs)
        places = self.index.places(keys)
        if (places < 0).any():
            row, where = texts[int((places < 0).argmax())]
            tokens = inputs["input_ids"][row][where][:8].tolist() if where is not None else []
            self._absent = f"with the tokens {tokens} …" if tokens else f"{row} of this batch"
            return None
        tokens_shape = inputs["input_ids"].shape if "input_ids" in inputs else torch.Size([len(texts)])
        device = next(iter(inputs.values())).device
        found = [self.index.of(int(place)) for place in places]
        values = {tap: self._value(str(tap), found, texts, tokens_shape, device) for tap in taps}
        return KnownRecording(values)  # type: ignore[arg-type]

    def lacks(self, ids: Sequence[Any], taps: Sequence[Tap]) -> str | None:
        return (
            f"{self._absent}: the store in {self.files.folder} was filled from other data, or by another tokenizer"
            if self._absent
            else None
        )

    def store(self, *_: Any) -> None:
        """Do nothing: a store is filled before."""

    def example(self, inputs: Mapping[str, Tensor], taps: Sequence[Tap]) -> Recording:
        check_storable(taps, "a term", "a store")
        tokens = inputs.get("input_ids")
        first = next(iter(inputs.values()))
        values = {}
        for tap in taps:
            told = self.taps.get(str(tap))
            if told is None:
                raise WiringError(
                    f"the store in {self.files.folder} has {', '.join(self.taps)} of the teacher, not '{tap}'; fill it with the terms that "
                    "you train with"
                )
            lead = list(tokens.shape) if told["per"] == "token" and tokens is not None else [len(first)]
            shape = [told["classes"]] if "k" in told else told["shape"]
            values[tap] = torch.zeros([*lead, *shape], device=first.device if first.device.type != "meta" else "cpu")
        return KnownRecording(values)

    def _value(
        self,
        tap: str,
        found: Sequence[tuple[int, int, int, int]],
        texts: Sequence[tuple[int, Tensor | None]],
        shape: torch.Size,
        device: torch.device,
    ) -> Any:
        told = self.taps[tap]
        if told["per"] == "sample":
            rows = [self.files.rows(part, tap, row, row + 1) for part, row, _, _ in found]
            return torch.from_numpy(np.concatenate(rows).astype(np.float32)).to(device)

        def placed(column: str, dtype: Any, of: Any = lambda rows: rows) -> Tensor:
            whole: Tensor | None = None
            for (part, _, start, end), (row, where) in zip(found, texts, strict=True):
                rows = torch.from_numpy(
                    np.ascontiguousarray(of(self.files.rows(part, column, start, end))).astype(dtype)
                )
                if whole is None:
                    whole = torch.zeros(*shape, *rows.shape[1:], dtype=rows.dtype)
                assert where is not None
                whole[row, where.cpu()] = rows
            assert whole is not None
            return whole.to(device)

        if "k" not in told:
            return placed(tap, np.float32)
        ids = placed(f"{tap}/ids", np.int64, unpacked_ids)
        logs, norms, rests = (placed(f"{tap}/{name}", np.float32) for name in ("logs", "norms", "rests"))
        return TopK(ids, logs, norms, rests, tuple(told["temperatures"]), told["classes"])


@SOURCES.register
class Stored(Absent):
    """A teacher whose outputs are in a store; neither the teacher nor its weights are needed.

    Of language models a store may have the largest probabilities of each token alone. Divergences of them are computed with all other
    entries joined into one, which makes them smaller than they are: what is neglected is how the rest is spread (see
    :mod:`kdgraft.topk`).

    Args:
        folder: the folder that ``kdgraft cache`` filled.

    Raises:
        DistillError: there is no complete store.

    Example:
        >>> Stored("nowhere")  # doctest: +IGNORE_EXCEPTION_DETAIL
        Traceback (most recent call last):
        DistillError: there is no store in nowhere; fill one with kdgraft cache
    """

    def __init__(self, folder: str | Path) -> None:
        if not isinstance(folder, (str, Path)):
            raise DistillError(f"Stored: folder must be that of a store, got {folder!r}")
        self.outputs = OutputStore(folder)
        super().__init__(Teacher(self.outputs.stand_in()), self.outputs, absent=True)

    def check_terms(self, terms: Sequence[Term]) -> None:
        for term in terms:
            if isinstance(term, ScoreTerm) and not term.joins and self.outputs.joins(term.teacher_taps):
                raise WiringError(
                    f"{term.name} compares all classes one by one, and the store has the largest probabilities alone; fill it with "
                    "--top-k all, or take a divergence such as ForwardKL"
                )

    def check_tokenizer(self, tokenizer: Any) -> None:
        told = self.outputs.files.about.get("tokenizer")
        if told is not None and tokenizer is not None and digest_of_tokenizer(tokenizer) != told:
            raise DistillError(
                f"the store in {self.outputs.files.folder} was filled with another tokenizer; take that one, or fill it again"
            )
