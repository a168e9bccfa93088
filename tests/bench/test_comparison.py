"""What timing leaves behind in the models that it times."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn

from kdgraft_bench.comparison import Outcome, Training, time_steps


def test_timed_models_predict_as_they_did_before():
    class Steps:
        rounds = 2

        def batches(self, runs):
            return [3 + torch.randn(8, 4) for _ in runs]

        def loss(self, run, batch):
            return run.model(batch).square().mean()

    training = Training("plain", 0, 1, "test", "cpu", Path("data"), Path("out"))
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).eval()
    picture = torch.randn(1, 4)  # of which alone a batch norm in training mode makes zeros
    before = model(picture)
    (seconds,) = time_steps(Steps(), [Outcome(training, {}, SimpleNamespace(model=model))])
    assert seconds > 0
    assert torch.equal(model(picture), before)
