"""Running statistics of batch normalisations, estimated anew."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kdgraft import DistillError
from kdgraft.batchnorm import reestimate_batchnorm

X = torch.sin(torch.arange(12 * 2.0)).reshape(12, 2) * 3 + 1
BATCHES = [(X[:4], None), (X[4:8], None), (X[8:], None)]


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.BatchNorm1d(2), nn.Dropout(0.5), nn.Linear(2, 3), nn.BatchNorm1d(3))


def test_statistics_are_the_mean_over_batches_by_hand():
    model = net().train()
    model[0].running_mean.fill_(7)
    weights = {name: p.clone() for name, p in model.named_parameters()}
    random = torch.get_rng_state()
    assert reestimate_batchnorm(model, BATCHES) == 2
    torch.testing.assert_close(model[0].running_mean, torch.stack([x.mean(0) for x, _ in BATCHES]).mean(0))
    torch.testing.assert_close(model[0].running_var, torch.stack([x.var(0) for x, _ in BATCHES]).mean(0))
    # The second layer sees what the first gives in training mode, without dropout.
    after = [model[2]((x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-5).sqrt()) for x, _ in BATCHES]
    torch.testing.assert_close(model[3].running_mean, torch.stack([x.mean(0) for x in after]).mean(0))
    torch.testing.assert_close(model[3].running_var, torch.stack([x.var(0) for x in after]).mean(0))
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    assert all(module.training for module in model.modules())
    assert [model[n].momentum for n in (0, 3)] == [0.1, 0.1]
    assert torch.equal(torch.get_rng_state(), random)


def test_as_many_batches_as_asked_for():
    model = net().eval()
    reestimate_batchnorm(model, BATCHES, batches=1)
    torch.testing.assert_close(model[0].running_mean, X[:4].mean(0))
    assert not any(module.training for module in model.modules())


def test_nothing_to_estimate_and_nothing_to_estimate_from():
    assert reestimate_batchnorm(nn.Linear(2, 2), []) == 0
    assert reestimate_batchnorm(nn.BatchNorm1d(2, track_running_stats=False), []) == 0
    model = net()
    with pytest.raises(DistillError, match="the loader yields no batch"):
        reestimate_batchnorm(model, [])
    assert model[0].momentum == 0.1 and torch.equal(model[0].running_var, torch.ones(2))
