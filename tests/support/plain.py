"""Small plain models that each term of the core can distil."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kdgraft import TERMS, Distiller, Itself
from kdgraft.batch import Batch
from support.methods import OF_ITSELF, own_terms, spec

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


class Method(NamedTuple):
    """A distilled plain model and a batch for it."""

    distiller: Distiller
    images: Tensor
    labels: Tensor

    def losses(self) -> dict[str, Tensor]:
        """The losses of a step."""
        boxes = [torch.tensor([[1.0, 1.0, 6.0, 5.0]])] * len(self.images)
        batch = Batch(padded_size=(8, 8), boxes=boxes)
        return self.distiller(self.images, targets=self.labels, batch=batch).losses


def method(term: str, prepare: Callable[[nn.Module], Any] = lambda built: None, **settings: Any) -> Method:
    """A plain model distilled by one term.

    Args:
        term: its name.
        prepare: given the student and the teacher before they are wired.
        settings: of the term, beside :data:`SETTINGS`.
    """
    torch.manual_seed(1)
    images, labels = torch.rand(4, 3, 8, 8), torch.tensor([0, 4, 2, 0])
    kind = own_terms(TERMS)[term]
    entry = {**spec(kind, "conv", **SETTINGS.get(term, {})), **settings}
    student, teacher = model(4), model(8)
    if "generators" in kind.needs:
        student, teacher, labels = generator(4), generator(8), torch.rand(4, 3, 8, 8)
    if "classifiers" in kind.needs:  # which both must get some images right
        labels = student(images).argmax(1)
        teacher.head.bias.data += 9 * nn.functional.one_hot(labels, 5).sum(0)
    prepare(student), prepare(teacher)
    source = Itself() if term in OF_ITSELF else teacher
    return Method(Distiller(student, source, [entry], example=images), images, labels)
