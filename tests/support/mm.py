"""Runs of mmengine's Runner and checkpoints, which the tests of detection and segmentation share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mmengine
import pytest
import torch
from mmengine.config import Config, ConfigDict
from mmengine.registry import Registry
from mmengine.runner import Runner
from torch import Tensor, nn

from kdgraft.errors import DistillError

needs_resume = pytest.mark.xfail(
    mmengine.__version__ == "0.10.7",
    reason="upstream mmengine 0.10.7 cannot load its own checkpoints on torch >= 2.6",
    strict=True,
)


@dataclass
class Trained:
    """A finished run: its Runner and where its checkpoints are."""

    runner: Runner
    work_dir: Path

    def checkpoint(self, iteration: int) -> Path:
        return self.work_dir / f"iter_{iteration}.pth"


def run(config: Config) -> Runner:
    """Trains and returns the Runner."""
    runner = Runner.from_cfg(config)
    runner.train()
    return runner


@pytest.fixture
def zeros_for_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models start from zeros: at full width, random numbers and what follows from them are most of what building costs."""
    for name in ("uniform_", "normal_", "kaiming_uniform_", "kaiming_normal_", "xavier_uniform_", "trunc_normal_"):
        monkeypatch.setattr(nn.init, name, lambda tensor, *_, **__: tensor.detach().zero_())


def history(runner: Runner, name: str) -> list[float]:
    """All values that a Runner logged."""
    return [float(value) for value in runner.message_hub.get_scalar(f"train/{name}").data[0]]


def weights(runner: Runner) -> dict[str, Tensor]:
    """The state dict of a Runner's model, copied."""
    return {key: value.clone() for key, value in runner.model.state_dict().items()}


def loadable(checkpoint: Path) -> str:
    """A Runner's checkpoint for the host to load; upstream mmengine only loads its own when nothing but weights and meta is left."""
    if mmengine.__version__ != "0.10.7":
        return str(checkpoint)
    published = checkpoint.with_name(f"published_{checkpoint.name}")
    saved = torch.load(checkpoint, weights_only=False)
    torch.save({"meta": saved["meta"], "state_dict": saved["state_dict"]}, published)
    return str(published)


def cannot_be_built(models: Registry, entry: dict[str, Any], *parts: str) -> None:
    """Building fails with one line that holds all the parts."""
    with pytest.raises(DistillError) as caught:
        models.build(ConfigDict(entry))
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message
