"""mmengine's checkpoints, read without running anything in them. Exporting is tested on real runs, in tests/det."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer, MessageHub

from kdgraft.errors import UnsafeCheckpoint
from kdgraft.sources.teacher import read_checkpoint
from kdgraft_mm.checkpoints import SAFE_TYPES


def saved(tmp_path, **content):
    path = tmp_path / "checkpoint.pth"
    torch.save({"state_dict": {"weight": torch.ones(2)}, **content}, path)
    return path


def test_a_message_hub_with_histories_loads(tmp_path):
    hub = MessageHub("test_mm_checkpoints")
    for value in (1, 2.5):
        hub.update_scalar("train/loss", value)
    hub.update_info("array", np.arange(3.0, dtype=np.float32))
    hub.update_info("number", np.float64(0.5))
    hub.update_info("text", np.array(["a", "b"]))
    hub.update_info("flag", np.bool_(True))
    path = saved(tmp_path, message_hub=hub.state_dict())
    with pytest.raises(Exception, match="Weights only load failed"):
        torch.load(path, weights_only=True)
    found = read_checkpoint(path, safe_types=SAFE_TYPES)
    assert torch.equal(found["state_dict"]["weight"], torch.ones(2))
    info = found["message_hub"]["runtime_info"]
    assert info["array"].tolist() == [0, 1, 2] and info["number"] == 0.5
    # Reading leaves mmengine's class as it was: a file cannot put methods of its own into it.
    assert HistoryBuffer._statistics_methods["mean"] is HistoryBuffer.mean


class Evil:
    """Unpickles by getattr on something harmless to something that is not."""

    def __reduce__(self):
        return getattr, (HistoryBuffer, "__init_subclass__")


class Worse:
    def __reduce__(self):
        import os

        return os.getenv, ("HOME",)


def test_getattr_in_a_file_yields_nothing(tmp_path):
    # mmengine's own files need the name; what it does in them is nothing.
    found = read_checkpoint(saved(tmp_path, meta={"x": Evil()}), safe_types=SAFE_TYPES)
    assert found["meta"]["x"] is None


def test_anything_else_is_refused_without_the_flag(tmp_path):
    path = saved(tmp_path, meta={"x": Worse()})
    with pytest.raises(UnsafeCheckpoint, match="getenv"):
        read_checkpoint(path, safe_types=SAFE_TYPES)
    assert "x" in read_checkpoint(path, trusted=True)["meta"]
