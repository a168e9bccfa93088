"""Every term of the core trains a plain PyTorch model; what plain models lack is refused."""

from __future__ import annotations

import pytest
import torch

from kdgraft import TERMS, Distiller, Reader
from support.methods import assert_falls, assert_shared, sharing, split, trained
from support.plain import Method, method, model

USABLE, LACKING = split(TERMS, Reader)


@pytest.mark.parametrize("kind", USABLE)
def test_trains_a_plain_model(kind):
    built = method(kind)
    assert_falls(trained(built.losses, built.distiller.parameters()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("kind", USABLE)
def test_trains_a_model_of_another_precision(kind, dtype):
    built = method(kind)
    built.distiller.to(dtype)
    labels = built.labels.to(dtype) if built.labels.is_floating_point() else built.labels
    built = Method(built.distiller, built.images.to(dtype), labels)
    for _ in range(3):  # some terms train a network of their own first
        loss = built.losses()["distill.term.loss"]
        loss.backward()
        assert loss.isfinite() and loss.dtype is (torch.float64 if dtype is torch.float64 else torch.float32)
    assert all(p.grad is None or p.grad.isfinite().all() for p in built.distiller.parameters())


@pytest.mark.parametrize("kind", sharing(TERMS))
@pytest.mark.parametrize("share", [0.25, 0.0])
def test_takes_a_share_of_the_task_s_loss(kind, share):
    images, loss = torch.rand(4, 3, 8, 8), torch.tensor(3.0)
    terms = [dict(type=kind, name="term", share=share), "SoftTargets"]
    out = Distiller(model(4), model(8), terms, example=images)(images)
    assert_shared({"loss": out.total(loss) - out.loss, **out.losses}, {"loss": loss}, share)


def test_plain_models_lack_nothing():
    assert LACKING == []
