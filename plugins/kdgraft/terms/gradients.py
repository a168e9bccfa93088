"""Terms on gradients of the models by their input."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..batch import Batch
from ..distributed import sum_over_ranks
from ..errors import DistillError, WiringError
from ..losses import Ratio, gradient_transfer, weighted_ratio
from ..losses.reduction import upcast
from ..pairs import Pairs
from ..regions import All
from ..registry import RECIPES, TERMS
from ..taps import Recording, Tap
from ..wiring import Wiring
from .pairs import ScoreTerm


@TERMS.register
@RECIPES.register("gradient-at")
class GradientTransfer(ScoreTerm):
    """Attention transfer by gradients: by the input, of the labels' cross-entropy (Zagoruyko & Komodakis 2017, 1612.03928).

    The student is differentiated twice, which takes about three times the time and memory of its plain step; the teacher keeps its
    activations and is differentiated once, by its input alone. Both happen only in steps where the term's weight is not 0. In these
    steps attention runs by PyTorch's own formula, as fused kernels have no second derivative.

    The cross-entropy is the sum over images of the mean over an image's items (one, or pixels), so that the gradients and the loss,
    a mean over images, do not depend on the size of the batch; they grow with the resolution and shrink with the range of the
    inputs. Both models must see the images in one size; where their normalisations differ, so do the units of the gradients. The
    paper publishes no weight β. Padding is excluded.

    Args:
        weight: β; the factor ½ of the paper is part of the loss.
        where: arguments of the host that select the class scores; see :class:`ScoreTerm`.

    Example:
        >>> distiller = Distiller(student, teacher, [GradientTransfer(weight=10.0)], example=images)
        >>> list(distiller(images, targets=labels).losses)
        ['distill.gradient_transfer.loss']
    """

    needs = ("images", "classes", "labels")
    in_chunks = hears_ensembles = False
    takes_gradients = True

    def prepare(self, student: nn.Module, teacher: nn.Module) -> None:
        super().prepare(student, teacher)
        self.images = tuple(replace(self.reader.images(model), leaf=True) for model in (student, teacher))
        self.student_taps = [*self.student_taps, self.images[0]]
        self.teacher_taps = [*self.teacher_taps, self.images[1]]

    def wire(self, wiring: Wiring) -> None:
        super().wire(wiring)
        recordings = (wiring.student_recording, wiring.teacher_recording)
        ours, theirs = (_image(self, recording, tap) for recording, tap in zip(recordings, self.images, strict=True))
        if ours.shape != theirs.shape:
            raise WiringError(
                f"{self.name}: the student sees images {tuple(ours.shape)} and the teacher {tuple(theirs.shape)}, so that gradients "
                "by them cannot be compared; give both models one size"
            )
        self._try(wiring.student, recordings[0], ours)

    def _try(self, model: nn.Module, student: Recording, images: Tensor) -> None:
        """Raise a :class:`WiringError` unless the student can be differentiated twice; its own gradients stay what they were."""
        kept = [(parameter, parameter.grad) for parameter in model.parameters()]
        for parameter, _ in kept:
            parameter.grad = None
        scores = [value for tap in self.predictions.taps[0] for value in self.reader.tensors(student, tap)]
        value = torch.stack([upcast(score).square().sum() for score in scores]).sum()
        try:
            slope = self._slope(value, images, create_graph=True)
            slope.square().sum().backward(retain_graph=True)
        except (RuntimeError, NotImplementedError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise WiringError(
                f"{self.name}: the student cannot be differentiated twice by its input ({reason}); use layers without fused kernels "
                "(attn_implementation='eager') or AttentionTransfer"
            ) from None
        finally:
            for parameter, gradient in kept:
                parameter.grad = gradient

    def _slope(self, value: Tensor, images: Tensor, *, create_graph: bool) -> Tensor:
        """Return the gradient of a value by the images; the graph is kept, as the model's own loss may need it."""
        if not value.requires_grad:
            raise DistillError(
                f"{self.name} needs gradients, which are off in this pass; leave the term out of evaluation"
            )
        found = torch.autograd.grad(value, images, create_graph=create_graph, retain_graph=True, allow_unused=True)[0]
        if found is None:
            raise WiringError(f"{self.name}: the class scores do not depend on the images at '{self.images[0]}'")
        return found

    def count(self, batch: Batch) -> Tensor | None:
        return None  # images, of which the reader of class scores does not know the number

    def forward(self, student: Recording, teacher: Recording, batch: Batch) -> Ratio:
        (ours, theirs) = (_image(self, model, tap) for model, tap in zip((student, teacher), self.images, strict=True))
        pairs = self.pairs(student, teacher, batch)
        with torch.autocast(ours.device.type, enabled=False):
            slopes = self._slopes(pairs, ours, theirs)
        valid = All()(batch.at(self.images[1], theirs), theirs, teacher.scale)
        items = gradient_transfer(slopes[0], slopes[1].detach(), valid=valid, reduction="none")
        return weighted_ratio(items, None if valid is None else (valid > 0).flatten(1).any(1))

    def _slopes(self, pairs: list[Pairs], ours: Tensor, theirs: Tensor) -> list[Tensor]:
        """Return the gradients ``(B, C, H, W)`` of both models' cross-entropies by their images."""
        weights = [pair.weight for pair in pairs if pair.weight is not None]
        # Items per image in the batch of all processes, as their images may have different numbers of labelled items.
        sums = torch.stack([torch.as_tensor(float(len(ours)), device=ours.device), *(w.sum().float() for w in weights)])
        images, *counts = sum_over_ranks(sums)
        found = []
        for scores_of, inputs, twice in ((lambda p: p.student, ours, True), (lambda p: p.teacher, theirs, False)):
            parts = [
                _entropy(scores_of(pair), pair, weight) * (images / count.clamp(min=1))
                for pair, weight, count in zip(pairs, weights, counts, strict=True)
            ]
            found.append(self._slope(torch.stack(parts).mean(), inputs, create_graph=twice))
        return found


def _entropy(scores: Tensor, pairs: Pairs, weight: Tensor) -> Tensor:
    """Return the weighted sum over items of the cross-entropy with their labels; those with weight 0 are excluded."""
    assert pairs.labels is not None
    labels = pairs.labels.masked_fill(weight == 0, -100)
    items = F.cross_entropy(upcast(scores).movedim(pairs.dim, 1), labels, reduction="none")
    return (items * weight.to(items.dtype)).sum()


def _image(term: GradientTransfer, recording: Recording, tap: Tap) -> Tensor:
    """Return the images that a model saw, as the leaf of its graph."""
    found: Any = recording[tap]
    if not isinstance(found, Tensor) or found.ndim != 4 or not found.is_floating_point():
        shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise WiringError(
            f"{term.name} needs images (B, C, H, W) as the input of the {recording.owner}, and '{tap}' gives {shape}; use "
            "AttentionTransfer or terms on predictions"
        )
    return found
