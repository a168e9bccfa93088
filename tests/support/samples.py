"""Every term on the relations between samples, and small models for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from kdgraft import TERMS, Batch, Distiller
from kdgraft.terms import SampleTerm
from support.tensors import gradients


class Spread(SampleTerm):
    """The squared difference of the mean squared distances from the mean: simple enough to be computed by hand."""

    def compare(self, student: Tensor, teacher: Tensor, present: Tensor) -> Tensor:
        if not present.any():
            return student.sum() * 0
        s, t = ((x[present] - x[present].mean(0)).square().sum(1).mean() for x in (student, teacher))
        return (s - t).square()


EVERY: dict[str, type[SampleTerm]] = {"Spread": Spread} | {
    name: kind
    for name in TERMS
    if isinstance(kind := TERMS.get(name), type) and issubclass(kind, SampleTerm) and "queries" not in kind.needs
}
"""By name: those that are registered, and :class:`Spread`; no terms on queries, whose rows belong together."""

STEPS = 3
IMAGES = torch.sin(torch.arange(STEPS * 4 * 3 * 6 * 5.0)).reshape(STEPS, 4, 3, 6, 5)
SIZES = [(6, 5), (6, 3), (4, 4), (2, 5)]


class Mix(nn.Linear):
    """A linear map of the channels of maps, or of states of tokens."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1) if x.ndim == 4 else super().forward(x)


class Pointwise(nn.Module):
    """Maps or states whose positions do not see each other, so that padding can be cut off."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mix = Mix(3, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(x)


def distiller(name: str, example: Tensor = IMAGES[0], **settings: Any) -> Distiller:
    """The same models for every term, of two widths."""
    torch.manual_seed(0)
    student, teacher = Pointwise(4), Pointwise(6)
    return Distiller(student, teacher, [EVERY[name]("mix", name="related", **settings)], example)


def steps(
    name: str, share: slice, wrap: Any = lambda model: model, **settings: Any
) -> list[tuple[Tensor, dict[str, Tensor]]]:
    """The losses and gradients of steps on a share of the images, without an optimizer."""
    model = distiller(name, **settings)
    wrapped = wrap(model)
    found = []
    for images in IMAGES:
        model.zero_grad()
        height, width = (max(sides) for sides in zip(*SIZES[share], strict=True))  # padded as far as this share needs
        batch = Batch(padded_size=(height, width), image_sizes=SIZES[share])
        loss = wrapped(images[share, :, :height, :width], targets=torch.arange(4)[share], batch=batch).loss
        loss.backward()
        found.append((loss.detach(), gradients(model)))
    return found
