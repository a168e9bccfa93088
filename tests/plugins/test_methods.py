"""Every term of the core trains a plain PyTorch model; what plain models lack is refused."""

from __future__ import annotations

import pytest
import torch

from kdgraft import TERMS, Distiller, Reader
from support.methods import assert_falls, assert_shared, sharing, split, trained
from support.plain import method, model

USABLE, LACKING = split(TERMS, Reader)


@pytest.mark.parametrize("kind", USABLE)
def test_trains_a_plain_model(kind):
    built = method(kind)
    assert_falls(trained(built.losses, built.distiller.parameters()))


@pytest.mark.parametrize("kind", sharing(TERMS))
@pytest.mark.parametrize("share", [0.25, 0.0])
def test_takes_a_share_of_the_task_s_loss(kind, share):
    images, loss = torch.rand(4, 3, 8, 8), torch.tensor(3.0)
    terms = [dict(type=kind, name="term", share=share), "SoftTargets"]
    out = Distiller(model(4), model(8), terms, example=images)(images)
    assert_shared({"loss": out.total(loss) - out.loss, **out.losses}, {"loss": loss}, share)


def test_plain_models_lack_nothing():
    assert LACKING == []
