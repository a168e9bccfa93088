"""Cached teacher outputs: the teacher runs once a sample, however many epochs there are.

Only for inputs that do not change: no random masking, no augmentation. (Beyer et al. 2022, arXiv 2106.05237, find that fixed
teacher outputs under changing views are much worse than the teacher on the student's own view.)
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from kdgraft.errors import DistillError, WiringError
from kdgraft.taps import Recording, Tap

from .attention import METHOD


class TeacherCache:
    """What the teacher's taps gave, by sample.

    Args:
        id: the column of the data set that tells the samples apart, the same in every epoch and every run.
        folder: where :meth:`save` puts the outputs and a new run finds them; ``None``: in memory alone.
    """

    def __init__(self, id: str = "id", folder: str | Path | None = None) -> None:
        self.id = id
        self.folder = None if folder is None else Path(folder)
        self._rows: dict[str, dict[str, Tensor]] = {}
        self._per_token: set[str] = set()
        self.hits = 0
        if self.folder is not None and self.folder.is_dir():
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
        if any(row is None or any(str(tap) not in row for tap in taps) for row in rows):
            return None
        for sample, row, print_ in zip(ids, rows, self._prints(inputs), strict=True):
            if row is not None and not torch.equal(row["inputs"], print_):
                raise DistillError(
                    f"sample {sample!r} was cached with other inputs; cached outputs need the same tokens every time (no random "
                    f"masking) and ids that name one sample each (column {self.id!r})"
                )
        self.hits += len(ids)
        mask = inputs.get("attention_mask")
        values = {}
        for tap in taps:
            found = [row[str(tap)] for row in rows if row is not None]
            if str(tap) in self._per_token and mask is not None:
                batch = found[0].new_zeros(*mask.shape, *found[0].shape[1:])
                batch[mask.bool().cpu()] = torch.cat(found)
            else:
                batch = torch.stack(found)
            values[tap] = batch.to(next(iter(inputs.values())).device)
        return CachedRecording(values)

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
            per_token = mask is not None and (value.ndim == 3 or tap.text in ("[start_logits]", "[end_logits]"))
            if per_token:
                self._per_token.add(str(tap))
            for i, sample in enumerate(ids):
                row = value[i]
                if per_token and mask is not None:
                    row = row[mask[i].bool()]
                self._rows[str(sample)][str(tap)] = row.detach().cpu().clone()

    def save(self) -> None:
        """Writes everything to the folder."""
        if self.folder is None:
            raise DistillError("this cache is in memory alone; TeacherCache(folder=…) has a place to save to")
        self.folder.mkdir(parents=True, exist_ok=True)
        found = {
            f"{sample}\t{'tokens' if name in self._per_token else 'sample'}\t{name}": value.contiguous()
            for sample, row in self._rows.items()
            for name, value in row.items()
        }
        save_file(found, self.folder / "outputs.safetensors")

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


class CachedRecording(Recording):
    """Stands for the recording of a teacher that did not run."""

    def __init__(self, values: Mapping[Tap, Tensor]) -> None:
        super().__init__("teacher", {}, set())
        self._values = dict(values)

    def __getitem__(self, tap: Tap) -> Tensor:
        return self._values[tap]
