"""Outputs of a teacher on disk: parts of a fixed number of samples, each written once, that any process can write and map.

The content of a part follows from its number alone, so that a store that was interrupted and completed is the same, byte for byte.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import nn

from .errors import DistillError
from .files import digest_of_file, written_whole

HEADER = "store.json"
FORMAT = 1
KEYS, LENGTHS = "keys", "lengths"
"""The columns that every part has: the key of each text or sample, 16 bytes, and its number of tokens."""
Columns = Mapping[str, NDArray[Any]]


class Store:
    """A folder of parts.

    Args:
        folder: the folder.

    Raises:
        DistillError: there is no store, or it is of another format.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        try:
            self.about: dict[str, Any] = json.loads((self.folder / HEADER).read_text(encoding="utf-8"))
        except OSError:
            raise DistillError(f"there is no store in {folder}; fill one with kdgraft cache") from None
        except ValueError:
            raise DistillError(f"{self.folder / HEADER} is damaged; remove the folder, and fill it again") from None
        if not isinstance(self.about, dict) or not {"format", "samples", "per_part", "taps"} <= set(self.about):
            raise DistillError(f"{self.folder / HEADER} is damaged; remove the folder, and fill it again")
        if self.about["format"] != FORMAT:
            raise DistillError(
                f"the store in {folder} is of format {self.about['format']}, not {FORMAT}; fill it again"
            )
        self._opened: dict[int, Any] = {}

    @classmethod
    def create(cls, folder: str | Path, about: Mapping[str, Any]) -> Store:
        """Begin a store, or return the one that was begun with the same settings.

        Args:
            folder: its folder.
            about: what it holds; ``samples`` and ``per_part`` among it. Hosts whose samples arrive in batches of a fixed order count
                these batches.

        Raises:
            DistillError: the folder has a store of something else; the message says what differs.
        """
        folder, told = Path(folder), json.loads(json.dumps({"format": FORMAT, **about}))
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / HEADER).is_file():
            known = cls(folder).about
            other = sorted(key for key in told.keys() | known.keys() if told.get(key) != known.get(key))
            if other:
                raise DistillError(
                    f"{folder} has a store of something else ({', '.join(other)} differ); remove it, or name another folder"
                )
            return cls(folder)
        with written_whole(folder / HEADER) as part:
            part.write_text(json.dumps(told, indent=1), encoding="utf-8")
        return cls(folder)

    @property
    def parts(self) -> int:
        """The number of parts of the complete store."""
        return -(-int(self.about["samples"]) // int(self.about["per_part"]))

    def missing(self) -> list[int]:
        """Return the numbers of the parts that are not written yet."""
        return [
            number
            for number in range(self.parts)
            if not (self._sum_of(number).is_file() and self._path_of(number).is_file())
        ]

    def samples_of(self, part: int) -> range:
        """Return the places of a part's samples in the data set."""
        size = int(self.about["per_part"])
        return range(part * size, min((part + 1) * size, int(self.about["samples"])))

    def write(self, part: int, columns: Columns) -> None:
        """Write a part: :data:`KEYS`, :data:`LENGTHS`, and columns with a row for each sample or for each token."""
        path = self._path_of(part)
        with written_whole(path) as beside:
            save_file({name: np.ascontiguousarray(value) for name, value in columns.items()}, beside)
        with written_whole(self._sum_of(part)) as beside:  # last, as it says that the part is complete
            beside.write_text(digest_of_file(path), encoding="utf-8")

    def size(self) -> int:
        """Return the bytes of all parts."""
        return sum(os.path.getsize(self._path_of(part)) for part in range(self.parts) if self._path_of(part).is_file())

    def check(self, parts: Iterable[int] | None = None) -> None:
        """Compare parts, all of them by default, with their checksums.

        Raises:
            DistillError: one is missing or damaged.
        """
        for part in range(self.parts) if parts is None else parts:
            path, told = self._path_of(part), self._sum_of(part)
            if not told.is_file() or not path.is_file():
                self.check_complete()
            if digest_of_file(path) != told.read_text(encoding="utf-8"):
                raise DistillError(f"{path} is damaged; remove it and {told.name}, and run kdgraft cache again")

    def check_complete(self) -> None:
        """Raise a :class:`DistillError` if parts are missing."""
        missing = len(self.missing())
        if missing:
            raise DistillError(
                f"the store in {self.folder} is not complete: {missing} of {self.parts} parts are missing; run kdgraft cache again, "
                "which goes on where it was"
            )

    def rows(self, part: int, column: str, start: int, end: int) -> NDArray[Any]:
        """Return rows of a column, from the file that is mapped into memory; its checksum is compared at the first use."""
        return np.asarray(self._open(part).get_slice(column)[start:end])

    def whole(self, part: int, column: str, *, checked: bool = True) -> NDArray[Any]:
        """Return a column of a part; ``checked=False`` does not read the whole part to compare its checksum."""
        return np.asarray((self._open(part) if checked else self._mapped(part)).get_tensor(column))

    def _open(self, part: int) -> Any:
        if part not in self._opened:
            self.check([part])
            self._opened[part] = self._mapped(part)
        return self._opened[part]

    def _mapped(self, part: int) -> Any:
        try:
            return safe_open(self._path_of(part), "np")
        except (SafetensorError, OSError) as error:
            raise DistillError(f"{self._path_of(part)} cannot be read: {error}") from None

    def _path_of(self, part: int) -> Path:
        return self.folder / f"part-{part:06d}.safetensors"

    def _sum_of(self, part: int) -> Path:
        return self.folder / f"part-{part:06d}.sha256"


class Index:
    """Where each key of a complete store is.

    Args:
        store: the store.
        checked: compare the checksum of every part now; else that of each part when a row of it is first read.

    Raises:
        DistillError: a part is missing or damaged.
    """

    def __init__(self, store: Store, *, checked: bool = True) -> None:
        store.check_complete()
        keys, lengths, parts, rows, starts = [], [], [], [], []
        for part in range(store.parts):
            length = store.whole(part, LENGTHS, checked=checked)
            keys.append(store.whole(part, KEYS, checked=checked))
            lengths.append(length)
            parts.append(np.full(len(length), part))
            rows.append(np.arange(len(length)))
            starts.append(np.cumsum(length) - length)
        self._keys = _halves(np.concatenate(keys))
        self._where = np.stack([np.concatenate(each) for each in (parts, rows, starts, lengths)], 1)
        self._order = np.argsort(self._keys[:, 0], kind="stable")
        self._sorted = self._keys[self._order, 0]

    def __len__(self) -> int:
        return len(self._keys)

    @property
    def tokens(self) -> int:
        """The number of tokens of all texts."""
        return int(self._where[:, 3].sum())

    def places(self, keys: NDArray[np.uint8]) -> NDArray[np.int64]:
        """Return the place of each key ``(n, 16)``; −1 for one that is not there."""
        wanted = _halves(keys)
        near = self._order[np.searchsorted(self._sorted, wanted[:, 0]).clip(max=len(self) - 1)]
        return np.where((self._keys[near] == wanted).all(1), near, -1)

    def of(self, place: int) -> tuple[int, int, int, int]:
        """Return the part of a place, its row in it, and the first of its rows of tokens and the one after its last."""
        part, row, start, length = (int(value) for value in self._where[place])
        return part, row, start, start + length


def _halves(keys: NDArray[np.uint8]) -> NDArray[np.uint64]:
    return np.ascontiguousarray(keys).view(np.uint64).reshape(-1, 2)


def packed_ids(ids: NDArray[Any], classes: int) -> NDArray[Any]:
    """Return classes in as few bytes as they need: 2 up to 65536 classes, 3 up to 16.7 million; ``(…)`` or ``(…, 3)``."""
    if classes <= 1 << 16:
        return ids.astype(np.uint16)
    if classes > 1 << 24:
        raise DistillError(f"a store has at most {1 << 24} classes, got {classes}")
    wide = np.ascontiguousarray(ids.astype("<u4")).view(np.uint8).reshape(*ids.shape, 4)
    return np.ascontiguousarray(wide[..., :3])


def unpacked_ids(packed: NDArray[Any]) -> NDArray[np.int64]:
    """Return the classes of :func:`packed_ids`."""
    if packed.dtype == np.uint16:
        return packed.astype(np.int64)
    return (packed.astype(np.int64) * np.array([1, 1 << 8, 1 << 16])).sum(-1)


def narrowed(numbers: NDArray[np.float32], values: str) -> NDArray[Any]:
    """Return numbers as ``"float16"`` or ``"float32"``.

    Raises:
        DistillError: some are too large for it.
    """
    with np.errstate(over="ignore"):
        found: NDArray[Any] = numbers.astype(values)
    if np.isfinite(numbers).all() and not np.isfinite(found).all():
        raise DistillError("numbers of the teacher exceed those of float16; take values='float32' (--values float32)")
    return found


def rounded(numbers: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Return numbers as whole ones from -127 to 127, and their unit: one for each channel of a map ``(C, …)``, else one for all.

    A number is off by at most half a unit, which is the largest absolute value of its channel divided by 254.

    Raises:
        DistillError: some are not finite.

    Example:
        >>> from kdgraft.store import rounded
        >>> whole, unit = rounded(np.array([-2.54, 0.0, 1.27], np.float32))
        >>> whole.tolist(), round(float(unit[0]), 4)
        ([-127, 0, 64], 0.02)
    """
    if not np.isfinite(numbers).all():
        raise DistillError("some outputs of the teacher are not finite, which int8 cannot say; take --values float32")
    axes = tuple(range(1, numbers.ndim)) if numbers.ndim > 2 else tuple(range(numbers.ndim))
    unit = (np.abs(numbers).max(axes, keepdims=True, initial=0) / 127).astype(np.float32)
    return np.rint(numbers / np.where(unit > 0, unit, 1)).astype(np.int8), unit


def fingerprint(model: nn.Module) -> str | None:
    """Return a fingerprint of a sample of a model's weights; ``None`` where they are on the meta device."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            return None
        flat = parameter.detach().flatten()
        some = flat[:: max(len(flat) // 16, 1)].double().cpu()
        digest.update(f"{name}{tuple(parameter.shape)}".encode() + some.numpy().tobytes())
    return digest.hexdigest()
