"""Every term of the core trains a plain PyTorch model; what plain models lack is refused."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import nn

from kdgraft import TERMS, Distiller, Itself, Reader
from kdgraft.batch import Batch
from support.methods import OF_ITSELF, assert_falls, assert_shared, own_terms, sharing, spec, split, trained

USABLE, LACKING = split(TERMS, Reader)
SETTINGS: dict[str, dict[str, Any]] = {
    "Review": dict(tap=["stem", "conv"]),
    "BYOT": dict(tap=["stem", "conv"]),
    "ONE": dict(branch="conv"),
    "BoundedRegression": dict(bounded=False, margin=0),  # the targets are classes
    "WeightMatching": dict(modules=["conv", "head"]),
    "Reconstruction": dict(tap=None),  # the output
    # A discriminator that does not learn, as the loss would rise with one that does.
    "AdversarialImages": dict(tap=None, layers=1, lr=1e-12),
}
"""Settings of a term for plain models."""


def model(width: int) -> nn.Module:
    layers = dict(stem=nn.Conv2d(3, width, 3, padding=1), act=nn.ReLU(), conv=nn.Conv2d(width, width, 3, padding=1))
    return nn.Sequential(OrderedDict(**layers, flat=nn.Flatten(), head=nn.Linear(64 * width, 5)))


def generator(width: int) -> nn.Module:
    layers = dict(conv=nn.Conv2d(3, width, 3, padding=1), act=nn.ReLU(), last=nn.Conv2d(width, 3, 3, padding=1))
    return nn.Sequential(OrderedDict(layers))


@pytest.mark.parametrize("kind", USABLE)
def test_trains_a_plain_model(kind):
    torch.manual_seed(1)
    images, labels = torch.rand(4, 3, 8, 8), torch.tensor([0, 4, 2, 0])
    boxes = [torch.tensor([[1.0, 1.0, 6.0, 5.0]])] * 4
    term = spec(own_terms(TERMS)[kind], "conv", **SETTINGS.get(kind, {}))
    student, teacher = model(4), model(8)
    if "generators" in own_terms(TERMS)[kind].needs:
        student, teacher, labels = generator(4), generator(8), torch.rand(4, 3, 8, 8)
    if "classifiers" in own_terms(TERMS)[kind].needs:  # which both must get some images right
        labels = student(images).argmax(1)
        teacher.head.bias.data += 9 * nn.functional.one_hot(labels, 5).sum(0)
    distiller = Distiller(student, Itself() if kind in OF_ITSELF else teacher, [term], example=images)

    def losses():
        batch = Batch(padded_size=(8, 8), boxes=boxes)
        return distiller(images, targets=labels, batch=batch).losses

    assert_falls(trained(losses, distiller.parameters()))


@pytest.mark.parametrize("kind", sharing(TERMS))
@pytest.mark.parametrize("share", [0.25, 0.0])
def test_takes_a_share_of_the_task_s_loss(kind, share):
    images, loss = torch.rand(4, 3, 8, 8), torch.tensor(3.0)
    terms = [dict(type=kind, name="term", share=share), "SoftTargets"]
    out = Distiller(model(4), model(8), terms, example=images)(images)
    assert_shared({"loss": out.total(loss) - out.loss, **out.losses}, {"loss": loss}, share)


def test_plain_models_lack_nothing():
    assert LACKING == []
