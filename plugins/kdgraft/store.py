"""Outputs of a teacher on disk: parts of a fixed number of samples, each written once, that any process can write and map.

The content of a part follows from its number alone, so that a store that was interrupted and completed is the same, byte for byte.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

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
            about: what it holds; ``samples`` and ``per_part`` among it.

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
                raise DistillError(
                    f"the store in {self.folder} is not complete: {len(self.missing())} of {self.parts} parts are missing; run "
                    "kdgraft cache again, which goes on where it was"
                )
            if digest_of_file(path) != told.read_text(encoding="utf-8"):
                raise DistillError(f"{path} is damaged; remove it and {told.name}, and run kdgraft cache again")

    def rows(self, part: int, column: str, start: int, end: int) -> NDArray[Any]:
        """Return rows of a column, from the file that is mapped into memory; its checksum is compared at the first use."""
        return np.asarray(self._open(part).get_slice(column)[start:end])

    def whole(self, part: int, column: str) -> NDArray[Any]:
        """Return a column of a part."""
        return np.asarray(self._open(part).get_tensor(column))

    def _open(self, part: int) -> Any:
        if part not in self._opened:
            self.check([part])
            try:
                self._opened[part] = safe_open(self._path_of(part), "np")
            except (SafetensorError, OSError) as error:
                raise DistillError(f"{self._path_of(part)} cannot be read: {error}") from None
        return self._opened[part]

    def _path_of(self, part: int) -> Path:
        return self.folder / f"part-{part:06d}.safetensors"

    def _sum_of(self, part: int) -> Path:
        return self.folder / f"part-{part:06d}.sha256"


class Index:
    """Where each key of a complete store is.

    Args:
        store: the store.

    Raises:
        DistillError: a part is missing or damaged.
    """

    def __init__(self, store: Store) -> None:
        keys, lengths, parts, rows, starts = [], [], [], [], []
        for part in range(store.parts):
            length = store.whole(part, LENGTHS)
            keys.append(store.whole(part, KEYS))
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
