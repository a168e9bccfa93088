"""Transfer sets of plans in configs of mm projects, and schedules that end early.

The changed config is one of the host alone: shares are lists of ``indices``, and labels are left out of a copy of the annotations.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.registry import DATASETS, DefaultScope

from kdgraft.errors import DistillError
from kdgraft.files import written_whole
from kdgraft.hosts import TransferSet

from .configs import load_config

UNLABELLED = "unlabelled.json"
"""The file in a run's folder that has the annotations of its training set without the objects."""


def transfer(config: Config, data: TransferSet, seed: int, folder: Path, scope: str) -> None:
    """Change the training set of a config.

    Args:
        config: the config to change.
        data: the transfer set; its set is a config whose training set is taken.
        seed: the seed with which a share is drawn.
        folder: the run's folder, for annotations without labels.
        scope: the host's registry scope.

    Raises:
        DistillError: the training set is of several, cannot be drawn from, or has no annotations in COCO's format.
    """
    if data.set is not None:
        config.train_dataloader.dataset = _training_set(load_config(data.set), data.set)
    innermost = _training_set(config, str(config.filename or "the config"))
    while "dataset" in innermost:
        innermost = innermost["dataset"]
    if "datasets" in innermost:
        raise DistillError("data: the training set is of several; name one of them in a config, as data.set")
    if not data.labels:
        _leave_labels_out(innermost, folder)
    if data.share != 1:
        innermost["indices"] = _drawn(innermost, data.share, seed, scope)


def _training_set(config: Config, name: str) -> Any:
    found = (config.get("train_dataloader") or {}).get("dataset")
    if not isinstance(found, Mapping):
        raise DistillError(f"{name} has no training set: train_dataloader with a dataset")
    return found


def _drawn(dataset: Any, share: float, seed: int, scope: str) -> list[int]:
    """Return the indices of a share of a set, as its own filter leaves it."""
    with DefaultScope.overwrite_default_scope(scope):
        built = DATASETS.build(dict(dataset, lazy_init=False))
    if not hasattr(built, "get_subset_"):
        raise DistillError(f"data.share needs a dataset with indices, such as CocoDataset, got {type(built).__name__}")
    kept = torch.randperm(len(built), generator=torch.Generator().manual_seed(seed))
    return sorted(kept[: max(round(len(built) * share), 1)].tolist())


def _leave_labels_out(dataset: Any, folder: Path) -> None:
    """Point a dataset in COCO's format to a copy of its annotations without objects, and let it keep pictures without any."""
    file = Path(dataset.get("data_root") or "") / str(dataset.get("ann_file", ""))
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        whole = {**found, "annotations": []}
    except (OSError, ValueError, TypeError):
        raise DistillError(
            f"data.labels: {file} holds no annotations in COCO's format, from which objects could be left out"
        ) from None
    with written_whole(folder / UNLABELLED) as part:
        part.write_text(json.dumps(whole), encoding="utf-8")
    dataset["ann_file"] = str((folder / UNLABELLED).resolve())
    dataset["filter_cfg"] = {**(dataset.get("filter_cfg") or {}), "filter_empty_gt": False}


def end_early(config: Config, stop: int) -> None:
    """End a training before its schedule does, in the iterations or epochs in which its loop counts.

    Raises:
        DistillError: the training is shorter, or a scheduler would end with the training rather than with the schedule.
    """
    loop = config.get("train_cfg") or {}
    unit = "max_iters" if loop.get("max_iters") else "max_epochs"
    whole = loop.get(unit)
    if not whole or stop > whole:
        raise DistillError(f"stop must be at most train_cfg.{unit}={whole}, got {stop}")
    schedulers = config.get("param_scheduler") or []
    for scheduler in schedulers if isinstance(schedulers, list) else [schedulers]:
        if "end" in scheduler:
            continue
        if scheduler.get("by_epoch", True) != (unit == "max_epochs"):
            raise DistillError(
                f"stop: give the scheduler {scheduler.get('type')} an end, which would be that of the training"
            )
        scheduler["end"] = whole
    loop[unit] = stop
