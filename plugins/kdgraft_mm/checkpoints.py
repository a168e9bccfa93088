"""Checkpoints of mmengine: what is harmless in them, and exporting the plain student."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from kdgraft.teacher import read_checkpoint, weights_of
from mmengine.config import Config

from kdgraft.errors import DistillError

from .configs import plain_config


def _numpy_types() -> list[Any]:
    multiarray = (np._core if hasattr(np, "_core") else np.core).multiarray
    dtypes = {
        type(np.dtype(kind))
        for kind in ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "?", "S", "U")
    }
    return [np.ndarray, np.dtype, multiarray._reconstruct, multiarray.scalar, *dtypes]


class _Ignored:
    """Stands for a log history while a checkpoint is read: nothing here needs one, and nothing of it runs."""

    def __setstate__(self, state: Any) -> None:
        pass


def _no_attribute(*_: Any) -> None:
    """Stands for ``getattr``, by which a pickled history names its statistics methods; allowing the real one would be no safety."""


# What mmengine's own checkpoints contain beside tensors: log histories, which are numpy arrays with a little around them.
SAFE_TYPES: tuple[Any, ...] = (
    (_Ignored, "mmengine.logging.history_buffer.HistoryBuffer"),
    (_no_attribute, "builtins.getattr"),
    *_numpy_types(),
)


def export_student(checkpoint: str | Path, out: str | Path, *, trusted: bool = False) -> tuple[Path, Path]:
    """Writes the plain student: its weights, with the plain config in ``meta``, and that config beside it as ``.py``.

    From a checkpoint of an EMA run these are the averaged weights, as mmengine stores them.

    Args:
        checkpoint: one of a distilled run.
        out: where to write, ``student.pth``.
        trusted: read a checkpoint that holds arbitrary pickled objects.

    Returns:
        The two files written.

    Raises:
        DistillError: the checkpoint cannot be read or holds no config.
    """
    out = Path(out)
    if out.suffix == ".py" or out.is_dir() or out.resolve() == Path(checkpoint).expanduser().resolve():
        raise DistillError(f"cannot write the student to {out}; name a new file such as student.pth")
    source = read_checkpoint(checkpoint, trusted=trusted, safe_types=SAFE_TYPES)
    meta = dict(source.get("meta") or {})
    text = meta.get("cfg") or meta.get("config")
    if not text:
        raise DistillError(f"checkpoint {checkpoint} holds no config in meta['cfg']; it was not saved by a Runner")
    config = plain_config(Config.fromstring(text, file_format=".py"))
    meta["cfg"] = config.pretty_text
    out.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"meta": meta, "state_dict": weights_of(source)}, out)
    described = out.with_suffix(".py")
    config.dump(described)
    return out, described
