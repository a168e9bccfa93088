"""Checkpoints of mmengine: the types that are safe to load, and the export of the plain student."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.logging import HistoryBuffer

from kdgraft.errors import DistillError
from kdgraft.files import written_whole
from kdgraft.sources.teacher import read_checkpoint, weights_of

from .configs import executed_config, literal_config, peer_config, plain_config
from .state import KEY


def _numpy_types() -> list[Any]:
    makers = [value.__reduce__()[0] for value in (np.zeros(0), np.float64(0))]  # pickle calls them to make the values
    kinds = ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "?", "S", "U")
    return [np.ndarray, np.dtype, *makers, *{type(np.dtype(kind)) for kind in kinds}]


class _History(HistoryBuffer):
    """A log history read from a file, without the methods that the file names for it."""

    def __setstate__(self, state: Any) -> None:
        state.pop("statistics_methods", None)
        super().__init__()
        self.__dict__.update(state)
        self.__class__ = HistoryBuffer  # so that saving it again writes mmengine's own class


def _no_attribute(*_: Any) -> None:
    """Replace ``getattr``, which a pickled history calls to find its statistics methods and which would not be safe to allow."""


# Besides tensors, mmengine's own checkpoints contain log histories, which are numpy arrays in a small wrapper.
SAFE_TYPES: tuple[Any, ...] = (
    (_History, "mmengine.logging.history_buffer.HistoryBuffer"),
    (_no_attribute, "builtins.getattr"),
    *_numpy_types(),
)


def export_student(
    checkpoint: str | Path, out: str | Path, *, peer: str | None = None, trusted: bool = False, force: bool = False
) -> tuple[Path, Path]:
    """Write the plain student, or a peer: weights with the plain config in ``meta``, and that config beside them as ``.py``.

    The checkpoint of an EMA run yields the student's averaged weights, as mmengine stores them; a peer is not averaged.

    Args:
        checkpoint: a checkpoint of a distilled run.
        out: the file to write, such as ``student.pth``.
        peer: the name of the peer to write instead of the student.
        trusted: read a checkpoint with arbitrary pickled objects, and a config that is a file or holds more than literals.
        force: overwrite existing files.

    Returns:
        The two files. In case of an error neither of them is written.

    Raises:
        DistillError: the checkpoint cannot be read or holds no config or no such peer, or a file exists already.
    """
    out = Path(out)
    if out.suffix == ".py" or out.is_dir() or out.resolve() == Path(checkpoint).expanduser().resolve():
        raise DistillError(f"cannot write the student to {out}; name a new file such as student.pth")
    described = out.with_suffix(".py")
    there = [str(path) for path in (out, described) if path.exists()]
    if there and not force:
        raise DistillError(
            f"{' and '.join(there)} would be overwritten (the config is written beside the weights); name another file, or "
            "say --force"
        )
    config, weights, meta = student_in(checkpoint, peer=peer, trusted=trusted)
    meta["cfg"] = config.pretty_text
    out.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(described) as beside, written_whole(out) as part:
        beside.write_text(meta["cfg"], encoding="utf-8")
        with part.open("wb") as file:
            torch.save({"meta": meta, "state_dict": weights}, file)
    return out, described


def student_in(
    checkpoint: str | Path, *, peer: str | None = None, trusted: bool = False
) -> tuple[Config, dict[str, Any], dict[str, Any]]:
    """Return the plain student of a checkpoint, or a peer: its config, its weights and the checkpoint's ``meta``.

    Args and errors are those of :func:`export_student`.
    """
    source = read_checkpoint(checkpoint, trusted=trusted, safe_types=SAFE_TYPES)
    meta = dict(source.get("meta") or {})
    text = meta.get("cfg") or meta.get("config")
    if not isinstance(text, str):
        raise DistillError(f"checkpoint {checkpoint} holds no config in meta['cfg']; it was not saved by a Runner")
    name = f"checkpoint {checkpoint}"
    config = executed_config(text, name) if trusted else literal_config(text, name)
    if peer is None:
        return plain_config(config), weights_of(source), meta
    return peer_config(config, peer, name, files=trusted), _peer_weights(source, peer, name), meta


def _peer_weights(source: dict[str, Any], peer: str, name: str) -> dict[str, Any]:
    """Return a peer's weights from a checkpoint's live state."""
    found: Any = source
    for key in ("message_hub", "runtime_info", KEY, "sources", peer, "model"):
        found = found.get(key) if isinstance(found, dict) else None
    if not isinstance(found, dict):
        raise DistillError(f"{name} has no weights of the peer {peer!r}; take one that a training saved")
    return found
