"""Cached teacher outputs: the teacher runs once a sample, however many epochs there are.

Only for inputs that do not change: no random masking, no augmentation. (Beyer et al. 2022, arXiv 2106.05237, find that fixed
teacher outputs under changing views are much worse than the teacher on the student's own view.)
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from kdgraft.errors import DistillError, WiringError
from kdgraft.taps import Recording, Tap

from .attention import METHOD
from .tasks import accepted

TEACHER_FILE = "teacher.json"
SHARD = 1024
"""After so many new samples the cache writes them to its folder."""


class TeacherCache:
    """What the teacher's taps gave, by sample.

    Args:
        id: the column of the data set that tells the samples apart, the same in every epoch and every run.
        folder: where the outputs are kept, during training and at its end, and where a new run finds them; it then needs no
            teacher for samples that are there. ``None``: in memory alone.
    """

    def __init__(self, id: str = "id", folder: str | Path | None = None) -> None:
        self.id = id
        self.folder = None if folder is None else Path(folder)
        self._rows: dict[str, dict[str, Tensor]] = {}
        self._per_token: set[str] = set()
        self._unsaved: set[str] = set()
        self.teacher: dict[str, Any] | None = None
        """Which model the outputs are of: its class, its config and a fingerprint of its weights."""
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
        """Refuses taps whose values are not one tensor a sample."""
        for tap in taps:
            if tap.method == METHOD:
                raise WiringError(
                    f"{who} reads attention ('{tap}'), which is not cached: a map of every layer is larger than the teacher's "
                    "pass is slow; leave the cache or the term out"
                )

    def look_up(self, ids: Sequence[Any], inputs: Mapping[str, Tensor], taps: Sequence[Tap]) -> CachedRecording | None:
        """What is cached for these samples; ``None`` unless that is everything.

        Raises:
            DistillError: a sample was cached with other inputs.
        """
        rows = [self._rows.get(str(i)) for i in ids]
        for sample, row, print_ in zip(ids, rows, self._prints(inputs), strict=True):
            if row is not None and not torch.equal(row["inputs"], print_):
                raise DistillError(
                    f"sample {sample!r} was cached with other inputs; cached outputs need the same tokens every time (no random "
                    f"masking) and ids that name one sample each (column {self.id!r})"
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
                    f"what '{tap}' of the teacher gives depends on how a batch is padded, and no attention mask says where; leave the "
                    "cache out"
                )
            else:
                batch = torch.stack(found)
            values[tap] = batch.to(next(iter(inputs.values())).device)
        return CachedRecording(values)

    def lacks(self, ids: Sequence[Any], taps: Sequence[Tap]) -> str | None:
        """The first sample of which something is not there, and what; ``None`` where all is."""
        return next((f"{i!r} ({tap})" for i in ids for tap in taps if str(tap) not in self._rows.get(str(i), {})), None)

    def example(self, inputs: Mapping[str, Tensor], taps: Sequence[Tap]) -> CachedRecording:
        """What a dry run of the teacher would record, as far as shapes go.

        Raises:
            WiringError: nothing of a tap is cached.
        """
        values = {}
        for tap in taps:
            row = next((row[str(tap)] for row in self._rows.values() if str(tap) in row), None)
            if row is None:
                raise WiringError(
                    f"the cache holds nothing of '{tap}' of the {(self.teacher or {}).get('class')}; give teacher=…, so that it can "
                    "be added, or use the terms that the cache was filled with"
                )
            tokens = inputs.get("attention_mask", inputs.get("input_ids"))
            first = next(iter(inputs.values()))
            shape = [*tokens.shape, *row.shape[1:]] if str(tap) in self._per_token and tokens is not None else None
            values[tap] = row.new_zeros(shape if shape is not None else [len(first), *row.shape]).to(first.device)
        return CachedRecording(values)

    def belongs_to(self, model: nn.Module) -> None:
        """Notes which teacher the outputs are of.

        Raises:
            DistillError: they are of another one, or a decoder's, which depend on how targets are padded.
        """
        if "decoder_input_ids" in accepted(model):
            raise DistillError(
                f"a cache keeps no outputs of a model with a decoder ({type(model).__name__}); leave the cache out"
            )
        own = {"class": type(model).__name__, "weights": _fingerprint(model)}
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
        """The teacher's structure without its weights: enough to wire terms, not to run.

        Raises:
            DistillError: its class is not one of transformers.
        """
        told = self.teacher or {}
        kind = getattr(transformers, str(told.get("class")), None)
        if kind is None:
            raise DistillError(
                f"the cache is of a {told.get('class')}, which transformers does not have; give teacher=…, the model"
            )
        with torch.device("meta"):
            return kind(kind.config_class.from_dict(told["config"]))

    def store(
        self, ids: Sequence[Any], inputs: Mapping[str, Tensor], recording: Recording, taps: Sequence[Tap]
    ) -> None:
        """Keeps what the taps gave; of values per token those of real tokens."""
        mask = inputs.get("attention_mask")
        for sample, print_ in zip(ids, self._prints(inputs), strict=True):
            self._rows.setdefault(str(sample), {})["inputs"] = print_
        for tap in taps:
            value = recording[tap]
            value = value[0] if isinstance(value, (tuple, list)) else value
            if len(value) != len(ids):
                raise WiringError(
                    f"'{tap}' has {len(value)} rows for {len(ids)} samples, which cannot be cached; leave the cache or the term out"
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
        """Writes what is new to the folder; several processes may share it."""
        if self.folder is None:
            raise DistillError("this cache is in memory alone; TeacherCache(folder=…) has a place to save to")
        if not self._unsaved:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.teacher is not None:
            text = json.dumps(self.teacher)
            _replace(self.folder / TEACHER_FILE, lambda file: file.write_text(text, encoding="utf-8"))
        found = {
            f"{sample}\t{'tokens' if name in self._per_token else 'sample'}\t{name}": value.contiguous()
            for sample in sorted(self._unsaved)
            for name, value in self._rows[sample].items()
        }
        _replace(self.folder / f"{uuid.uuid4().hex}.safetensors", lambda file: save_file(found, file))
        self._unsaved.clear()

    def _prints(self, inputs: Mapping[str, Tensor]) -> list[Tensor]:
        """A fingerprint of each sample's inputs, whatever it is padded to."""
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


def _replace(file: Path, write: Callable[[Path], Any]) -> None:
    """Writes a file beside its place and then puts it there, so that nobody reads half of it."""
    beside = file.with_name(f".{uuid.uuid4().hex}.tmp")
    write(beside)
    os.replace(beside, file)


def _fingerprint(model: nn.Module) -> str | None:
    """Tells the weights of two models apart by some of them; ``None`` where they are not at hand."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            return None
        flat = parameter.detach().flatten()
        some = flat[:: max(len(flat) // 16, 1)].double().cpu()
        digest.update(f"{name}{tuple(parameter.shape)}".encode() + some.numpy().tobytes())
    return digest.hexdigest()


class CachedRecording(Recording):
    """Stands for the recording of a teacher that did not run."""

    def __init__(self, values: Mapping[Tap, Tensor]) -> None:
        super().__init__("teacher", {}, set())
        self._values = dict(values)

    def __getitem__(self, tap: Tap) -> Tensor:
        return self._values[tap]
