"""Which of scikit-learn's handwritten digits belong to which split: disjoint sets, for every embedded set of pictures."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from sklearn.datasets import load_digits

SPLITS = ("train", "val", "test")
CLASSES = tuple("0123456789")

# The n-th picture of each class belongs to the split at n % 5: three fifths to train, one fifth each to val and test.
_SPLIT_OF_REMAINDER = ("train", "train", "val", "train", "test")


@lru_cache(maxsize=1)
def all_digits() -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Return all 1797 pictures, ink from 0 (paper) to 1, ``(1797, 8, 8)``, and their classes, ``(1797,)``."""
    data = load_digits()
    return (data.images / 16).astype(np.float32), data.target.astype(np.int64)


@lru_cache(maxsize=len(SPLITS))
def sources_of(split: str) -> NDArray[np.int64]:
    """Return the indices of the digits of ``"train"``, ``"val"`` or ``"test"`` in scikit-learn's set.

    Raises:
        ValueError: there is no such split.
    """
    if split not in SPLITS:
        raise ValueError(f"no split {split!r}: choose one of {', '.join(SPLITS)}")
    _, labels = all_digits()
    rank = np.cumsum(labels[:, None] == np.arange(10), axis=0)[np.arange(len(labels)), labels] - 1
    return np.flatnonzero(np.array(_SPLIT_OF_REMAINDER)[rank % 5] == split).astype(np.int64)
