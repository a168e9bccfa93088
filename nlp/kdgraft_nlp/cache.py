"""Cached teacher outputs: the teacher runs once for each sample, whatever the number of epochs.

The cache is only for inputs that do not change: no random masking, no augmentation. Beyer et al. (2022, arXiv 2106.05237) find
that fixed teacher outputs under changing views are much worse than the teacher's outputs on the student's own view.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from kdgraft.errors import DistillError, WiringError
from kdgraft.files import written_whole
from kdgraft.sources import KnownRecording
from kdgraft.store import fingerprint
from kdgraft.taps import Recording, Tap

from .attention import METHOD
from .tasks import accepted

TEACHER_FILE = "teacher.json"
SHARD = 1024
"""The number of new samples after which the cache writes them to its folder."""


class TeacherCache:
    """The outputs of the teacher's taps, by sample.

    Args:
        id: the column of the data set that identifies the samples, the same in every epoch and every run.
        folder: where the outputs are saved, during training and at its end; a later run reads them and needs no teacher for the
            samples in it. ``None``: the outputs are kept in memory only.
    """

    def __init__(self, id: str = "id", folder: str | Path | None = None) -> None:
        self.id = id
        self.folder = None if folder is None else Path(folder)
        self._rows: dict[str, dict[str, Tensor]] = {}
        self._per_token: set[str] = set()
        self._unsaved: set[str] = set()
        self.teacher: dict[str, Any] | None = None
        """The model that produced the outputs: its class, its config and a fingerprint of its weights."""
        self.hits = 0
        if self.folder is not None and self.folder.is_dir():
            if (self.folder / TEACHER_FILE).is_file():
                self.teacher = json.loads((self.folder / TEACHER_FILE).read_text(encoding="utf-8"))
            for file in sorted(self.folder.glob("*.safetensors")):
                for key, value in load_file(file).items():
                    sample, kind, name = key.split("\t")
                    self._rows.setdefault(sample, {})[name] = value
                    if kind == "tokens":
                        self._per_token.add(name)

    def __len__(self) -> int:
        return len(self._rows)

    def check(self, taps: Sequence[Tap], who: str) -> None:
        """Raise a :class:`WiringError` for taps whose values are not one tensor per sample."""
        check_storable(taps, who, "a cache")

    def look_up(self, ids: Sequence[Any], inputs: Mapping[str, Tensor], taps: Sequence[Tap]) -> KnownRecording | None:
        """Return the recording of these samples, or ``None`` where the cache lacks some of it.

        Raises:
            DistillError: a sample was cached with different inputs.
        """
        rows = [self._rows.get(str(i)) for i in ids]
        for sample, row, print_ in zip(ids, rows, self._prints(inputs), strict=True):
            if row is not None and not torch.equal(row["inputs"], print_):
                raise DistillError(
                    f"sample {sample!r} was cached with different inputs; use fixed tokens (no random masking) and unique ids ({self.id!r})"
                )
        if self.lacks(ids, taps) is not None:
            return None
        self.hits += len(ids)
        mask = inputs.get("attention_mask")
        values = {}
        for tap in taps:
            found = [row[str(tap)] for row in rows if row is not None]
            if str(tap) in self._per_token and mask is not None:
                batch = found[0].new_zeros(*mask.shape, *found[0].shape[1:])
                batch[mask.bool().cpu()] = torch.cat(found)
            elif len({row.shape for row in found}) > 1:
                raise DistillError(
                    f"the output of '{tap}' of the teacher depends on padding, which no attention mask gives; leave out the cache"
                )
            else:
                batch = torch.stack(found)
            values[tap] = batch.to(next(iter(inputs.values())).device)
        return KnownRecording(values)

    def lacks(self, ids: Sequence[Any], taps: Sequence[Tap]) -> str | None:
        """Return the first sample and tap that are not cached, or ``None`` where all are."""
        return next((f"{i!r} ({tap})" for i in ids for tap in taps if str(tap) not in self._rows.get(str(i), {})), None)

    def example(self, inputs: Mapping[str, Tensor], taps: Sequence[Tap]) -> KnownRecording:
        """Return zeros in the shapes that a dry run of the teacher would record.

        Raises:
            WiringError: the cache holds no value of a tap.
        """
        values = {}
        for tap in taps:
            row = next((row[str(tap)] for row in self._rows.values() if str(tap) in row), None)
            if row is None:
                raise WiringError(
                    f"the cache holds nothing of '{tap}' of the {(self.teacher or {}).get('class')}; give teacher=…, or use the terms that filled it"
                )
            tokens = inputs.get("attention_mask", inputs.get("input_ids"))
            first = next(iter(inputs.values()))
            shape = [*tokens.shape, *row.shape[1:]] if str(tap) in self._per_token and tokens is not None else None
            values[tap] = row.new_zeros(shape if shape is not None else [len(first), *row.shape]).to(first.device)
        return KnownRecording(values)

    def belongs_to(self, model: nn.Module) -> None:
        """Set the teacher that produces the outputs.

        Raises:
            DistillError: the cache holds another teacher's outputs, or the model has a decoder, whose outputs depend on the
                padding of the targets.
        """
        if "decoder_input_ids" in accepted(model):
            raise DistillError(
                f"a cache cannot hold outputs of a model with a decoder ({type(model).__name__}); leave out the cache"
            )
        own = {"class": type(model).__name__, "weights": fingerprint(model)}
        if self.teacher is not None:
            known = {name: self.teacher.get(name) for name in own}
            comparable = own["weights"] is not None and known["weights"] is not None
            if own["class"] != known["class"] or (comparable and own != known):
                raise DistillError(
                    f"the cache{'' if self.folder is None else f' in {self.folder}'} holds the outputs of another teacher (a "
                    f"{known['class']}{' with other weights' if own['class'] == known['class'] else ''}); give each teacher its own"
                )
            return
        config: Any = model.config
        self.teacher = {**own, "config": json.loads(config.to_json_string())}

    def stand_in(self) -> nn.Module:
        """Build the teacher without its weights: terms can be wired to it, and it cannot run.

        Raises:
            DistillError: transformers has no such class.
        """
        return without_weights(self.teacher or {}, "cache")

    def store(
        self, ids: Sequence[Any], inputs: Mapping[str, Tensor], recording: Recording, taps: Sequence[Tap]
    ) -> None:
        """Store the outputs of the taps; of values per token, only those of tokens that are not padding."""
        mask = inputs.get("attention_mask")
        for sample, print_ in zip(ids, self._prints(inputs), strict=True):
            self._rows.setdefault(str(sample), {})["inputs"] = print_
        for tap in taps:
            value = recording[tap]
            value = value[0] if isinstance(value, (tuple, list)) else value
            if len(value) != len(ids):
                raise WiringError(
                    f"'{tap}' has {len(value)} rows for {len(ids)} samples, which cannot be cached; leave out the cache or the term"
                )
            per_token = mask is not None and value.shape[:2] == mask.shape
            per_token = per_token and (value.ndim == 3 or tap.text in ("[start_logits]", "[end_logits]"))
            if per_token:
                self._per_token.add(str(tap))
            for i, sample in enumerate(ids):
                row = value[i]
                if per_token and mask is not None:
                    row = row[mask[i].bool()]
                self._rows[str(sample)][str(tap)] = row.detach().cpu().clone()
        self._unsaved.update(map(str, ids))
        if self.folder is not None and len(self._unsaved) >= SHARD:
            self.save()

    def save(self) -> None:
        """Write the new samples to the folder, which several processes may share."""
        if self.folder is None:
            raise DistillError("this cache is kept in memory only; create it with TeacherCache(folder=…) to save it")
        if not self._unsaved:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.teacher is not None:
            with written_whole(self.folder / TEACHER_FILE) as file:
                file.write_text(json.dumps(self.teacher), encoding="utf-8")
        found = {
            f"{sample}\t{'tokens' if name in self._per_token else 'sample'}\t{name}": value.contiguous()
            for sample in sorted(self._unsaved)
            for name, value in self._rows[sample].items()
        }
        with written_whole(self.folder / f"{uuid.uuid4().hex}.safetensors") as file:
            save_file(found, file)
        self._unsaved.clear()

    def _prints(self, inputs: Mapping[str, Tensor]) -> list[Tensor]:
        """Return a fingerprint of each sample's inputs that does not depend on padding."""
        mask = inputs.get("attention_mask")
        names = sorted(name for name, value in inputs.items() if isinstance(value, Tensor) and value.ndim)
        count = len(inputs[names[0]])
        found = []
        for i in range(count):
            digest = hashlib.sha256()
            for name in names:
                row = inputs[name][i]
                if mask is not None and row.shape[:1] == mask.shape[1:]:
                    row = row[mask[i].bool()]
                digest.update(name.encode() + row.detach().cpu().contiguous().numpy().tobytes())
            found.append(torch.frombuffer(bytearray(digest.digest()[:8]), dtype=torch.uint8).clone())
        return found


def without_weights(told: Mapping[str, Any], what: str) -> nn.Module:
    """Build a model without its weights, on the meta device.

    Args:
        told: its ``class`` and ``config``.
        what: what holds its outputs, ``"cache"`` or ``"store"``.

    Raises:
        DistillError: transformers has no such class.
    """
    kind = getattr(transformers, str(told.get("class")), None)
    if kind is None:
        raise DistillError(
            f"transformers has no {told.get('class')}, whose outputs the {what} holds; pass the model as teacher=…"
        )
    with torch.device("meta"):
        found: nn.Module = kind(kind.config_class.from_dict(told["config"]))
    return found


def check_storable(taps: Sequence[Tap], who: str, what: str) -> None:
    """Raise a :class:`WiringError` for taps whose values are not one tensor per sample.

    Args:
        taps: the taps of a term on the teacher.
        who: the term's name.
        what: what is to hold their values, such as ``"a cache"``.
    """
    for tap in taps:
        if tap.leaf:
            raise WiringError(
                f"{who} differentiates the teacher, which {what} does not run; leave out the term, or give the teacher"
            )
        if tap.parameters:
            raise WiringError(
                f"{who} reads weights ('{tap}'), which belong to no sample and so to no {what[2:]}; leave out the term, or give the teacher"
            )
        if tap.method == METHOD:
            raise WiringError(
                f"{who} reads attention ('{tap}'), whose maps are too large for {what}; leave out the term, or give the teacher"
            )
