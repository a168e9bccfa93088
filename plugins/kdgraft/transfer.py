"""Transfer sets in plain PyTorch: a share of a loader's data, and data whose labels are left out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.data import DataLoader, RandomSampler, SequentialSampler, Subset

from .errors import DistillError


def share_of(loader: Any, share: float, seed: int) -> DataLoader[Any]:
    """Return a loader of a share of the data, at least one sample, drawn with a seed.

    Raises:
        DistillError: the loader is no ``DataLoader`` with ``shuffle`` or its default order, or no batch would be left.
    """
    data: Any = _plain(loader, "data.share").dataset
    count = max(round(len(data) * share), 1)
    if loader.drop_last and count < loader.batch_size:
        raise DistillError(
            f"data.share={share:g} leaves {count} samples, and drop_last drops batches under {loader.batch_size}"
        )
    kept = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))[:count]
    return _like(loader, Subset(data, sorted(kept.tolist())), loader.collate_fn)


def unlabelled(loader: Any) -> DataLoader[Any]:
    """Return a loader of ``(inputs, None)`` from one of inputs alone, or of tuples that start with them.

    Raises:
        DistillError: the loader is no ``DataLoader`` with ``shuffle`` or its default order.
    """
    return _like(_plain(loader, "data.labels"), loader.dataset, InputsAlone(loader.collate_fn))


class InputsAlone:
    """Collates samples, and leaves out everything after the inputs.

    Args:
        collate: the function that makes a batch of samples.

    Example:
        >>> InputsAlone(torch.utils.data.default_collate)([(torch.zeros(2), 1), (torch.ones(2), 0)])
        (tensor([[0., 0.],
                [1., 1.]]), None)
    """

    def __init__(self, collate: Callable[[Any], Any]) -> None:
        self._collate = collate

    def __call__(self, rows: Any) -> tuple[Any, None]:
        batch = self._collate(rows)
        return (batch[0] if isinstance(batch, (list, tuple)) else batch), None


def _plain(loader: Any, key: str) -> DataLoader[Any]:
    sampler = getattr(loader, "sampler", None)
    plain = type(sampler) is SequentialSampler or (type(sampler) is RandomSampler and not sampler.replacement)
    if not isinstance(loader, DataLoader) or loader.batch_size is None or not plain:
        raise DistillError(
            f"{key} needs a DataLoader with a batch_size and no sampler of its own, got {type(loader).__name__}"
        )
    return loader


def _like(loader: DataLoader[Any], data: Any, collate: Callable[[Any], Any]) -> DataLoader[Any]:
    return DataLoader(
        data,
        loader.batch_size,
        shuffle=isinstance(loader.sampler, RandomSampler),
        num_workers=loader.num_workers,
        collate_fn=collate,
        pin_memory=loader.pin_memory,
        drop_last=loader.drop_last,
        worker_init_fn=loader.worker_init_fn,
        generator=loader.generator,
        persistent_workers=loader.persistent_workers,
    )
